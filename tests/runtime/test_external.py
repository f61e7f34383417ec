"""Other runtimes' formats come back as the runtimes themselves would give them back.

ggml's types are held bit for bit against the gguf package's reference quantizers where it has them; all else against
scalar references below, written from the runtimes' sources a number at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvprof.records.external_formats import EXTERNAL, GGML, LMDEPLOY, MLX
from kvprof.records.formats import format_named
from kvprof.runtime import fake_quantize

F32, F16 = np.float32, np.float16
RUNTIMES = Path(__file__).parents[1] / "data" / "runtimes"
"""What runtimes themselves gave, recorded by tests/targets/run.sh."""


def restored(name: str, rows: np.ndarray) -> np.ndarray:
    """Return what a format gives back of tokens of one head: (tokens, D)."""
    form = format_named(name, "key", rows.shape[-1])
    return fake_quantize(torch.from_numpy(rows)[None, None], form)[0, 0].numpy()


def awkward(head_dim: int) -> np.ndarray:
    """Return tokens that a quantizer could stumble on, and many that are random."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((400, head_dim)).astype(F32)
    rows *= np.exp2(generator.integers(-12, 12, (400, 1))).astype(F32)
    special = np.zeros((9, head_dim), dtype=F32)
    special[1] = 3.0
    special[2] = -0.25
    special[3, 5] = 1.0
    special[4] = np.arange(head_dim) % 16 - 8  # ties, and both ends of the range
    special[5] = np.where(np.arange(head_dim) % 2, 1.5, -1.5)  # two entries largest in magnitude
    special[6] = np.abs(rows[0])
    special[7] = -np.abs(rows[1])
    special[8] = 1e-30
    return np.concatenate([special, rows])


GGUF_HAS = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


@pytest.mark.parametrize("name", GGUF_HAS)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_ggml_types_are_the_gguf_packages_bit_for_bit(name: str, head_dim: int) -> None:
    rows = awkward(head_dim)
    kind = gguf.GGMLQuantizationType[name.upper()]
    expected = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)
    np.testing.assert_array_equal(restored(name, rows), expected)


FLOATS = st.floats(-1e4, 1e4, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)  # ggml divides by less in vain


@given(st.lists(FLOATS, min_size=32, max_size=32), st.sampled_from(GGUF_HAS))
@settings(max_examples=300, deadline=None)
def test_any_block_is_the_gguf_packages(block: list[float], name: str) -> None:
    rows, kind = np.array([block], dtype=F32), gguf.GGMLQuantizationType[name.upper()]
    expected = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)
    np.testing.assert_array_equal(restored(name, rows), expected)


def test_stored_bits_are_those_of_ggmls_blocks() -> None:
    for name in (*GGUF_HAS, "iq4_nl"):
        elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
        assert format_named(name, "key", 64).stored_bits(64) * elements == 8 * size
    assert {name: float(format_named(name, "value", 64).stored_bits(64)) for name in GGML} == {
        "q8_0": 8.5,
        "q6_0": 6.5,
        "q5_1": 6.0,
        "q5_0": 5.5,
        "q4_1": 5.0,
        "q4_0": 4.5,
        "iq4_nl": 4.5,
    }
    assert float(format_named("nvfp4", "key", 64).stored_bits(64)) == 4.5
    assert float(format_named("fp8_e4m3", "key", 64).stored_bits(64)) == 8


def largest_of(block: np.ndarray) -> np.float32:
    return block[int(np.argmax(np.abs(block)))]


def q6_0(block: np.ndarray) -> list[float]:
    """`quantize_row_q6_0_ref` of ik_llama.cpp: q5_0 with one bit more."""
    step = largest_of(block) / F32(-32)
    inverse = F32(0) if step == 0 else F32(1) / step
    codes = [min(63, int(F32(x * inverse) + F32(32.5))) for x in block]
    return [F32(code - 32) * F32(F16(step)) for code in codes]


LEVELS = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def best_index(x: float) -> int:
    """`best_index_int8` of ggml-quants.c."""
    if x <= LEVELS[0]:
        return 0
    if x >= LEVELS[15]:
        return 15
    low, high = 0, 15
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if x < LEVELS[middle] else (middle, high)
    return high - 1 if x - LEVELS[high - 1] < LEVELS[high] - x else high


def iq4_nl(block: np.ndarray) -> list[float]:
    """`quantize_row_iq4_nl_impl` of ggml-quants.c without weights, `ntry` -1."""
    largest = largest_of(block)
    first = largest / F32(LEVELS[0])
    inverse = F32(0) if first == 0 else F32(1) / first
    levels = [LEVELS[best_index(float(F32(x * inverse)))] for x in block]
    with_x = sum(float(x) ** 2 * level * float(x) for x, level in zip(block, levels, strict=True))
    with_itself = sum(float(x) ** 2 * level * level for x, level in zip(block, levels, strict=True))
    step = with_x / with_itself if with_itself > 0 else float(first)
    return [level * float(F16(step)) for level in levels]


def e4m3(x: float) -> float:
    """Round to 3 bits of mantissa, ties to even, exponents from -6, subnormals below, 448 at most."""
    if x == 0:
        return 0.0
    exponent = max(-6, math.frexp(abs(x))[1] - 1)
    step = 2.0 ** (exponent - 3)
    return math.copysign(min(448.0, round(abs(x) / step) * step), x)


def e5m2(x: float) -> float:
    if x == 0:
        return 0.0
    exponent = max(-14, math.frexp(abs(x))[1] - 1)
    step = 2.0 ** (exponent - 2)
    return math.copysign(min(57344.0, round(abs(x) / step) * step), x)


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e2m1(x: float) -> float:
    """The nearest of the eight magnitudes; of two as near, the one whose code is even."""
    code = min(range(8), key=lambda code: (abs(abs(x) - E2M1[code]), code % 2))
    return math.copysign(E2M1[code], x)


def nvfp4(block: np.ndarray) -> list[float]:
    step = F32(e4m3(float(max(F32(np.abs(block).max()) / F32(6), F32(2.0**-9)))))
    return [e2m1(float(x / step)) * float(step) for x in block]


def fp4_e2m1(block: np.ndarray) -> list[float]:
    """SGLang's kvfp4_tensor.py: a power of two as scale."""
    largest = float(np.abs(block).max())
    step = 2.0 ** math.ceil(math.log2(largest / 6)) if largest else 1.0
    return [e2m1(float(x) / step) * step for x in block]


def rounded_to(dtype: str, x: float) -> F32:
    return F32(torch.tensor(float(x)).to(getattr(torch, dtype)).item())


def mlx(bits: int, dtype: str) -> Callable[[np.ndarray], list[float]]:
    """`quantize` of mlx/backend/cpu/quantized.cpp, scale and bias in the model's dtype, and what they restore."""

    def rounded(block: np.ndarray) -> list[float]:
        low, high, top = block.min(), block.max(), F32(2**bits - 1)
        scale = max((high - low) / top, F32(1e-7))
        from_low = abs(low) > abs(high)
        scale, edge = (scale, low) if from_low else (-scale, high)
        steps, bias = np.rint(edge / scale), F32(0)
        if steps != 0:
            scale, bias = edge / steps, edge
        codes = [min(max(np.rint((x - bias) / scale), F32(0)), top) for x in block]
        scale, bias = rounded_to(dtype, scale), rounded_to(dtype, bias)
        return [float(rounded_to(dtype, rounded_to(dtype, code * scale) + bias)) for code in codes]

    return rounded


def lmdeploy(bits: int, dtype: str) -> Callable[[np.ndarray], list[float]]:
    """`_quant_int8` and `_quant_int4` of LMDeploy's fill_kv_cache.py, restored as its pagedattention.py does."""

    def rounded(block: np.ndarray) -> list[float]:
        low, high, top = block.min(), block.max(), 2**bits - 1
        scale = (high - low) / F32(top)
        if scale == 0:
            return [float(rounded_to(dtype, low))] * len(block)
        zero = -low / scale
        codes = [int(np.clip(F32(x / scale) + zero + F32(0.5), 0, top)) for x in block]
        zero, scale = rounded_to(dtype, zero), rounded_to(dtype, scale)
        return [float(rounded_to(dtype, rounded_to(dtype, code - zero) * scale)) for code in codes]

    return rounded


def fp4_mx_block16(block: np.ndarray) -> list[float]:
    """SGLang's kvfp4_tensor.py of 0.5.23: `abs >= bound` counts, so that a tie goes up."""
    step = 2.0 ** math.ceil(math.log2(max(float(np.abs(block).max()) / 6, 1e-10)))
    bounds = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    return [math.copysign(E2M1[sum(abs(float(x) / step) >= bound for bound in bounds)] * step, x) for x in block]


def mxfp8(block: np.ndarray) -> list[float]:
    """SGLang's mxfp8_quant_store_kv.py of 0.5.23."""
    step = 2.0 ** math.ceil(math.log2(max(float(np.abs(block).max()), 1e-30) / 448))
    return [e4m3(float(x) / step) * step for x in block]


def ultraquant(block: np.ndarray) -> list[float]:
    """vLLM's ultraquant/reference.py of 0.33.0, of values; `bucketize` leaves a tie with the lower level."""
    largest = float(np.abs(block).max())
    if largest == 0:
        return [0.0] * len(block)
    step = 2.0 ** math.floor(math.log2(F32(largest) * F32(0.156)) + 0.5)
    levels = sorted({*E2M1, *(-x for x in E2M1)})
    return [min(levels, key=lambda level: (abs(level - float(x) / step), level)) * step for x in block]


def nvfp4_4over6(block: np.ndarray) -> list[float]:
    tried = []
    for top in (6, 4):
        step = F32(e4m3(float(max(F32(np.abs(block).max()) / F32(top), F32(2.0**-9)))))
        tried.append([e2m1(float(x / step)) * float(step) for x in block])
    errors = [sum((F32(found) - x) ** 2 for found, x in zip(one, block, strict=True)) for one in tried]
    return tried[1] if errors[1] < errors[0] else tried[0]


def away(x: float) -> float:
    return math.copysign(math.floor(abs(x) + 0.5), x)


def per_token_head(kind: str) -> Callable[[np.ndarray], list[float]]:
    """`_reshape_cache_per_token_head` of vLLM 0.33.0."""
    top, rounds = (127, away) if kind == "int8" else (448, e4m3)

    def rounded(head: np.ndarray) -> list[float]:
        scale = max(np.abs(head).max() / F32(top), F32(1e-6))
        return [float(F32(rounds(float(x * (F32(1) / scale)))) * scale) for x in head]

    return rounded


def blockwise(reference: Callable[[np.ndarray], list[float]], rows: np.ndarray, size: int) -> np.ndarray:
    return np.array([[number for block in row.reshape(-1, size) for number in reference(block)] for row in rows])


EXACT: dict[str, tuple[Callable[[np.ndarray], list[float]], int]] = {
    "q6_0": (q6_0, 32),
    "fp8_e4m3": (lambda block: [e4m3(float(x)) for x in block], 1),
    "fp8_e5m2": (lambda block: [e5m2(float(x)) for x in block], 1),
    "nvfp4": (nvfp4, 16),
    "nvfp4_4over6": (nvfp4_4over6, 16),
    "fp4_e2m1": (fp4_e2m1, 16),
    "fp4_mx_block16": (fp4_mx_block16, 16),
    "mxfp8": (mxfp8, 32),
    "ultraquant_v4": (ultraquant, 32),
    "int8_per_token_head": (per_token_head("int8"), 64),
    "fp8_per_token_head": (per_token_head("fp8"), 64),
}


@pytest.mark.parametrize("name", EXACT)
def test_formats_are_their_references_to_the_last_bit(name: str) -> None:
    rows = awkward(64)
    reference, size = EXACT[name]
    np.testing.assert_array_equal(restored(name, rows), blockwise(reference, rows, size).astype(F32))


NEARLY = {"iq4_nl": (iq4_nl, 32)}
NEARLY |= {name: (mlx(form.bits, form.of_dtype), form.block) for name, form in MLX.items() if form.block == 64}
NEARLY |= {name: (lmdeploy(form.bits, form.of_dtype), 64) for name, form in LMDEPLOY.items()}


@pytest.mark.parametrize("name", NEARLY)
def test_formats_are_their_references_but_for_a_sums_last_bit_and_a_tie(name: str) -> None:
    rows = awkward(64)
    reference, size = NEARLY[name]
    found, expected = restored(name, rows), blockwise(reference, rows, size)
    scale = np.abs(rows).max(-1, keepdims=True) + 1e-30
    wrong = np.abs(found - expected) / scale > 1e-3
    assert wrong.mean() < 1e-3  # a sum in another order may round a scale, and so a tie, otherwise


def test_mlx_gives_back_what_mlx_itself_gave_back() -> None:
    """Recorded by tests/targets/seen/mlx_dequantized.py, in the three dtypes that a model can have."""
    suffixes = {"float16": "", "bfloat16": "_bf16", "float32": "_f32"}
    with np.load(RUNTIMES / "mlx_dequantized.npz") as seen:
        recorded = [name for name in seen if len(name.split()) == 3]
        assert len(recorded) == 24
        for name in recorded:
            dtype, bits, group_size = name.split()
            found = restored(f"mlx{bits}g{group_size}{suffixes[dtype]}", seen["tokens"])
            np.testing.assert_array_equal(found, seen[name], err_msg=name)


def test_scales_in_the_models_dtype_are_counted_and_felt() -> None:
    bits = {name: float(format_named(name, "key", 128).stored_bits(128)) for name in ("mlx4g64", "mlx4g64_bf16")}
    assert bits == {"mlx4g64": 4.5, "mlx4g64_bf16": 4.5}
    assert format_named("mlx4g64_f32", "key", 128).stored_bits(128) == 5
    assert format_named("lmdeploy_int8_f32", "key", 128).stored_bits(128) == 8.5
    rows = np.random.default_rng(1).standard_normal((200, 128)).astype(F32)

    def error(name: str) -> float:
        return float(np.sqrt(np.mean((restored(name, rows) - rows) ** 2)))

    assert error("lmdeploy_int8_bf16") / error("lmdeploy_int8") > 1.3
    assert 1.3 < error("mlx8g64_bf16") / error("mlx8g64") < 1.8
    assert error("mlx8g64_f32") < error("mlx8g64") * 1.001


def test_float8_is_torchs_and_saturates() -> None:
    rows = np.linspace(-440, 440, 64 * 500, dtype=F32).reshape(-1, 64)
    expected = torch.from_numpy(rows).to(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(restored("fp8_e4m3", rows), expected)
    assert restored("fp8_e4m3", np.full((1, 64), 1e5, dtype=F32)).max() == 448
    assert restored("fp8_e5m2", np.full((1, 64), -1e6, dtype=F32)).min() == -57344


@pytest.mark.parametrize("bits", range(2, 9))
def test_exllamav3_rounds_a_rotated_block_to_midpoints(bits: int) -> None:
    rows = awkward(64)[9:]
    hadamard = np.ones((1, 1))
    while len(hadamard) < 32:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    hadamard /= math.sqrt(32)
    half = 2 ** (bits - 1)
    turned = rows.astype(np.float64).reshape(len(rows), 2, 32) @ hadamard
    scale = np.abs(turned).max(-1, keepdims=True)
    codes = np.clip(np.floor(turned / scale * half + half), 0, 2 * half - 1)
    expected = ((codes - half + 0.5) / half * scale.astype(F16)) @ hadamard
    error = np.abs(restored(f"exl3_{bits}", rows) - expected.reshape(rows.shape))
    assert (error / np.abs(rows).max(-1, keepdims=True) > 2e-3).mean() < 2e-3


@pytest.mark.parametrize(("bits", "most"), [(3, 0.2), (4, 0.11)])
def test_turboquant_keeps_a_keys_norm_and_nearly_its_direction(bits: int, most: float) -> None:
    rows = awkward(128)[9:]
    found = restored(f"turbo_k{bits}", rows)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(rows, axis=1), rtol=1e-3)
    relative = np.linalg.norm(found - rows, axis=1) / np.linalg.norm(rows, axis=1)
    assert relative.mean() < most  # the root of Lloyd-Max's distortion for a normal: 0.186 at 3 bits, 0.097 at 4


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_int4_per_token_head_is_what_vllms_kernel_stores(head_dim: int) -> None:
    """`single_rht` and `_reshape_cache_int4_kernel` of vLLM 0.33.0's int4_per_token_head.py, in float64."""
    size = {64: 64, 80: 16, 128: 128}[head_dim]
    generator = torch.Generator().manual_seed(0x9E3779B9)
    signs = (2 * torch.bernoulli(torch.full((size,), 0.5), generator=generator) - 1).numpy()
    turn = scipy.linalg.hadamard(size) * signs
    rows = np.random.default_rng(3).standard_normal((100, head_dim)).astype(F32) + 0.5
    turned = (rows.astype(np.float64).reshape(100, -1, size) @ turn.T).reshape(100, head_dim)
    low, high = turned.min(-1, keepdims=True), turned.max(-1, keepdims=True)
    scale = (high - low) / 15
    zero = np.clip(np.floor(-low / scale + 0.5), 0, 15)
    codes = np.clip(np.floor(turned / scale + zero + 0.5), 0, 15)
    kept = (scale.astype(F32).view(np.int32) & -16).view(F32)  # the zero point takes the last four bits
    expected = (((codes - zero) * kept).reshape(100, -1, size) @ turn).reshape(100, head_dim) / size
    wrong = np.abs(restored("int4_per_token_head", rows) - expected) > 1e-4
    assert wrong.any(-1).mean() < 0.03  # a tie of float64 and float32
    assert format_named("int4_per_token_head", "key", 128).stored_bits(128) == 4.25
    assert format_named("int8_per_token_head", "key", 128).stored_bits(128) == 8.25


@pytest.mark.parametrize("head_dim", [64, 128, 192])
@pytest.mark.parametrize("suffix", ["_rot", "_rot64", "_gguf", "_rot_gguf"])
@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q5_1"])
def test_llama_cpp_turns_heads_and_has_a_ggufs_order(name: str, suffix: str, head_dim: int) -> None:
    """`build_input_k_rot` and `_v_rot` of llama-kv-cache.cpp, and `LlamaModel.permute` of convert_hf_to_gguf.py."""
    rows = awkward(head_dim)[9:60]
    order = np.arange(head_dim)
    if "gguf" in suffix:  # weights.reshape(n_head, 2, D // 2, ...).swapaxes(1, 2)
        order = order.reshape(2, head_dim // 2).swapaxes(0, 1).reshape(-1)
    width = 64
    if suffix != "_rot64":
        while head_dim % (2 * width) == 0:
            width *= 2
    turn = np.eye(width) if suffix == "_gguf" else scipy.linalg.hadamard(width) / math.sqrt(width)
    turned = (rows[:, order].astype(np.float64).reshape(len(rows), -1, width) @ turn).reshape(rows.shape).astype(F32)
    kind = gguf.GGMLQuantizationType[name.upper()]
    given = gguf.quants.dequantize(gguf.quants.quantize(turned, kind), kind)
    back = np.empty_like(rows)
    back[:, order] = (given.astype(np.float64).reshape(len(rows), -1, width) @ turn).reshape(rows.shape)
    wrong = np.abs(restored(name + suffix, rows) - back) > 1e-4 * np.abs(rows).max(-1, keepdims=True)
    assert wrong.any(-1).mean() < 0.1  # a tie of a sum in another order


@pytest.mark.parametrize(("bits", "least"), [(3, 0.4), (4, 0.3)])
def test_turboquant_loses_an_offset_that_channels_share(bits: int, least: float) -> None:
    """vLLM turns by a plain Hadamard matrix: the mean of all channels lands in one output, beyond every level."""
    rows = np.random.default_rng(2).standard_normal((200, 128)).astype(F32) * 0.3 + 1
    found = restored(f"turbo_k{bits}", rows)
    assert (np.linalg.norm(found - rows, axis=1) / np.linalg.norm(rows, axis=1)).mean() > least


def test_lmdeploys_turboquant_is_within_what_its_levels_allow() -> None:
    rows = awkward(128)[9:]
    for name, most in (("lmdeploy_turbo_k4", 0.15), ("lmdeploy_turbo_v2", 0.36)):
        relative = np.linalg.norm(restored(name, rows) - rows, axis=1) / np.linalg.norm(rows, axis=1)
        assert most / 2 < relative.mean() < most  # Lloyd-Max of a normal: 0.186 at 3 bits, 0.343 at 2


@pytest.mark.parametrize("bits", [3, 4])
def test_turboquant_values_are_within_half_a_step(bits: int) -> None:
    rows = awkward(64)[9:]
    step = (rows.max(-1) - rows.min(-1)) / (2**bits - 1)
    error = np.abs(restored(f"turbo_v{bits}", rows) - rows).max(-1)
    assert (error <= 0.5 * step * 1.01 + 2e-3 * np.abs(rows).max(-1)).all()


@pytest.mark.parametrize("name", EXTERNAL)
def test_a_token_comes_back_alike_in_whatever_company_and_zeros_as_zeros(name: str) -> None:
    x: Tensor = torch.randn(2, 3, 7, 128, generator=torch.Generator().manual_seed(0))
    form = format_named(name, "key", 128)
    whole = fake_quantize(x, form)
    assert whole.shape == x.shape
    alone = fake_quantize(x[1:, 2:, 3:4].contiguous(), form)
    # A product may be summed in another order.
    turned = "_rot" in name or name.startswith(("exl3", "turbo_k", "lmdeploy_turbo", "int4_per", "ultraquant_k"))
    torch.testing.assert_close(whole[1:, 2:, 3:4], alone, rtol=0, atol=3e-6 if turned else 0)
    zeros = fake_quantize(torch.zeros(1, 1, 2, 128), form)
    if name.startswith(("exl3", "lmdeploy_turbo")):  # which add a little to every scale
        assert zeros.abs().max() < 1e-4
    else:
        assert not zeros.any()
    for dtype in (torch.float16, torch.bfloat16):
        assert fake_quantize(x.to(dtype), form).dtype == dtype
