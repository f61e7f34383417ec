"""llama.cpp: command-line flags.

    -fa on -ctk q8_0 -ctv q4_0

Sources, of autumn 2026: `common/arg.cpp` and `docs/build.md` of ggml-org/llama.cpp; `src/llama-kv-cache.cpp`
(attn_rot_k, build_input_k_rot, build_input_v_rot: what is quantized is turned by a Hadamard matrix first, where heads
are a multiple of 64, keys by the largest that fits, values by one of 64); `convert_hf_to_gguf.py` (LlamaModel.permute:
key channels that rotary embedding turns together stand side by side); which types have flash attention:
`ggml/src/ggml-cuda/fattn.cu`, and FLASH_ATTN_EXT in `ggml/src/ggml-metal/ggml-metal-device.m`.

A query reads its own token as stored: `build_attn` of `src/llama-graph.cpp` copies it into the cache and then reads all
of the cache.
"""

from __future__ import annotations

from collections import defaultdict

from kvprof.allocate.constraints import FULL, KeysAndValues, pairs_of
from kvprof.allocate.target import Device, Target, device_remarks
from kvprof.records.external_formats import GGML, GGML_TURNED, ExternalFormat
from kvprof.records.formats import TensorName
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan, head_dim_of
from kvprof.targets.artefact import Artefact, skipped_remarks, told

IN_GGUF_ORDER = frozenset(
    f"{name}ForCausalLM"
    for name in (
        *("LLaMA", "Llama", "Mistral", "Mixtral", "Arcee", "SmolLM3", "Granite", "GraniteMoe", "Apertus", "DeciLM"),
        *("Olmo", "OLMo", "MiniCPM", "Arctic", "InternLM2", "Xverse", "Baichuan", "BaiChuan"),
    )
)
"""Architectures whose keys' channels convert_hf_to_gguf.py brings into another order than the checkpoint's."""


def in_gguf_order(architecture: str | None) -> bool:
    """Whether a GGUF of an architecture has the channels of a key in another order than the checkpoint."""
    return architecture in IN_GGUF_ORDER


def _is_turned(tensor: TensorName, geometry: CacheGeometry) -> bool:
    """Whether keys, or values, are turned: heads of one size, a multiple of 64. Sliding layers are a cache apart."""
    sizes = defaultdict(set)
    for layer in geometry.planned:
        sizes[layer.window is None].add(head_dim_of(layer, tensor))
    return all(len(one) == 1 and min(one) % 64 == 0 for one in sizes.values())


def _stores(form: ExternalFormat, tensor: TensorName, geometry: CacheGeometry, architecture: str | None) -> bool:
    before = ["gguf order"] if tensor == "key" and in_gguf_order(architecture) else []
    if _is_turned(tensor, geometry):
        before.append("hadamard" if tensor == "key" else "hadamard 64")
    return list(form.before) == before


TARGET = Target(
    name="llama.cpp",
    constraints=KeysAndValues((*(name for name, form in (GGML | GGML_TURNED).items() if form.bits != 6), FULL)),
    artefact="flags: -ctk T -ctv T -fa on",
    since="a build whose -fa takes on, off or auto",
    checked="types against common/arg.cpp, and run (llama-cpp-python 0.3.36); quantizers bit for bit against "
    "gguf's; what comes before them, a Hadamard matrix (pull request 21038) and the order of a Llama's key channels, "
    "against llama-kv-cache.cpp and convert_hf_to_gguf.py",
    full="f16",
    stores=_stores,
    devices={
        "cuda": Device("CUDA", frozenset({"iq4_nl"})),
        "metal": Device("Metal", frozenset({"iq4_nl"}), alike=True),
        "cpu": Device("the CPU"),
    },
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
    return Artefact(f"{FLASH_ATTENTION} -ctk {key} -ctv {value}\n", ".args", (*remarks, *device_remarks(plan, TARGET)))
