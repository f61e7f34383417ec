"""llama.cpp: command-line flags.

    -fa on -ctk q8_0 -ctv q4_0

Sources: `common/arg.cpp` and `docs/build.md` of ggml-org/llama.cpp.

A query reads its own token as stored: `build_attn` of `src/llama-graph.cpp` copies it into the cache and then reads all
of the cache.
"""

from __future__ import annotations

from kvprof.allocate.constraints import FULL, KeysAndValues, pairs_of
from kvprof.allocate.target import Target
from kvprof.records.external_formats import GGML
from kvprof.records.plan import BitPlan
from kvprof.targets.artefact import Artefact, skipped_remarks, told

TARGET = Target(
    name="llama.cpp",
    constraints=KeysAndValues((*(name for name in GGML if name != "q6_0"), FULL)),
    artefact="flags: -ctk T -ctv T -fa on",
    since="a build whose -fa takes on, off or auto",
    checked="types against common/arg.cpp, and run (llama-cpp-python 0.3.36); quantizers bit for bit against "
    "gguf's. What comes before is left out: it turns keys and values by a Hadamard matrix (pull request 21038), "
    "and a GGUF of the Llama family has a key's channels in another order",
    full="f16",
)

FLASH_ATTENTION = "-fa on"
"""Quantized values need it."""

ALL_LAYERS = "gives them the types of the layers around them"
"""What both do with layers that a plan leaves alone."""


def write(plan: BitPlan) -> Artefact:
    """Return llama.cpp's flags for a plan of one type for keys and one for values."""
    found = told(plan, TARGET)
    key, value = map(TARGET.word, next(iter(pairs_of(found.assignment).values())))
    remarks = [*found.remarks, *skipped_remarks(plan, TARGET, ALL_LAYERS)]
    if key != value:
        remarks.append(
            f"on CUDA, keys and values of unlike types need a build with -DGGML_CUDA_FA_ALL_QUANTS=ON, or by newer "
            f'ones "-DGGML_CUDA_FA_QUANTS={key}-{value}"; without it attention runs on the CPU or in f16'
        )
    if "iq4_nl" in (key, value):
        remarks.append("CUDA has no flash attention for iq4_nl: attention then runs on the CPU")
    return Artefact(f"{FLASH_ATTENTION} -ctk {key} -ctv {value}\n", ".args", tuple(remarks))
