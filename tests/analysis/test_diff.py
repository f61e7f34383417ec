"""Two plans side by side, against counts by hand and the plans' own bytes."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from score_factories import FORMATS, geometry_json, plan_of, scores_of

from kvprof import BitPlan
from kvprof.analysis.diff import compare
from kvprof.errors import InvalidFile, Mismatch
from kvprof.records.geometry import CONTEXTS
from kvprof.records.plan import TensorPlan

PAIR = ("int3g64", "rot2")
HANDFUL = [
    {
        "key": {"int3g64": [0.01, 0.03], "int2g64": [0.05, 0.05]},
        "value": {"rot2": [0.02, 0.04], "rot3": [0.01, 0.01]},
    }
] * 2


def edited(plan: BitPlan, layer: int, tensor: str, **fields: object) -> BitPlan:
    """Return a plan with some fields of one tensor's entry changed, as an editor of the file would."""
    value = plan.model_dump(mode="json", by_alias=True)
    value["layers"][layer][tensor] |= fields
    return BitPlan.from_json(value, "edited")


def test_a_plan_is_the_same_as_itself_whatever_its_history() -> None:
    first = plan_of([PAIR] * 3, geometry=geometry_json(3), provenance={"scores": "sha256:1", "command": None})
    second = plan_of([PAIR] * 3, geometry=geometry_json(3), solver={"method": "exact"})
    found = compare(first, second)
    assert found.same
    assert found.tensors == 6
    assert not found.changes


def test_each_moved_tensor_says_where_it_went() -> None:
    first = plan_of([PAIR, ("int2g64", "rot2"), ("int2g64", "int2g64")])
    second = plan_of([("int4g64", "rot1"), ("int2g64c", "rot2"), ("int2g64", "rot2")])
    changes = [
        (change.layer, change.tensor, change.direction, change.stored_bits_before, change.stored_bits_after)
        for change in compare(first, second).changes
    ]
    assert changes == [
        (0, "key", "up", 3.5, 4.5),
        (0, "value", "down", 2.25, 1.25),
        (1, "key", "level", 2.5, 2.5),
        (2, "value", "down", 2.5, 2.25),
    ]


def test_costs_are_counted_from_the_layers_not_read_from_the_file() -> None:
    stale = {"nominal_bits": 7.0, "stored_bits": 9.0, "bytes_per_token": 1.0}
    first = plan_of([PAIR] * 2, geometry=geometry_json(2), budget=stale)
    second = plan_of([PAIR, ("int4g64", "rot2")], geometry=geometry_json(2), budget=stale)
    found = compare(first, second)
    assert (found.first.nominal_bits, found.first.stored_bits) == (2.5, 2.875)
    assert (found.second.nominal_bits, found.second.stored_bits) == (2.75, 3.125)
    assert found.first.bytes_per_token == 2 * 192 * (3.5 + 2.25) / 8
    assert found.second.bytes_per_token == 192 * (3.5 + 2.25 + 4.5 + 2.25) / 8
    assert found.first.bytes_at == {context: first.bytes_at(context) for context in CONTEXTS}
    assert found.second.bytes_at == {context: second.bytes_at(context) for context in CONTEXTS}


def test_without_a_geometry_bytes_are_unknown_and_one_serves_both() -> None:
    bare, shaped = plan_of([PAIR] * 2), plan_of([("int4g64", "rot3")] * 2, geometry=geometry_json(2))
    assert compare(bare, bare).first.bytes_at is None
    assert compare(bare, bare).first.bytes_per_token is None
    found = compare(bare, shaped)
    assert found.second.bytes_at == {context: shaped.bytes_at(context) for context in CONTEXTS}
    assert found.first.bytes_per_token == 2 * 192 * (3.5 + 2.25) / 8


@pytest.mark.parametrize(
    ("tensor", "fields"),
    [
        ("value", {"bits": 2, "scheme": "asymmetric", "group_size": 128}),  # a group ends with its head
        ("key", {"bits": 16, "group_size": 32}),
        ("key", {"bits": 16, "group_size": 1, "axis": "token", "clip": "mse", "recent_fraction": 0.5}),
    ],
)
def test_entries_that_store_the_same_have_not_moved(tensor: str, fields: dict[str, object]) -> None:
    first = plan_of([("full", "int2g64")], geometry=geometry_json(1))
    assert compare(first, edited(first, 0, tensor, **fields)).same


@pytest.mark.parametrize(
    ("fields", "direction"),
    [({"recent_fraction": 0.1}, "up"), ({"axis": "token"}, "level"), ({"clip": "mse"}, "level")],
)
def test_what_the_name_of_a_format_leaves_out_counts_too(fields: dict[str, object], direction: str) -> None:
    first = plan_of([PAIR], geometry=geometry_json(1))
    (change,) = compare(first, edited(first, 0, "key", **fields)).changes
    assert change.direction == direction


def test_settings_beside_the_layers_are_named() -> None:
    first = plan_of([PAIR])
    second = plan_of([PAIR], window={"sink_tokens": 0, "recent_tokens": 32}, quantizer={"rotation_seed": 7})
    found = compare(first, second)
    assert not found.same
    assert [(setting.name, setting.before, setting.after) for setting in found.settings] == [
        ("window.sink_tokens", 4, 0),
        ("window.recent_tokens", 128, 32),
        ("quantizer.rotation_seed", 0, 7),
    ]


def skipping_the_last(plan: BitPlan) -> BitPlan:
    """Return a plan without a geometry whose last layer is left alone."""
    value = plan.model_dump(mode="json", by_alias=True)
    last = value["layers"].pop()["layer"]
    return BitPlan.from_json(value | {"skipped": [{"layer": last, "reason": "by hand"}]}, "skipping")


BARE, SHAPED = plan_of([PAIR] * 2), plan_of([PAIR] * 2, geometry=geometry_json(2))


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (BARE, plan_of([PAIR] * 3), "layers, "),
        (SHAPED, plan_of([PAIR] * 3), "layers, "),
        (SHAPED, plan_of([PAIR] * 3, geometry=geometry_json(3)), "layers, "),
        (BARE, plan_of([PAIR] * 2, fingerprint="sha256:two"), "sha256:two"),
        (SHAPED, plan_of([PAIR] * 2, geometry=geometry_json(2), fingerprint="sha256:two"), "sha256:two"),
        (SHAPED, plan_of([PAIR] * 2, geometry=geometry_json(2, kv_heads=4)), "KV heads"),
        (BARE, skipping_the_last(BARE), "gives bits to layer 1"),
        (SHAPED, skipping_the_last(BARE), "gives bits to layer 1"),
        (edited(BARE, 0, "value", group_size=128), SHAPED, "rotates its value"),
    ],
)
@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
def test_plans_of_different_models_are_refused(first: BitPlan, second: BitPlan, words: str, swapped: bool) -> None:
    with pytest.raises(Mismatch) as refusal:
        compare(*((second, first) if swapped else (first, second)), names=("a.json", "b.json"))
    assert words in str(refusal.value)
    assert "not of one model" in str(refusal.value)


def test_predicted_kl_is_what_the_files_say() -> None:
    first = plan_of([PAIR], solver={"method": "exact", "predicted_kl_nats": 0.5, "predicted_kl_stderr_nats": 0.125})
    second = plan_of([PAIR], solver={"method": "exact", "predicted_kl_nats": 0.75})
    found = compare(first, second)
    assert (found.first.predicted_kl_nats, found.first.predicted_kl_stderr_nats) == (0.5, 0.125)
    assert (found.second.predicted_kl_nats, found.predicted_change_nats) == (0.75, 0.25)
    assert found.predicted_change_stderr_nats is None
    nothing = compare(first, plan_of([PAIR]))
    assert nothing.second.predicted_kl_nats is None
    assert nothing.predicted_change_nats is None


def test_a_plan_edited_after_its_kl_was_predicted_is_said_to_be() -> None:
    solver, bits = {"method": "exact", "predicted_kl_nats": 0.5}, {"stored_bits": 2.875}
    first = plan_of([PAIR] * 2, geometry=geometry_json(2), budget=bits, solver=solver)
    assert compare(first, first).remarks == ()
    (remark,) = compare(first, edited(first, 1, "key", bits=4)).remarks
    assert remark.startswith("second records 2.875 stored bits but has 3.125, so one was edited")
    (remark,) = compare(first, edited(first, 1, "key", recent_fraction=0.5)).remarks
    assert remark.startswith("both plans record the same predicted KL though tensors moved")


def test_predictions_from_different_scores_are_said_to_be_so() -> None:
    plans = [
        plan_of([PAIR], solver={"method": "exact", "predicted_kl_nats": 1.0}, provenance={"scores": digest})
        for digest in ("sha256:1", "sha256:2")
    ]
    assert "different scores" in compare(*plans).remarks[0]
    assert not compare(plans[0], plans[0]).remarks


def test_predictions_with_different_factors_are_said_to_be_so() -> None:
    solvers = [
        {
            "method": "exact",
            "metric": "loss_increase",
            "objective": 0.01,
            "predicted_kl_nats": 0.012 * (factor or 1),
            "selection_nats": 0.001,
            "kl_factor": factor,
        }
        for factor in (None, 1.5)
    ]
    before, after = (plan_of([PAIR] * 2, geometry=geometry_json(2), solver=solver) for solver in solvers)
    (remark,) = compare(before, after).remarks
    assert "different calibrated factors, 1 and 1.5" in remark
    assert not compare(after, after).remarks


OBJECTIVE = {"method": "exact", "metric": "loss_increase", "objective": 0.01}


@pytest.mark.parametrize(
    ("before", "after", "unknown"),
    [
        # What older plans record: the factor times the objective, and not the factor.
        ({"predicted_kl_nats": 0.015}, {"predicted_kl_nats": 0.018}, "first and second"),
        ({"predicted_kl_nats": 0.015}, {"predicted_kl_nats": 0.03, "kl_factor": 3.0}, "first"),
        ({"predicted_kl_nats": 0.01}, {"predicted_kl_nats": 0.015}, "second"),
        ({"predicted_kl_nats": 0.01, "objective": None}, {"predicted_kl_nats": 0.01}, "first"),
        ({"predicted_kl_nats": 0.012, "selection_nats": 0.001}, {"predicted_kl_nats": 0.015}, "second"),
        # The same factor, by what they record.
        ({"predicted_kl_nats": 0.015}, {"predicted_kl_nats": 0.03, "objective": 0.02}, None),
        ({"predicted_kl_nats": 0.015}, {"predicted_kl_nats": 0.016, "kl_factor": 1.5}, None),
        # Nothing was multiplied in: the prediction is the objective, or the plan has what only later ones have.
        ({"predicted_kl_nats": 0.01}, {"predicted_kl_nats": 0.013, "selection_nats": 0.002}, None),
        ({"predicted_kl_nats": 0.01}, {"predicted_kl_nats": 0.013, "lower_bound": 0.009}, None),
    ],
)
def test_a_factor_that_was_not_written_down_is_said_to_be_unknown(
    before: dict[str, float], after: dict[str, float], unknown: str | None
) -> None:
    plans = [plan_of([PAIR], geometry=geometry_json(1), solver=OBJECTIVE | fields) for fields in (before, after)]
    expected = (
        ()
        if unknown is None
        else (f"the calibrated factor in the KL that {unknown} records is not known; --scores FILE counts both anew",)
    )
    assert compare(*plans).remarks == expected


def test_predicted_kl_is_counted_again_from_scores_with_their_factor() -> None:
    scores = scores_of(HANDFUL, factor=2.0)
    first, second = plan_of([PAIR] * 2), plan_of([("int2g64", "rot3"), PAIR])
    found = compare(first, second, scores)
    assert found.first.predicted_kl_nats == pytest.approx(2 * 2 * (0.02 + 0.03))
    assert found.second.predicted_kl_nats == pytest.approx(2 * (0.05 + 0.01 + 0.02 + 0.03))
    key, value = found.changes
    assert key.predicted_change_nats == pytest.approx(2 * (0.05 - 0.02))
    assert value.predicted_change_nats == pytest.approx(2 * (0.01 - 0.03))
    # Sequence by sequence the first plan has 2 * 2 * (0.03, 0.07), the second 2 * (0.06 + 0.03, 0.06 + 0.07).
    assert found.first.predicted_kl_stderr_nats == pytest.approx(statistics.stdev([0.12, 0.28]) / math.sqrt(2))
    changes = [2 * 0.09 - 0.12, 2 * 0.13 - 0.28]
    assert found.predicted_change_stderr_nats == pytest.approx(statistics.stdev(changes) / math.sqrt(2))


def test_a_format_that_was_not_scored_is_named_and_its_plan_not_predicted() -> None:
    scores = scores_of(HANDFUL)
    found = compare(plan_of([PAIR] * 2), plan_of([PAIR, ("int8g64", "rot2")]), scores)
    assert found.second.predicted_kl_nats is None
    assert found.changes[0].predicted_change_nats is None
    assert "int8g64 was not scored for the key of layer 1" in found.remarks[0]
    full = compare(plan_of([PAIR] * 2), plan_of([PAIR, ("full", "full")]), scores)
    assert full.second.predicted_kl_nats == pytest.approx(0.02 + 0.03)


def test_a_share_of_the_recent_past_was_scored_by_nobody() -> None:
    plan = plan_of([PAIR] * 2)
    found = compare(plan, edited(plan, 1, "key", recent_fraction=0.1), scores_of(HANDFUL))
    assert found.second.predicted_kl_nats is None
    assert "recent_fraction" in found.remarks[0]


def test_scores_of_another_model_or_without_losses_are_refused() -> None:
    plan = plan_of([PAIR] * 2)
    with pytest.raises(Mismatch, match="fingerprint"):
        compare(plan, plan, scores_of(HANDFUL, fingerprint="sha256:two"))
    with pytest.raises(Mismatch, match="layers"):
        compare(plan_of([PAIR]), plan_of([PAIR]), scores_of(HANDFUL))
    value = scores_of(HANDFUL).model_dump(mode="json", by_alias=True)
    for entry in value["layers"]:
        entry["key"] = entry["value"] = {"spectral_norm": 1.0}
    norms = type(scores_of(HANDFUL)).from_json(value, "norms.json")
    with pytest.raises(InvalidFile, match="no loss_increase for the key of layer 0"):
        compare(plan, plan, norms)


def test_a_window_that_was_not_scored_is_said_to_be_another() -> None:
    value = scores_of(HANDFUL).model_dump(mode="json", by_alias=True)
    value["decoding"] = {"window": {"sink_tokens": 4, "recent_tokens": 32}, "suffix_fraction": 0.5, "tokens": 512}
    scores = type(scores_of(HANDFUL)).from_json(value, "scores.json")
    plan = plan_of([PAIR] * 2)
    assert [remark for remark in compare(plan, plan, scores).remarks if "window of 32" in remark]


pairs = st.tuples(st.sampled_from(FORMATS["key"]), st.sampled_from(FORMATS["value"]))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(pairs, pairs), min_size=1, max_size=6))
def test_the_way_back_undoes_the_way_there(moves: list[tuple[tuple[str, str], tuple[str, str]]]) -> None:
    first, second = (plan_of([move[side] for move in moves], geometry=geometry_json(len(moves))) for side in (0, 1))
    there, back = compare(first, second), compare(second, first)
    opposite = {"up": "down", "down": "up", "level": "level"}
    assert [opposite[change.direction] for change in there.changes] == [change.direction for change in back.changes]
    assert (there.first, there.second) == (
        back.second.model_copy(update={"name": "first"}),
        back.first.model_copy(update={"name": "second"}),
    )
    moved = sum(one != other for before, after in moves for one, other in zip(before, after, strict=True))
    assert len(there.changes) == moved
    added = sum(change.stored_bits_after - change.stored_bits_before for change in there.changes)
    assert there.second.stored_bits - there.first.stored_bits == pytest.approx(added / there.tensors, abs=1e-12)
    assert all(isinstance(change.before, TensorPlan) for change in there.changes)
