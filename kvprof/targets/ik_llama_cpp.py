"""ik_llama.cpp: command-line flags, with other types for the first and the last layers.

    -fa on -ctk q6_0 -ctk-first q8_0,4 -ctk-last q8_0,2 -ctv q4_0

Sources: `common/common.cpp` and `src/llama.cpp` of ikawrakow/ik_llama.cpp, where layers are counted over all of the
model and the last flag wins where two overlap, which what is written here never does.

A query reads its own token as stored: `llm_build_kv` of `src/llama-build-context.cpp` stores, then reads the cache.
"""

from __future__ import annotations

from kvprof.allocate.constraints import FULL, FirstLastRest
from kvprof.allocate.target import Target
from kvprof.records.external_formats import GGML
from kvprof.records.formats import TENSORS
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact, skipped_remarks, told
from kvprof.targets.llama_cpp import ALL_LAYERS, FLASH_ATTENTION

TARGET = Target(
    name="ik_llama.cpp",
    constraints=FirstLastRest((*GGML, FULL)),
    artefact="flags: -ctk T -ctk-first T,N -ctk-last T,M -ctv ...",
    since="April 2026 (pull requests 1599 and 1626)",
    checked="flags and precedence against common/common.cpp and src/llama.cpp; not run. A GGUF of the Llama family "
    "has a key's channels in another order than the checkpoint that is scored",
    full="f16",
)


def write(plan: BitPlan) -> Artefact:
    """Return ik_llama.cpp's flags for a plan whose keys, and values, have at most three runs of layers."""
    found = told(plan, TARGET)
    constraints = TARGET.constraints
    assert isinstance(constraints, FirstLastRest)
    words = [FLASH_ATTENTION]
    for tensor, flag in zip(TENSORS, ("-ctk", "-ctv"), strict=True):
        ranges = constraints.ranges_of(found.assignment, tensor, plan.model.num_layers)
        assert ranges is not None
        words.append(f"{flag} {TARGET.word(ranges.rest)}")
        if ranges.first_layers:
            words.append(f"{flag}-first {TARGET.word(ranges.first)},{ranges.first_layers}")
        if ranges.last_layers:
            words.append(f"{flag}-last {TARGET.word(ranges.last)},{ranges.last_layers}")
    return Artefact(" ".join(words) + "\n", ".args", (*found.remarks, *skipped_remarks(plan, TARGET, ALL_LAYERS)))
