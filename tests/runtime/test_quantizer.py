"""The rounding of both schemes, against integrals, published numbers, and NumPy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import FRACTIONS, asymmetric, between, rotated, rounded, squared_error
from scipy.integrate import quad
from scipy.stats import norm

from kvprof.records.formats import CODE_BITS, Format
from kvprof.records.plan import Quantizer
from kvprof.runtime.quantization.quantizer import decode, encode, fake_quantize
from kvprof.runtime.quantization.rotation import lloyd_max_levels

HEAD_DIM = 16
USUAL = Quantizer()
BFLOAT16 = Quantizer(scale_dtype="bfloat16", zero_dtype="bfloat16", rotation_seed=3)

PUBLISHED_LEVELS = {1: [0.7979], 2: [0.4528, 1.510], 3: [0.2451, 0.7560, 1.344, 2.152]}
"""The positive ones (Max 1960, table I)."""
PUBLISHED_DISTORTION = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
"""Mean squared error of a standard normal (Max 1960, table I)."""


def integer(bits: int, group_size: int = 8, axis: str = "token", clip: str = "none") -> Format:
    return Format.model_validate({"bits": bits, "group_size": group_size, "axis": axis, "clip": clip})


def rotation(bits: int, head_dim: int = HEAD_DIM) -> Format:
    return Format(scheme="rotated", bits=bits, group_size=head_dim, axis="token")


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers, some channels far larger and off centre, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    gain = torch.randn(shape[-1], generator=generator, dtype=torch.float64).exp()
    shift = torch.randn(shape[-1], generator=generator, dtype=torch.float64) * 4
    return (x * gain + shift).to(dtype)


ASYMMETRIC = [
    integer(bits, group_size, axis, clip)
    for bits, (axis, group_size), clip in itertools.product(
        CODE_BITS,
        [("token", 8), ("token", 5), ("token", 16), ("token", 32), ("channel", 4), ("channel", 24)],
        ("none", "mse"),
    )
]
EVERY = [*ASYMMETRIC, *(rotation(bits) for bits in CODE_BITS)]


def name_of(form: Format) -> str:
    return f"{form.name}-{form.axis}"


# ---- the levels of the rotated scheme


@pytest.mark.parametrize("bits", CODE_BITS)
def test_each_level_is_the_mean_of_the_normal_in_its_cell(bits: int) -> None:
    levels = lloyd_max_levels(bits).numpy()
    assert len(levels) == 2**bits
    assert (np.diff(levels) > 0).all()
    assert levels == pytest.approx(-levels[::-1], abs=0)
    edges = [-math.inf, *((levels[1:] + levels[:-1]) / 2), math.inf]
    for level, (low, high) in zip(levels, itertools.pairwise(edges), strict=True):
        mass, _ = quad(norm.pdf, low, high, epsabs=0, epsrel=1e-11)
        moment, _ = quad(lambda x: x * norm.pdf(x), low, high, epsabs=1e-15, epsrel=1e-11)
        assert level == pytest.approx(moment / mass, rel=1e-8)


@pytest.mark.parametrize("bits", PUBLISHED_LEVELS)
def test_levels_are_the_published_ones(bits: int) -> None:
    assert lloyd_max_levels(bits)[2 ** (bits - 1) :].tolist() == pytest.approx(PUBLISHED_LEVELS[bits], abs=5e-4)


def test_two_bit_levels_to_four_places() -> None:
    assert [round(level, 4) for level in lloyd_max_levels(2).tolist()] == [-1.5104, -0.4528, 0.4528, 1.5104]


@pytest.mark.parametrize("bits", PUBLISHED_DISTORTION)
def test_levels_distort_a_normal_as_published(bits: int) -> None:
    levels = lloyd_max_levels(bits).numpy()
    edges = [-math.inf, *((levels[1:] + levels[:-1]) / 2), math.inf]
    distortion = sum(
        quad(lambda x, level=level: (x - level) ** 2 * norm.pdf(x), low, high, epsabs=1e-12)[0]
        for level, (low, high) in zip(levels, itertools.pairwise(edges), strict=True)
    )
    assert distortion == pytest.approx(PUBLISHED_DISTORTION[bits], rel=5e-4)


@pytest.mark.parametrize("bits", PUBLISHED_DISTORTION)
def test_rotated_numbers_of_a_normal_are_distorted_as_published(bits: int) -> None:
    x = torch.randn(1, 4, 2000, 128, generator=torch.Generator().manual_seed(0))
    error = (fake_quantize(x, rotation(bits, 128)) - x).square().mean() / x.square().mean()
    assert float(error) == pytest.approx(PUBLISHED_DISTORTION[bits], rel=0.03)


# ---- against NumPy


@pytest.mark.parametrize("quantizer", [USUAL, BFLOAT16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("form", ASYMMETRIC, ids=name_of)
def test_asymmetric_is_the_reference_bit_for_bit_in_float64(form: Format, quantizer: Quantizer) -> None:
    x = numbers(2, 3, 48, HEAD_DIM, dtype=torch.float64)
    assert np.array_equal(fake_quantize(x, form, quantizer).numpy(), rounded(x.numpy(), form, quantizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ASYMMETRIC, ids=name_of)
def test_asymmetric_is_the_reference_in_narrower_dtypes(form: Format, dtype: torch.dtype) -> None:
    x = numbers(2, 2, 48, HEAD_DIM, dtype=dtype)
    expected = torch.from_numpy(rounded(x.float().numpy(), form, USUAL)).to(dtype)
    found = fake_quantize(x, form)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("form", [form for form in ASYMMETRIC if form.clip == "none"], ids=name_of)
def test_float32_arithmetic_departs_from_float64_only_where_a_number_lies_between_two_codes(form: Format) -> None:
    x = numbers(2, 2, 48, HEAD_DIM)
    found, exact = fake_quantize(x, form).numpy(), rounded(x.numpy().astype(np.float64), form, USUAL)
    differ = ~np.isclose(found, exact, rtol=1e-5, atol=1e-6)
    assert differ.mean() < 1e-3
    assert (np.abs(found - x.numpy())[differ] <= np.abs(exact - x.numpy())[differ] * (1 + 1e-3)).all()


@pytest.mark.parametrize("quantizer", [USUAL, BFLOAT16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("head_dim", [1, 2, 64, 256])
def test_rotated_is_the_reference(head_dim: int, bits: int, dtype: torch.dtype, quantizer: Quantizer) -> None:
    form, x = rotation(bits, head_dim), numbers(2, 2, 20, head_dim, dtype=dtype)
    expected, codes = rotated(x.double().numpy(), bits, quantizer)
    encoded = encode(x, form, quantizer)
    assert np.array_equal(encoded.codes.squeeze(3).numpy(), codes)
    assert encoded.scale.dtype == getattr(torch, quantizer.scale_dtype)
    assert encoded.zero is None
    found = fake_quantize(x, form, quantizer)
    assert found.dtype == dtype
    rms = np.sqrt(np.square(expected).mean(-1, keepdims=True))
    # Levels are rounded to 13 places behind the point at 256 channels, to more at fewer.
    slack = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 3e-4 if head_dim == 256 else 1e-4)
    assert (np.abs(found.double().numpy() - expected) <= slack * (np.abs(expected) + rms)).all()


def test_another_seed_draws_other_signs() -> None:
    x = numbers(1, 1, 4, 64)
    assert not torch.equal(
        fake_quantize(x, rotation(2, 64), Quantizer(rotation_seed=0)),
        fake_quantize(x, rotation(2, 64), Quantizer(rotation_seed=1)),
    )


def test_full_precision_is_left_as_it_is() -> None:
    x = numbers(1, 2, 7, HEAD_DIM)
    assert torch.equal(fake_quantize(x, Format(bits=16, group_size=32, axis="channel")), x)


@settings(max_examples=150, deadline=None)
@given(
    bits=st.sampled_from(CODE_BITS),
    group_size=st.integers(1, 20),
    channel=st.booleans(),
    head_dim=st.integers(1, 24),
    clip=st.booleans(),
    exponent=st.integers(-30, 30),
    shift=st.floats(-1e3, 1e3),
    seed=st.integers(0, 2**32),
)
def test_asymmetric_is_the_reference_at_every_size_and_shape(
    bits: int, group_size: int, channel: bool, head_dim: int, clip: bool, exponent: int, shift: float, seed: int
) -> None:
    form = integer(bits, group_size, "channel" if channel else "token", "mse" if clip else "none")
    x = torch.randn(2, 2, 2 * group_size, head_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = (x + shift) * 2.0**exponent
    found, expected = fake_quantize(x, form).numpy(), rounded(x.numpy(), form, USUAL)
    if clip:  # two fractions may come within a rounding of each other: then either is right
        size = np.square(x.numpy()).sum()
        assert np.square(found - x.numpy()).sum() == pytest.approx(
            np.square(expected - x.numpy()).sum(), rel=1e-9, abs=1e-18 * size
        )
    else:
        assert np.array_equal(found, expected)


# ---- numbers at the edges


@pytest.mark.parametrize("form", ASYMMETRIC, ids=name_of)
def test_a_constant_group_comes_back_as_its_stored_zero(form: Format) -> None:
    for constant in (0.0, -0.3, 1 / 3, 6e-8, 1e-12, -70000.0, 65519.0, 1e30):
        x = torch.full((1, 2, 48, HEAD_DIM), constant)
        stored = torch.tensor(constant).clamp(-65504, 65504).to(torch.float16).float()
        assert torch.equal(fake_quantize(x, form), stored.expand_as(x))


@pytest.mark.parametrize("form", EVERY, ids=name_of)
def test_no_size_of_number_breaks_the_rounding(form: Format) -> None:
    for size in (1e-38, 1e-9, 2e-7, 3e-5, 65504.0, 1e6, 1e30):
        x = numbers(1, 2, 48, HEAD_DIM) * size
        found = fake_quantize(x, form)
        assert bool(found.isfinite().all())
        expected = rounded(x.numpy(), form, USUAL)
        room = 1e-4 if form.scheme == "rotated" else 0.0
        assert np.abs(found.numpy() - expected).max() <= room * np.abs(expected).max()


@pytest.mark.parametrize("form", EVERY, ids=name_of)
def test_zeros_come_back_as_zeros(form: Format) -> None:
    x = torch.zeros(1, 1, 48, HEAD_DIM)
    assert torch.equal(fake_quantize(x, form), x)


@pytest.mark.parametrize("bits", CODE_BITS)
def test_an_error_is_at_most_half_a_step_and_what_float16_costs(bits: int) -> None:
    x = torch.rand(2, 2, 40, HEAD_DIM, generator=torch.Generator().manual_seed(1)) - 0.5
    step = 1 / (2**bits - 1)
    error = (fake_quantize(x, integer(bits)) - x).abs().max()
    assert float(error) <= step / 2 + 2**-11 * (0.5 + 1)


# ---- clipping


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize(("axis", "group_size"), [("token", 8), ("token", 7), ("channel", 16)])
def test_clip_takes_the_best_of_the_nine_fractions(bits: int, axis: str, group_size: int) -> None:
    x = numbers(1, 3, 48, HEAD_DIM, seed=bits, dtype=torch.float64)
    x[:, 0, 5] *= 20  # outliers, for which clipping pays
    form = integer(bits, group_size, axis, "mse")
    found = fake_quantize(x, form).numpy()
    for groups, restored in zip(groups_of(x.numpy(), form), groups_of(found, form), strict=True):
        low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
        middle, reach = (low + high) / 2, (high - low) / 2
        errors = [
            squared_error(between(groups, middle - f * reach, middle + f * reach, bits, USUAL)[0], groups)
            for f in FRACTIONS
        ]
        assert squared_error(restored, groups) == pytest.approx(np.min(errors, axis=0), rel=1e-9, abs=1e-18)
        plain, _ = asymmetric(groups, integer(bits, group_size, axis), USUAL)
        assert (squared_error(restored, groups) <= squared_error(plain, groups) * (1 + 1e-12)).all()


def groups_of(x: np.ndarray, form: Format) -> Iterator[np.ndarray]:
    """Yield arrays whose last axis is a group."""
    if form.axis == "channel":
        yield x.reshape(*x.shape[:2], -1, form.group_size, x.shape[3]).swapaxes(-1, -2)
    else:
        yield from np.split(x, range(form.group_size, x.shape[-1], form.group_size), axis=-1)


def test_clipping_pays_where_one_number_stands_out() -> None:
    x = torch.cat([torch.linspace(-1, 1, 31), torch.tensor([3.0])]).view(1, 1, 1, 32)
    plain = (fake_quantize(x, integer(2, 32)) - x).square().sum()
    assert float((fake_quantize(x, integer(2, 32, clip="mse")) - x).square().sum()) < 0.9 * float(plain)


# ---- what a token becomes depends on its own group alone


@pytest.mark.parametrize("form", EVERY, ids=name_of)
def test_a_head_or_a_sequence_changes_no_other(form: Format) -> None:
    x = numbers(3, 4, 48, HEAD_DIM)
    other = x.clone()
    other[1, 2] = numbers(48, HEAD_DIM, seed=9) * 100
    before, after = fake_quantize(x, form), fake_quantize(other, form)
    untouched = torch.ones(3, 4, dtype=torch.bool)
    untouched[1, 2] = False
    assert torch.equal(before[untouched], after[untouched])


@pytest.mark.parametrize("form", EVERY, ids=name_of)
def test_a_token_changes_none_outside_its_group(form: Format) -> None:
    x = numbers(1, 2, 48, HEAD_DIM)
    other = x.clone()
    other[0, 0, 25, 3] += 50
    changed = (fake_quantize(x, form) != fake_quantize(other, form)).nonzero()
    size, token = form.unit_tokens, 25
    assert set(changed[:, 1].tolist()) <= {0}
    assert set(changed[:, 2].tolist()) <= set(range(token // size * size, token // size * size + size))
    if form.scheme == "asymmetric":
        low = 3 // form.group_size * form.group_size if form.axis == "token" else 3
        high = low + form.group_size if form.axis == "token" else 4
        assert set(changed[:, 3].tolist()) <= set(range(low, high))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [1, 8, 64, 128])
@pytest.mark.parametrize("name", ["int1", "int3c", "int2c-channel", "int5-channel", "rot1", "rot2", "rot3", "rot8"])
def test_encoding_at_once_or_unit_by_unit_gives_the_same_bits(name: str, head_dim: int, dtype: torch.dtype) -> None:
    bits = int(name[3])
    axis, clip = "channel" if "channel" in name else "token", "mse" if "c" in name[4:5] else "none"
    form = rotation(bits, head_dim) if name.startswith("rot") else integer(bits, 32, axis, clip)
    tokens = 32 * 5
    x = numbers(2, 3, tokens, head_dim, dtype=dtype)
    whole, decoded = encode(x, form), fake_quantize(x, form)
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)  # as a model brings them
    for pieces in (torch.split(x, form.unit_tokens, 2), torch.split(transposed, 32, 2), [transposed]):
        parts = [encode(piece, form) for piece in pieces]
        assert torch.equal(torch.cat([part.codes for part in parts], 2), whole.codes)
        assert torch.equal(torch.cat([part.scale for part in parts], 2), whole.scale)
        if whole.zero is not None:
            assert torch.equal(torch.cat([part.zero for part in parts if part.zero is not None], 2), whole.zero)
        first = 0
        out = torch.empty(2, 3, tokens + 3, head_dim, dtype=dtype)[:, :, 3:]
        for part in parts:
            last = first + part.codes.shape[2] * part.codes.shape[3]
            decode(part, form, USUAL, out[:, :, first:last])
            first = last
        assert torch.equal(out, decoded)
    for row, head in itertools.product(range(2), range(3)):
        assert torch.equal(
            fake_quantize(x[row : row + 1, head : head + 1], form), decoded[row : row + 1, head : head + 1]
        )


@pytest.mark.parametrize("form", EVERY, ids=name_of)
def test_the_input_is_not_written_to(form: Format) -> None:
    x = numbers(1, 2, 48, HEAD_DIM)
    before = x.clone()
    fake_quantize(x, form)
    assert torch.equal(x, before)


@pytest.mark.parametrize("form", EVERY, ids=name_of)
def test_numbers_that_ask_for_a_gradient_are_rounded_without_one(form: Format) -> None:
    x = numbers(1, 2, 48, HEAD_DIM)
    with torch.inference_mode():  # what is computed once may be computed here
        expected = fake_quantize(x, form).clone()
    found = fake_quantize(x.requires_grad_(), form)
    assert not found.requires_grad
    assert torch.equal(found, expected)
