"""llama.cpp and ik_llama.cpp: command-line flags.

    -fa on -ctk q8_0 -ctv q4_0
    -fa on -ctk q6_0 -ctk-first q8_0,4 -ctk-last q8_0,2 -ctv q4_0

Sources: `common/arg.cpp` and `docs/build.md` of ggml-org/llama.cpp; `common/common.cpp` and `src/llama.cpp` of
ikawrakow/ik_llama.cpp, where layers are counted over all of the model and the last flag wins where two overlap, which
what is written here never does.
"""

from __future__ import annotations

from kvprof.allocate.grammars import FirstLastRest, pairs_of
from kvprof.allocate.targets import Target
from kvprof.export.artefact import Artefact, skipped_remarks, told
from kvprof.records.formats import TENSORS
from kvprof.records.plan import BitPlan

FLASH_ATTENTION = "-fa on"
"""Quantized values need it."""

_ALL_LAYERS = "gives them the types of the layers around them"


def write_llama_cpp(plan: BitPlan, target: Target) -> Artefact:
    """Return llama.cpp's flags for a plan of one type for keys and one for values."""
    found = told(plan, target)
    key, value = map(target.word, next(iter(pairs_of(found.assignment).values())))
    remarks = [*found.remarks, *skipped_remarks(plan, target, _ALL_LAYERS)]
    if key != value:
        remarks.append(
            f"on CUDA, keys and values of unlike types need a build with -DGGML_CUDA_FA_ALL_QUANTS=ON, or by newer "
            f'ones "-DGGML_CUDA_FA_QUANTS={key}-{value}"; without it attention runs on the CPU or in f16'
        )
    if "iq4_nl" in (key, value):
        remarks.append("CUDA has no flash attention for iq4_nl: attention then runs on the CPU")
    return Artefact(f"{FLASH_ATTENTION} -ctk {key} -ctv {value}\n", ".args", tuple(remarks))


def write_ik_llama_cpp(plan: BitPlan, target: Target) -> Artefact:
    """Return ik_llama.cpp's flags for a plan whose keys, and values, have at most three runs of layers."""
    found = told(plan, target)
    grammar = target.grammar
    assert isinstance(grammar, FirstLastRest)
    words = [FLASH_ATTENTION]
    for tensor, flag in zip(TENSORS, ("-ctk", "-ctv"), strict=True):
        ranges = grammar.ranges_of(found.assignment, tensor, plan.model.num_layers)
        assert ranges is not None
        words.append(f"{flag} {target.word(ranges.rest)}")
        if ranges.first_layers:
            words.append(f"{flag}-first {target.word(ranges.first)},{ranges.first_layers}")
        if ranges.last_layers:
            words.append(f"{flag}-last {target.word(ranges.last)},{ranges.last_layers}")
    return Artefact(" ".join(words) + "\n", ".args", (*found.remarks, *skipped_remarks(plan, target, _ALL_LAYERS)))
