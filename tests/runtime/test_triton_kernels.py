"""Triton's kernels against plain torch, to the bit, and against attention in float64.

Without a GPU they run under Triton's interpreter: the same code, program by program.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from packed import (
    CODE_BITS,
    attended_64,
    every_form,
    filled,
    form_of,
    history,
    random_tokens,
    relative_error,
    same_block,
)
from torch import Tensor

from kvprof.records.formats import Format
from kvprof.records.plan import Quantizer, TensorPlan, Window
from kvprof.runtime.history import PAGE_TOKENS, CodeBlock, History, StoredTensor
from kvprof.runtime.kernels import torch_kernels

triton_kernels = pytest.importorskip("kvprof.runtime.kernels.triton_kernels")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BFLOAT = Quantizer(scale_dtype="bfloat16", zero_dtype="bfloat16")
TOLERANCE = 2e-3
"""Relative, of an output in float16. One in bfloat16 is itself cut at 2^-9, 2.0e-3."""


def tokens_for(form: Format, tokens: int) -> int:
    """At least so many tokens, in whole units."""
    unit = form.group_size if form.axis == "channel" else 1
    return -(-tokens // unit) * unit


def check_packing(form: Format, x: Tensor, quantizer: Quantizer) -> None:
    expected = torch_kernels.pack_tokens(x, form, quantizer)
    assert same_block(triton_kernels.pack_tokens(x, form, quantizer), expected)
    stored = as_stored(form, expected, x, quantizer)
    for dtype in {torch.float32, x.dtype}:
        plain, fused = (torch.full(x.shape, torch.nan, dtype=dtype, device=x.device) for _ in range(2))
        torch_kernels.unpack_tokens(stored, plain)
        triton_kernels.unpack_tokens(stored, fused)
        assert torch.equal(plain, fused)


def as_stored(form: Format, block: CodeBlock, x: Tensor, quantizer: Quantizer) -> StoredTensor:
    """A block by itself, as a tensor that holds it and nothing else."""
    store = filled(form_of("int4g32", "token", x.shape[3]), x[:, :, :1])
    stored = store.stored(x[:, :, :1])
    plan = TensorPlan(**form.model_dump(exclude={"recent_fraction"}))
    shape = (*x.shape[:2], x.shape[2] + 1, x.shape[3])
    return StoredTensor(plan, quantizer, (), (block,), stored.recent, shape, stored.addresses)


# ---- quantize and pack, unpack


@pytest.mark.parametrize("form", every_form(128), ids=lambda form: f"{form.name}-{form.axis}")
def test_packing_and_unpacking_give_the_bits_of_plain_torch(form: Format) -> None:
    dtype = (torch.float16, torch.bfloat16, torch.float32)[form.bits % 3]
    check_packing(form, random_tokens(1, 2, tokens_for(form, 19), 128, dtype, DEVICE), Quantizer())


@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
def test_heads_of_every_width_are_packed_alike(head_dim: int) -> None:
    for name, axis in (("int3g32", "channel"), ("int5g64c", "token"), ("int6g32", "token")):
        form = form_of(name, axis, head_dim)
        check_packing(form, random_tokens(2, 1, tokens_for(form, 21), head_dim, torch.bfloat16, DEVICE), BFLOAT)


def test_groups_of_any_length_are_packed_alike() -> None:
    form = Format(bits=4, group_size=48, axis="channel")
    check_packing(form, random_tokens(3, 1, 96, 64, torch.float16, DEVICE), Quantizer())


def test_keys_may_lie_anywhere_in_memory() -> None:
    x = random_tokens(2, 40, 3, 64, torch.float16, DEVICE).transpose(1, 2)  # (2, 3, 40, 64), as a model makes them
    for form in (form_of("int4g32", "token", 64), form_of("rot3", "token", 64)):
        assert same_block(
            triton_kernels.pack_tokens(x, form, Quantizer()),
            torch_kernels.pack_tokens(x.contiguous(), form, Quantizer()),
        )
    out = torch.zeros(2, 3, 100, 64, dtype=torch.float16, device=DEVICE)
    form = form_of("int4g32", "token", 64)
    block = torch_kernels.pack_tokens(x.contiguous(), form, Quantizer())
    triton_kernels.unpack_tokens(as_stored(form, block, x, Quantizer()), out[:, :, 7:47])
    expected = torch.zeros_like(out)
    torch_kernels.unpack_tokens(as_stored(form, block, x, Quantizer()), expected[:, :, 7:47])
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["int2g32", "int3g32c", "rot2"])
def test_hard_numbers_are_packed_alike(name: str) -> None:
    form = form_of(name, "token", 64)
    x = random_tokens(1, 1, 8, 64, torch.float32, DEVICE)
    x[0, 0, 0] = 0.0
    x[0, 0, 1] = 3.25  # a constant group
    x[0, 0, 2, ::2], x[0, 0, 2, 1::2] = 1.0, -1.0  # codes at the edge between two levels
    x[0, 0, 3] = torch.arange(64) / 2  # halves
    x[0, 0, 4] *= 1e6  # a range beyond float16
    x[0, 0, 5] *= 1e-30
    x[0, 0, 6, 5] = 65504.0
    x[0, 0, 7, :32] = torch.tensor([0.0, -0.0]).repeat(16)
    check_packing(form, x, Quantizer())


def test_what_is_no_number_is_not_hidden() -> None:
    x = random_tokens(1, 1, 4, 64, torch.float32, DEVICE)
    x[0, 0, 1, 3] = torch.nan
    form = form_of("int4g32", "token", 64)
    block = triton_kernels.pack_tokens(x, form, Quantizer())
    out = torch.zeros_like(x)
    triton_kernels.unpack_tokens(as_stored(form, block, x, Quantizer()), out)
    assert bool(out[0, 0, 1, :32].isnan().all())
    assert not bool(out[0, 0, [0, 2, 3]].isnan().any())


def test_pages_and_the_rest_behind_them_are_unpacked_in_one_launch() -> None:
    for name, axis in (("int2g64", "channel"), ("int3g32", "token"), ("rot1", "token")):
        x = random_tokens(1, 1, 2 * PAGE_TOKENS + 150, 32, torch.float16, DEVICE)
        store = filled(form_of(name, axis, 32), x)
        stored = store.stored(x[:, :, :1])
        assert [block.units for block in stored.coded][:2] == [PAGE_TOKENS // stored.unit_tokens] * 2
        plain, fused = (torch.full((1, 1, stored.coded_tokens, 32), torch.nan, device=DEVICE) for _ in range(2))
        torch_kernels.unpack_tokens(stored, plain)
        triton_kernels.unpack_tokens(stored, fused)
        assert torch.equal(plain, fused)


# ---- attend


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New memory is full of what is no number, so that what nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def check_attention(
    read: History,
    queries: int = 2,
    mask: Tensor | None = None,
    softcap: float | None = None,
    tolerance: float = TOLERANCE,
    size: float = 1.0,
) -> None:
    B, H, _, D = read.key.shape
    query = size * torch.randn(B, H * queries, 1, D, generator=torch.Generator().manual_seed(9))
    query = query.to(read.key.like.dtype).to(DEVICE)
    assert triton_kernels.why_not(query, read, mask) is None
    found = triton_kernels.attend(query, read, D**-0.5, mask, softcap)
    expected = attended_64(query, read, D**-0.5, mask, softcap)
    assert found.shape == expected.shape
    assert found.dtype == query.dtype
    assert relative_error(found, expected) < tolerance


PAIRS = list(itertools.product((*CODE_BITS, 16), repeat=2))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("key_bits", "value_bits"), PAIRS)
def test_attention_to_codes_is_attention_to_what_they_stand_for(key_bits: int, value_bits: int) -> None:
    number = PAIRS.index((key_bits, value_bits))
    group = (32, 64, 128)[number % 3]
    forms = []
    for bits, axis in ((key_bits, "channel"), (value_bits, "token")):
        name = "full" if bits == 16 else f"int{bits}g{group}"
        if number % 5 == 4 and bits <= 8:
            name = f"rot{bits}"
        forms.append(form_of(name, axis, 64))
    check_attention(history(*forms, T=group + 27 + number % 7, device=DEVICE, seed=number))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_heads_of_every_width_and_numbers_of_every_dtype(head_dim: int, dtype: torch.dtype) -> None:
    read = history(
        form_of("int3g32", "channel", head_dim),
        form_of("int2g32", "token", head_dim),
        T=61,
        key_D=head_dim,
        value_D=head_dim,
        dtype=dtype,
        device=DEVICE,
    )
    check_attention(read, tolerance={torch.float32: 1e-5, torch.float16: TOLERANCE, torch.bfloat16: 4e-3}[dtype])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("queries", [1, 3])
def test_padding_on_the_left_is_not_read(batch: int, queries: int) -> None:
    read = history(form_of("int4g32", "channel", 64), form_of("int2g64", "token", 64), B=batch, T=55, device=DEVICE)
    padding = torch.tensor([0, 3, 40])[:batch, None]
    mask = (torch.arange(56) >= padding).view(batch, 1, 1, 56).to(DEVICE)
    check_attention(read, queries, mask)
    check_attention(read, queries, torch.where(mask, 0.0, -1e4).half())
    check_attention(read, queries, mask[:1])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (("int4g32", "token"), ("int4g32", "channel")),  # each along the other's usual axis
        (("rot2", "token"), ("rot3", "token")),
        (("int2g128", "token"), ("int1g64c", "token")),
        (("full", "token"), ("rot4", "token")),
        (("rot6", "token"), ("full", "token")),
        (("full", "token"), ("full", "token")),
    ],
    ids=lambda pair: "-".join(pair),
)
def test_every_scheme_along_every_axis(key: tuple[str, str], value: tuple[str, str]) -> None:
    check_attention(history(form_of(*key, 64), form_of(*value, 64), H=2, T=85, device=DEVICE))


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 14, 15, 45, 46])
def test_a_history_of_any_length(tokens: int) -> None:
    """Nothing but sinks; sinks and a window; the first codes of values, then of keys."""
    check_attention(history(form_of("int4g32", "channel", 32), form_of("int4g32", "token", 32), T=tokens, key_D=32,
                            value_D=32, device=DEVICE))  # fmt: skip


@pytest.mark.parametrize("window", [Window(sink_tokens=0, recent_tokens=0), Window(sink_tokens=70, recent_tokens=90)])
def test_windows_and_sinks_of_any_length(window: Window) -> None:
    forms = form_of("int2g32", "channel", 32), form_of("int3g32", "token", 32)
    check_attention(history(*forms, T=210, key_D=32, value_D=32, device=DEVICE, window=window))


@pytest.mark.parametrize("late", ["key", "value"])
def test_a_tensor_that_keeps_more_of_the_past_in_full_precision(late: str) -> None:
    fractions = {"key": (0.5, 0.0), "value": (0.0, 0.5)}[late]
    forms = (
        form_of(*pair, 32, fraction)
        for pair, fraction in zip((("int2g32", "channel"), ("rot2", "token")), fractions, strict=True)
    )
    check_attention(history(*forms, T=150, key_D=32, value_D=32, device=DEVICE))


def test_pages_splits_and_the_rest_behind_them() -> None:
    """Two pages of codes and a third begun, in several splits; keys of 96 tokens a group have pages of another size."""
    for key in ("int2g64", "int2g96"):
        read = history(
            form_of(key, "channel", 32), form_of("int2g32", "token", 32), T=1200, key_D=32, value_D=32, device=DEVICE
        )
        check_attention(read)


def test_heads_of_keys_may_be_wider_than_those_of_values() -> None:
    forms = form_of("int4g32", "channel", 96), form_of("int4g64", "token", 64)
    check_attention(history(*forms, T=60, key_D=96, value_D=64, device=DEVICE))


def test_many_query_heads_share_a_head_of_keys() -> None:
    read = history(form_of("int4g32", "channel", 64), form_of("int4g64", "token", 64), T=60, device=DEVICE)
    check_attention(read, queries=33)


@pytest.mark.parametrize("softcap", [1.5, 30.0])
def test_scores_are_capped_where_the_model_caps_them(softcap: float) -> None:
    read = history(form_of("int4g32", "channel", 64), form_of("int4g64", "token", 64), T=60, device=DEVICE)
    check_attention(read, softcap=softcap, size=4.0)


def test_scales_beyond_float16() -> None:
    """Numbers above 65,504 need bfloat16 scales, whose products half precision does not hold."""
    forms = form_of("int4g32", "channel", 64), form_of("int4g64", "token", 64)
    tokens = random_tokens(1, 1, 61, 64, torch.float32, DEVICE) * 1e5
    read = History(*(filled(form, tokens[:, :, :60], quantizer=BFLOAT).stored(tokens[:, :, 60:]) for form in forms))
    check_attention(read, tolerance=1e-5, size=1e-6)


def test_small_values_keep_their_precision() -> None:
    forms = form_of("int4g32", "channel", 64), form_of("int4g64", "token", 64)
    tokens = random_tokens(1, 1, 91, 64, torch.float16, DEVICE)
    keys, values = (filled(form, (scale * tokens[:, :, :90]).half()).stored((scale * tokens[:, :, 90:]).half())
                    for form, scale in zip(forms, (1.0, 1e-3), strict=True))  # fmt: skip
    check_attention(History(keys, values))


@pytest.mark.parametrize("factor", [300.0, 3000.0])
def test_a_value_that_is_far_off_and_not_read_disturbs_no_other(factor: float) -> None:
    """In a group of values by channel it makes the scale so large that scale and zero all but cancel for the others."""
    forms = form_of("int4g32", "channel", 64), form_of("int8g32", "channel", 64)
    tokens = random_tokens(1, 1, 61, 64, torch.float16, DEVICE)
    far = tokens.clone()
    far[:, :, 20] *= factor
    read = History(
        *(filled(form, x[:, :, :60]).stored(x[:, :, 60:]) for form, x in zip(forms, (tokens, far), strict=True))
    )
    mask = torch.ones(1, 1, 1, 61, dtype=torch.bool, device=DEVICE)
    mask[..., 20] = False
    check_attention(read, mask=mask)


def test_what_the_kernels_do_not_take_is_said() -> None:
    query = torch.zeros(1, 2, 1, 64, dtype=torch.float16)
    usual = form_of("int4g32", "channel", 64), form_of("int4g64", "token", 64)

    def reason(*forms: TensorPlan, query: Tensor = query, mask: Tensor | None = None, **options: Any) -> str:
        found = triton_kernels.why_not(query, history(*(forms or usual), **options), mask)
        assert found is not None
        return str(found)

    assert "groups of 8" in reason(TensorPlan(bits=4, group_size=8, axis="channel"), usual[1])
    assert "12 channels" in reason(key_D=12, query=query[..., :12])
    assert "float64" in reason(dtype=torch.float64, query=query.double())
    assert "dtypes" in reason(query=query.float())
    assert "2 queries" in reason(query=query.expand(1, 2, 2, 64))
    assert "same for all heads" in reason(mask=torch.zeros(1, 2, 1, 91))
    assert "as many tokens" in reason(mask=torch.zeros(1, 1, 1, 90))
    wide = query.float().expand(1, 2, 1, 64)[:, :1].expand(1, 64, 1, 64)
    assert "64 float32 queries" not in (triton_kernels.why_not(wide, history(*usual, dtype=torch.float32), None) or "")
    assert "groups of 512" in reason(TensorPlan(bits=4, group_size=512, axis="channel"), usual[1])
    assert "65 query heads" in reason(query=query[:, :1].expand(1, 65, 1, 64))


def test_what_the_kernels_do_not_take_plain_torch_does() -> None:
    form = Format(bits=4, group_size=8, axis="channel")
    x = random_tokens(1, 1, 16, 12, torch.float16)
    assert same_block(triton_kernels.pack_tokens(x, form, Quantizer()), torch_kernels.pack_tokens(x, form, Quantizer()))
    plan = TensorPlan(**form.model_dump())
    read = history(plan, plan, T=40, key_D=12, value_D=12)
    query = torch.randn(1, 1, 1, 12).half()
    found = triton_kernels.attend(query, read, 0.3)
    assert relative_error(found, attended_64(query, read, 0.3)) < TOLERANCE
