"""Numbers at the edges of what float16, bfloat16 and float32 hold, in every format: right, saturated or refused."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from handplans import hand_cache, hand_plan, tensor_plan
from reference import rounded
from torch import Tensor

from kvprof.errors import BeyondFormat
from kvprof.records.external_formats import EXTERNAL
from kvprof.records.formats import CODE_BITS, Format, format_named
from kvprof.records.plan import Quantizer
from kvprof.runtime.quantization.quantizer import fake_quantize

HEAD_DIM, TOKENS = 128, 32
SIZES = (
    0.0,
    5e-324,
    1e-45,
    1e-40,
    1e-38,
    1e-30,
    1e-20,
    1e-10,
    1e-6,
    1.0,
    6e4,
    65504.0,
    1e5,
    1e7,
    1e10,
    1e20,
    1e38,
    3e38,
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OWN = [Format(bits=bits, group_size=16, axis=axis, clip=clip) for bits in CODE_BITS for axis, clip in
       (("channel", "none"), ("token", "none"), ("channel", "mse"))]  # fmt: skip
OWN += [Format(scheme="rotated", bits=bits, group_size=HEAD_DIM, axis="token") for bits in CODE_BITS]
QUANTIZERS = {dtype: Quantizer(scale_dtype=dtype, zero_dtype=dtype) for dtype in ("float16", "bfloat16")}


def name_of(form: Format) -> str:
    return f"{form.name}-{form.axis}"


def sized(size: float, dtype: torch.dtype) -> Tensor | None:
    """Return numbers of which the largest has this size, some groups constant and one number apart; None if too large.

    Of a size below a dtype's least number, all are zero.
    """
    if size > torch.finfo(dtype).max:
        return None
    x = torch.randn(1, 2, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = x / x.abs().max()
    x[0, 0, 3] = -1.0
    x[0, 1, 16:, 5] = 0.7
    x[0, 0, 9] = 0.0
    x[0, 0, 9, 77] = 1.0
    x = (x * size).to(dtype)
    return x if bool(x.isfinite().all()) else None


# ---- kvprof's own formats


@pytest.mark.parametrize("stored_in", QUANTIZERS)
@pytest.mark.parametrize("form", OWN, ids=name_of)
def test_every_size_of_number_comes_back_finite(form: Format, stored_in: str) -> None:
    """And never further from what it was than twice the largest: a saturated scale shrinks numbers."""
    quantizer = QUANTIZERS[stored_in]
    for size in SIZES:
        for dtype in DTYPES:
            if (x := sized(size, dtype)) is not None:
                found = fake_quantize(x, form, quantizer)
                assert bool(found.isfinite().all()), (size, dtype)
                off = (found.double() / 4 - x.double() / 4).abs().max() * 4
                assert float(off) <= 2.5 * float(x.double().abs().max()) + 1e-7, (size, dtype)


@pytest.mark.parametrize("form", [form for form in OWN if form.scheme == "asymmetric"], ids=name_of)
def test_within_the_range_of_a_scale_an_error_is_half_a_step_at_every_size(form: Format) -> None:
    """With bfloat16, over 70 orders of magnitude. The rounding of scale and zero comes to it: 2^-8 of either."""
    top = 2**form.bits - 1
    for size in (1e-33, 1e-20, 1e-10, 1.0, 1e10, 1e20, 4e37):
        x = sized(size, torch.float32)
        assert x is not None
        error = float((fake_quantize(x, form, QUANTIZERS["bfloat16"]) - x).abs().max())
        half_step = (2 if form.clip == "none" else 2.8) * size / top / 2  # a clipped end is off by its own share
        clipped = 0.0 if form.clip == "none" else 0.4 * size
        assert error <= half_step + clipped + size * 2**-8 * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", OWN, ids=name_of)
def test_the_largest_numbers_of_a_dtype_do_not_round_to_infinity(form: Format, dtype: torch.dtype) -> None:
    """The uppermost code may stand for a little more than the largest number that it was made of."""
    largest = min(65504.0, torch.finfo(dtype).max)
    x = torch.full((1, 1, TOKENS, HEAD_DIM), largest, dtype=dtype)
    x[:, :, ::2, ::3] *= -1
    x[:, :, 1::4, 1::5] = 1.0
    for quantizer in QUANTIZERS.values():
        assert bool(fake_quantize(x, form, quantizer).isfinite().all())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("form", OWN, ids=name_of)
def test_what_is_not_finite_makes_its_group_none_and_no_other(form: Format, bad: float) -> None:
    x = torch.randn(1, 2, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(4))
    exact = fake_quantize(x, form)
    x[0, 1, 5, 40] = bad
    found = fake_quantize(x, form)
    mine = torch.zeros_like(x, dtype=torch.bool)
    if form.axis == "channel":
        mine[0, 1, :16, 40] = True
    else:
        mine[0, 1, 5, :] = form.scheme == "rotated"
        mine[0, 1, 5, 32:48] = True
    assert bool(found[mine].isnan().all())
    assert torch.equal(found[~mine], exact[~mine])


@pytest.mark.parametrize("stored_in", QUANTIZERS)
@pytest.mark.parametrize("form", [form for form in OWN if form.scheme == "asymmetric"], ids=name_of)
def test_denormals_are_the_reference_s(form: Format, stored_in: str) -> None:
    for size in (1e-45, 1e-41, 1e-38, 6e-8, 1e-5):
        x = sized(size, torch.float32)
        assert x is not None
        expected = rounded(x.numpy(), form, QUANTIZERS[stored_in])
        np.testing.assert_array_equal(fake_quantize(x, form, QUANTIZERS[stored_in]).numpy(), expected)


@pytest.mark.parametrize("bits", CODE_BITS)
def test_a_head_of_one_channel_is_kept_to_the_rounding_of_its_scale(bits: int) -> None:
    x = torch.tensor([0.0, -3.0, 1e-3, 65504.0, -65504.0, 12345.678]).view(1, 1, -1, 1)
    by_token = fake_quantize(x, Format(bits=bits, group_size=1, axis="token"))
    assert torch.equal(by_token, x.half().float())  # a group of one is constant
    turned = fake_quantize(x, Format(scheme="rotated", bits=bits, group_size=1, axis="token"))
    assert bool((turned.sign() == x.sign()).all())


# ---- other runtimes' formats


TURNING = re.compile(r"^exl3|_rot|turbo")
WIDE_SCALES = re.compile(r"^(fp8|nvfp4|fp4|mxfp8|ultraquant)|_(per_token_head|bf16|f32)$")
"""Formats whose scales hold what float32 does, saturate, or are none at all."""


@pytest.mark.parametrize("name", EXTERNAL)
def test_another_runtime_s_format_gives_back_what_it_can_and_refuses_the_rest(name: str) -> None:
    form = format_named(name, "value" if name.startswith("turbo_v") else "key", HEAD_DIM)
    # A rotation turns a constant into one entry as large as the vector is long, with no level for the zeros beside it.
    widest, least = (math.sqrt(HEAD_DIM), 1e-5) if TURNING.search(name) else (1.1, 1e-6)
    least = 1e-4 if name.startswith("lmdeploy_turbo") else least  # which it adds to a norm
    refused = []
    for size in SIZES:
        for dtype in DTYPES:
            if (x := sized(size, dtype)) is None:
                continue
            try:
                found = fake_quantize(x, form)
            except BeyondFormat:
                refused.append(size)
                continue
            assert found.dtype == dtype
            assert bool(found.isfinite().all()), (size, dtype)
            off = float((found.double() - x.double()).abs().max())
            assert off <= widest * float(x.double().abs().max()) + least, (size, dtype)
    assert min(refused, default=math.inf) >= 6e4  # nothing that float16 holds is refused, but for a product's overflow
    if not WIDE_SCALES.search(name):
        assert {1e10, 1e20, 1e38} <= set(refused)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["q4_0", "q8_0", "iq4_nl", "mlx4g64", "exl3_4", "lmdeploy_int8", "turbo_k3"])
def test_a_number_that_is_none_is_not_blamed_on_the_format(name: str, bad: float) -> None:
    x = torch.ones(1, 1, 2, HEAD_DIM)
    x[0, 0, 0, 0] = bad
    with pytest.raises(BeyondFormat, match="NaN or infinity: the model itself"):
        fake_quantize(x, format_named(name, "key", HEAD_DIM))


def test_the_refusal_says_the_number_the_format_and_what_to_do() -> None:
    x = torch.full((1, 1, 1, 32), 3e6)
    with pytest.raises(BeyondFormat, match=r"3e\+06 are beyond q4_0: .*65504(.|\n)*another format(.|\n)*16 bits"):
        fake_quantize(x, format_named("q4_0", "key", 32))


# ---- the cache


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("names", [("int3g16", "rot2"), ("int2g32c", "int4g32"), ("int8g16", "rot4")])
def test_a_cache_at_the_edge_of_overflow_gives_finite_numbers(names: tuple[str, str], dtype: torch.dtype) -> None:
    plan = hand_plan(
        [(tensor_plan(names[0], "channel", HEAD_DIM), tensor_plan(names[1], "token", HEAD_DIM))],
        kv_heads=2,
        head_dims=(HEAD_DIM, HEAD_DIM),
        window=(1, 4),
        dtype=str(dtype).removeprefix("torch."),
    )
    cache = hand_cache(plan)
    for size in (0.0, 1e-7, 1.0, 6e4, 65504.0):
        x = sized(size, dtype)
        assert x is not None
        for piece in torch.split(x, 5, dim=2):
            keys, values = cache.update(piece, piece, 0)
            assert bool(keys.isfinite().all() and values.isfinite().all())
    assert cache.nbytes() == plan.bytes_at(5 * TOKENS)


def test_constant_keys_and_values_come_back_exactly_from_a_cache() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        plan = hand_plan(
            [(tensor_plan("int2g8", "channel", 8), tensor_plan("int1g8", "token", 8))],
            kv_heads=1,
            head_dims=(8, 8),
            dtype=str(dtype).removeprefix("torch."),
        )
        cache = hand_cache(plan)
        x = torch.full((1, 1, 40, 8), 0.375, dtype=dtype)
        cache.update(x, -x, 0)
        keys, values = cache.update(x[:, :, :1], -x[:, :, :1], 0)
        assert torch.equal(keys, torch.full_like(keys, 0.375))
        assert torch.equal(values, torch.full_like(values, -0.375))
