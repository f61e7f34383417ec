"""The formats of other runtimes' caches: what each stores, by the name that its runtime gives it.

Plain data; the rounding itself is `runtime.quantization.external`'s business. Each lies along a token's channels, in
blocks within a head, and keeps beside its codes what `side_bits` counts: scales, and where there are some, offsets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Family = Literal[
    "ggml",
    "float8",
    "nvfp4",
    "fp4",
    "mlx",
    "exl3",
    "lmdeploy",
    "lmdeploy_turbo",
    "turboquant",
    "token_head",
    "ultraquant",
    "mxfp8",
]


Before = Literal["gguf order", "hadamard", "hadamard 64"]
"""gguf order: channels i and i + D/2, which rotary embedding turns together, stand side by side. hadamard: multiplied
with a Hadamard matrix of the largest power of two that divides the head; hadamard 64: with one of 64 channels each."""


@dataclass(frozen=True)
class ExternalFormat:
    """One format of another runtime.

    bits: of a code. block: channels that share a scale; 0 where all of a head do, 1 where there is none. side_bits:
    what a block stores beside its codes. family: whose quantizer rounds it. of_dtype: the model's dtype, where the
    runtime keeps what stands beside the codes in that; then there is a format for each. None: it is always the same.
    before: what the runtime does to a head first. word: what the runtime calls it, where one word stands for several
    formats.
    """

    name: str
    bits: int
    block: int
    side_bits: int
    family: Family
    of_dtype: str | None = None
    before: tuple[Before, ...] = ()
    word: str | None = None

    def suits(self, dtype: str | None) -> bool:
        """Whether a model of a dtype is stored so; of an unknown dtype, it may be."""
        return self.of_dtype is None or dtype is None or self.of_dtype == ("float32" if dtype == "float64" else dtype)

    @property
    def turns_heads(self) -> bool:
        """Whether a head is multiplied with a Hadamard matrix first, which there is for powers of two alone."""
        return self.name.startswith(("turbo_k", "lmdeploy_turbo", "ultraquant_k"))

    @property
    def heads(self) -> str:
        """Which heads can have it, in words."""
        if self.turns_heads:
            return "a power of two"
        multiple = 64 if any(step.startswith("hadamard") for step in self.before) else self.block
        return f"a multiple of {multiple} channels"

    def group_size(self, head_dim: int | None) -> int:
        """Return the channels that share a scale in heads of a dimension."""
        return self.block or head_dim or 1

    def fits(self, head_dim: int | None) -> bool:
        """Whether heads of a dimension can be cut into these blocks; of an unknown one, where blocks have a size."""
        if head_dim is None:
            return self.block > 0
        if any(step.startswith("hadamard") for step in self.before) and head_dim % 64:
            return False
        if self.turns_heads and head_dim & (head_dim - 1):
            return False
        return self.block == 0 or head_dim % self.block == 0


def _by_name(formats: Iterable[ExternalFormat]) -> dict[str, ExternalFormat]:
    return {form.name: form for form in formats}


# ggml's blocks of 32: a float16 scale, and in the types that end in _1 a float16 minimum (ggml-common.h of llama.cpp;
# q6_0 is ik_llama.cpp's alone).
GGML = _by_name(
    ExternalFormat(name, bits, 32, side_bits, "ggml")
    for name, bits, side_bits in (
        ("q8_0", 8, 16),
        ("q6_0", 6, 16),
        ("q5_1", 5, 32),
        ("q5_0", 5, 16),
        ("q4_1", 4, 32),
        ("q4_0", 4, 16),
        ("iq4_nl", 4, 16),
    )
)

# What llama.cpp stores under these words: keys and values turned first, and a Llama's keys in the order of its GGUF.
# ik_llama.cpp turns none by default.
_TURNED: tuple[tuple[str, tuple[Before, ...]], ...] = (
    ("_rot", ("hadamard",)),
    ("_rot64", ("hadamard 64",)),
    ("_gguf", ("gguf order",)),
    ("_rot_gguf", ("gguf order", "hadamard")),
)
GGML_TURNED = _by_name(
    ExternalFormat(form.name + suffix, form.bits, 32, form.side_bits, "ggml", None, before, form.name)
    for suffix, before in _TURNED
    for form in GGML.values()
)

# OCP's 8-bit floats; the one scale of a tensor, 1 unless a checkpoint brings it, costs nothing an element.
FLOAT8 = _by_name(ExternalFormat(name, 8, 1, 0, "float8") for name in ("fp8_e4m3", "fp8_e5m2"))

# 4-bit floats (e2m1) in blocks of 16 with a scale in e4m3.
NVFP4 = _by_name(ExternalFormat(name, 4, 16, 8, "nvfp4") for name in ("nvfp4", "nvfp4_4over6"))

# The same floats with a power of two as scale (SGLang's kvfp4_tensor.py): its name until 0.5.23, and since.
FP4 = _by_name(ExternalFormat(name, 4, 16, 8, "fp4") for name in ("fp4_e2m1", "fp4_mx_block16"))

# SGLang's 8-bit floats (e4m3) in blocks of 32 with a power of two as scale.
MXFP8 = _by_name([ExternalFormat("mxfp8", 8, 32, 8, "mxfp8")])

# vLLM: a float32 scale for every token and head; of 4 bits the zero point hides in its last bits.
TOKEN_HEAD = _by_name(
    ExternalFormat(f"{kind}_per_token_head", bits, 0, 32, "token_head")
    for kind, bits in (("int4", 4), ("int8", 8), ("fp8", 8))
)

# vLLM's UltraQuant: 4-bit floats in blocks of 32 with a power of two as scale; of keys, whole heads are rotated first.
ULTRAQUANT = _by_name(ExternalFormat(f"ultraquant_{side}4", 4, 32, 8, "ultraquant") for side in "kv")

_BY_DTYPE = (("float16", "", 16), ("bfloat16", "_bf16", 16), ("float32", "_f32", 32))
"""A model's dtype, what is added to a format's name for it, and the bits of a number."""

# MLX's affine quantization: a scale and a bias, of the model's dtype, for every group. It has 1 bit too, which gives
# back the ends of the range alone.
MLX = _by_name(
    ExternalFormat(f"mlx{bits}g{group}{suffix}", bits, group, 2 * width, "mlx", dtype, word=f"mlx{bits}g{group}")
    for dtype, suffix, width in _BY_DTYPE
    for bits in (2, 3, 4, 5, 6, 8)
    for group in (32, 64, 128)
)

# ExLlamaV3: groups of 32 channels, rotated, with a float16 scale.
EXL3 = _by_name(ExternalFormat(f"exl3_{bits}", bits, 32, 16, "exl3") for bits in range(2, 9))

# LMDeploy: a scale and a zero point, of the model's dtype, for every token and head.
LMDEPLOY = _by_name(
    ExternalFormat(f"lmdeploy_int{bits}{suffix}", bits, 0, 2 * width, "lmdeploy", dtype, word=f"lmdeploy_int{bits}")
    for dtype, suffix, width in _BY_DTYPE
    for bits in (4, 8)
)

# LMDeploy's TurboQuant, all rotated: keys with a scale and a mean residual, values with a scale, for a token and head.
LMDEPLOY_TURBO = _by_name(
    ExternalFormat(f"lmdeploy_turbo_{side}{suffix}", bits, 0, numbers * width, "lmdeploy_turbo", dtype)
    for dtype, suffix, width in _BY_DTYPE
    for side, bits, numbers in (("k4", 4, 2), ("v2", 2, 1))
)

# vLLM's TurboQuant: keys rotated, a float16 norm for every token and head; values with a scale and a zero point.
TURBOQUANT = _by_name(
    ExternalFormat(f"turbo_{side}{bits}", bits, 0, side_bits, "turboquant")
    for side, side_bits in (("k", 16), ("v", 32))
    for bits in (3, 4)
)

EXTERNAL: dict[str, ExternalFormat] = (
    GGML
    | GGML_TURNED
    | FLOAT8
    | NVFP4
    | FP4
    | MXFP8
    | TOKEN_HEAD
    | ULTRAQUANT
    | MLX
    | EXL3
    | LMDEPLOY
    | LMDEPLOY_TURBO
    | TURBOQUANT
)
"""Every format of another runtime, by name: in a plan, the `scheme` of a tensor."""
