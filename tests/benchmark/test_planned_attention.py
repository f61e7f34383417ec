"""The attention of a step: are its bytes those that caches hold, and does each layer's time count once?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from runtime.handplans import hand_plan, tensor_plan

from kvprof.benchmark import full_attention, planned_attention
from kvprof.benchmark.bench import Bench
from kvprof.benchmark.full_attention import full_bytes, time_full
from kvprof.benchmark.planned_attention import Kind, kinds_of, planned_bytes, time_planned
from kvprof.records.benchmark import Timing
from kvprof.records.plan import BitPlan
from kvprof.runtime.history import History
from kvprof.runtime.kernels.dispatch import kernels_named
from kvprof.runtime.layers import PlannedLayer

CPU = torch.device("cpu")
PAIRS = [("int2g4c", "rot2"), ("int3g8", "int4g8"), ("int2g4c", "rot2"), ("int4g4", "full"), ("int3g8", "int4g8")]


def plan(pairs: list[tuple[str, str]] = PAIRS, window: tuple[int, int] = (1, 5)) -> BitPlan:
    entries = [(tensor_plan(key, "channel", 16), tensor_plan(value, "token", 8)) for key, value in pairs]
    return hand_plan(entries, kv_heads=2, head_dims=(16, 8), window=window)


def bench(repeats: int = 2, cache_bytes: int = 4096) -> Bench:
    return Bench(
        CPU,
        torch.float32,
        kernels_named("torch", CPU),
        query_heads=4,
        cache_bytes=cache_bytes,
        copy_rate=1e9,
        repeats=repeats,
        seed=0,
    )


@pytest.mark.parametrize(("context", "batch"), [(3, 1), (37, 1), (64, 3)])
def test_bytes_are_those_of_every_tensor_that_the_layers_hold(context: int, batch: int) -> None:
    found = plan()
    held = 0
    for entry in found.layers:
        layer = PlannedLayer(found, entry, found.geometry.layers[entry.layer])
        layer.update(torch.randn(batch, 2, context, 16), torch.randn(batch, 2, context, 8))
        held += sum(tensor.numel() * tensor.element_size() for tensor in layer.tensors())
    assert planned_bytes(found, context, batch) == held == found.bytes_at(context, batch)
    assert full_bytes(found, context, batch, 2) == len(PAIRS) * batch * context * 2 * (16 + 8) * 2


def test_layers_of_the_same_formats_are_one_kind() -> None:
    assert [(kind.entry.layer, times) for kind, times in kinds_of(plan())] == [(0, 2), (1, 2), (3, 1)]


def test_a_step_takes_as_long_as_all_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer takes as many seconds as its key has bits: 2 + 3 + 2 + 4 + 3."""

    def timed(calls: list[Kind], device: torch.device, repeats: int) -> Timing:
        seconds = float(calls[0].entry.key.bits) if isinstance(calls[0], Kind) else 1.0  # else it appends tokens
        return Timing(median_seconds=seconds, fast_seconds=seconds / 2, slow_seconds=2 * seconds, repeats=repeats)

    monkeypatch.setattr(planned_attention, "_planned_call", lambda layer, kind, *_: kind)
    monkeypatch.setattr(planned_attention, "time_calls", timed)
    found, _ = time_planned(plan(), 40, 1, bench())
    assert found.timing.median_seconds == 14.0
    assert found.timing.fast_seconds == 7.0
    assert found.timing.slow_seconds == 28.0
    assert found.bytes_per_second == planned_bytes(plan(), 40, 1) / 14.0
    assert found.copy_fraction == found.bytes_per_second / 1e9


def test_a_call_attends_to_what_the_layer_holds_and_changes_nothing() -> None:
    found = plan([("full", "full")])
    kind = kinds_of(found)[0][0]
    layer = planned_attention._filled(found, kind, 20, 2, bench())
    output = planned_attention._planned_call(layer, kind, 2, bench(), 0)()
    assert layer.get_seq_length() == 20
    assert output.shape == (2, 4, 1, 8)
    new = [bench().random(2, heads, 1, width) for heads, width in ((4, 16), (2, 16), (2, 8))]
    keys, values = layer.update(*new[1:])
    expected = torch.nn.functional.scaled_dot_product_attention(new[0], keys, values, enable_gqa=True)
    torch.testing.assert_close(output, expected)
    assert layer.get_seq_length() == 21


def test_a_layer_is_filled_in_parts_with_as_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned_attention, "fill_tokens", lambda *_: 7)
    found = plan()
    for kind, _ in kinds_of(found):
        layer = planned_attention._filled(found, kind, 40, 2, bench())
        assert layer.get_seq_length() == 40
        held = sum(tensor.numel() * tensor.element_size() for tensor in layer.tensors())
        assert held == planned_attention._kind_bytes(kind, found, 40, 2)


def test_buffers_rotate_until_they_exceed_twice_the_cache() -> None:
    found, _ = time_planned(plan(), 40, 1, bench(cache_bytes=20_000))
    assert found.buffer_bytes > 40_000
    assert all(run.buffer_bytes > 40_000 for run in time_full(plan(), 40, 1, bench(cache_bytes=20_000)) if run.timing)


def test_appending_is_a_mean_over_whole_groups() -> None:
    _, cost = time_planned(plan(), 40, 1, bench(repeats=5))
    assert cost.seconds > 0
    assert cost.tokens == 8  # two groups of four


def test_a_way_that_does_not_run_has_a_reason_and_its_bytes() -> None:
    runs = time_full(plan(), 40, 1, bench())  # keys are wider than values, which flash kernels refuse
    assert {run.name for run in runs} == {"SDPA", "SDPA flash", "SDPA math"}
    refused = [run for run in runs if run.reason]
    assert {run.name for run in refused} <= {"SDPA flash"}
    assert all(run.bytes == full_bytes(plan(), 40, 1, 2 if run.dtype == "bfloat16" else 4) for run in runs)


def test_copies_for_every_query_head_are_left_out_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_attention, "free_bytes", lambda device: 100)
    reasons = {run.name: run.reason for run in time_full(plan(), 40, 1, bench())}
    assert "it repeats keys and values for every query head" in reasons["SDPA math"]
    assert reasons["SDPA"] is None


def test_layers_that_the_kernels_do_not_read_in_place_are_counted_and_said_why() -> None:
    def why_not(query: torch.Tensor, history: History, mask: torch.Tensor | None) -> str | None:
        return "keys of 2 bits" if history.key.form.bits == 2 else None

    picky = replace(bench(), kernels=replace(bench().kernels, why_not=why_not))
    assert time_planned(plan(), 40, 1, picky)[0].unpacked == "2 of 5 layers: keys of 2 bits"
    assert time_planned(plan(), 40, 1, bench())[0].unpacked is None


def test_fused_kernels_are_timed_as_they_read_codes_in_place() -> None:
    """By Triton's interpreter, where there is no GPU."""
    pytest.importorskip("triton")
    fused = replace(bench(repeats=1, cache_bytes=64), kernels=kernels_named("triton", CPU))
    entries = [(tensor_plan("int4g16", "channel", 16), tensor_plan("int2g16", "token", 16))]
    found, _ = time_planned(hand_plan(entries, kv_heads=2, head_dims=(16, 16), window=(1, 5)), 40, 1, fused)
    assert (found.name, found.unpacked) == ("PlanCache, triton", None)
    assert found.timing.median_seconds > 0
