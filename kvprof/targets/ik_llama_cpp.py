"""ik_llama.cpp: command-line flags, with other types for the first and the last layers.

    -fa on -ctk q6_0 -ctk-first q8_0,4 -ctk-last q8_0,2 -ctv q4_0

Sources: `common/common.cpp` and `src/llama.cpp` of ikawrakow/ik_llama.cpp, where layers are counted over all of the
model and the last flag wins where two overlap, which what is written here never does.

A query reads its own token as stored: `llm_build_kv` of `src/llama-build-context.cpp` stores, then reads the cache.
"""

from __future__ import annotations

from kvprof.allocate.constraints import FULL, FirstLastRest
from kvprof.allocate.target import Target
from kvprof.records.external_formats import GGML, GGML_TURNED, ExternalFormat
from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact, skipped_remarks, told
from kvprof.targets.llama_cpp import ALL_LAYERS, FLASH_ATTENTION, in_gguf_order

GGUF_ORDER = ("gguf order",)


def _stores(form: ExternalFormat, tensor: TensorName, geometry: CacheGeometry, architecture: str | None) -> bool:
    return form.before == (GGUF_ORDER if tensor == "key" and in_gguf_order(architecture) else ())


TARGET = Target(
    name="ik_llama.cpp",
    constraints=FirstLastRest(
        (*GGML, *(name for name, form in GGML_TURNED.items() if form.before == GGUF_ORDER), FULL)
    ),
    artefact="flags: -ctk T -ctk-first T,N -ctk-last T,M -ctv ...",
    since="April 2026 (pull requests 1599 and 1626)",
    checked="flags and precedence against common/common.cpp and src/llama.cpp, the order of a Llama's key channels "
    "against convert_hf_to_gguf.py; not run. It turns keys and values by a Hadamard matrix only where -khad and -vhad "
    "say so, which is not scored",
    full="f16",
    stores=_stores,
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
