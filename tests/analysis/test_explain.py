"""Prices, offers and moves against linear programming, brute force and sums by hand."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from score_factories import FORMATS, HEAD_DIM, geometry_json, plan_of, random_samples, scores_of

from kvprof import BitPlan, Scores
from kvprof.allocate.hull import corners, shadow_price
from kvprof.analysis.explain import explain, parse_layers
from kvprof.errors import InvalidFile, Mismatch, UsageError
from kvprof.records.explanation import Explanation, TensorExplanation
from kvprof.records.formats import format_named

points = st.lists(
    st.tuples(st.integers(0, 12).map(Fraction), st.integers(0, 40).map(lambda loss: loss / 8)), min_size=1, max_size=7
)


def by_layer(found: Explanation) -> dict[tuple[int, str], TensorExplanation]:
    return {(tensor.layer, tensor.tensor): tensor for tensor in found.tensors}


def stored(name: str, tensor: str) -> float:
    return float(format_named(name, tensor, HEAD_DIM).stored_bits(HEAD_DIM))


# The hull and the price


@settings(deadline=None, max_examples=200)
@given(points)
def test_a_corner_is_what_some_price_makes_the_best(choices: list[tuple[Fraction, float]]) -> None:
    # Between integers below 13 and eighths below 6 every price at which the best choice changes is one of these.
    critical = {
        (one[1] - other[1]) / float(other[0] - one[0])
        for one, other in itertools.permutations(choices, 2)
        if other[0] > one[0] and one[1] > other[1]
    }
    tried = sorted({1e-3, 100.0, *critical, *((a + b) / 2 for a, b in itertools.pairwise(sorted(critical)))})
    best = set()
    for price in tried:
        totals = [loss + price * float(cost) for cost, loss in choices]
        best |= {choices[place] for place, total in enumerate(totals) if total <= min(totals) + 1e-9}
    found = [choices[place] for place in corners(choices)]
    assert set(found) == best
    assert found == sorted(found)
    assert all(one[1] > other[1] for one, other in itertools.pairwise(found))


@settings(deadline=None, max_examples=100)
@given(st.lists(points, min_size=1, max_size=4), st.integers(0, 40))
def test_the_shadow_price_is_the_dual_of_the_linear_program(
    items: list[list[tuple[Fraction, float]]], spent: int
) -> None:
    found = shadow_price(items, Fraction(spent))
    costs, losses = (np.array([float(point[part]) for item in items for point in item]) for part in (0, 1))
    one_each = np.zeros((len(items), len(costs)))
    place = 0
    for row, item in enumerate(items):
        one_each[row, place : place + len(item)] = 1
        place += len(item)

    def least(budget: float) -> float | None:
        solved = linprog(losses, A_ub=costs[None], b_ub=[budget], A_eq=one_each, b_eq=np.ones(len(items)))
        return solved.fun if solved.status == 0 else None

    now, more = least(spent), least(spent + 0.125)  # the slope changes at whole costs only
    if now is None:
        assert found is None
    else:
        assert more is not None
        assert found == pytest.approx((now - more) / 0.125, abs=1e-6)


def test_a_budget_that_buys_all_there_is_has_no_price_left() -> None:
    items = [[(Fraction(1), 1.0), (Fraction(2), 0.5)]] * 2
    assert shadow_price(items, Fraction(4)) == 0
    assert shadow_price(items, Fraction(2)) == 0.5
    assert shadow_price(items, Fraction(1)) is None


# One plan, by hand: two layers, stored bits 2.5 and 4.5 (K) and 2.25 and 4.25 (V)


def table(key: tuple[float, float], value: tuple[float, float]) -> dict[str, dict[str, list[float]]]:
    return {
        "key": {"int2g64": [key[0]], "int4g64": [key[1]]},
        "value": {"rot2": [value[0]], "rot4": [value[1]]},
    }


BY_HAND = [table((0.8, 0.2), (0.5, 0.4)), table((0.4, 0.2), (0.3, 0.1))]
PLAN = plan_of([("int4g64", "rot2"), ("int2g64", "rot2")], geometry=geometry_json(2))


def test_prices_moves_and_losses_are_what_the_numbers_say() -> None:
    found = explain(PLAN, scores_of(BY_HAND, geometry=geometry_json(2)), ["0-1"])
    # Slopes a bit of each tensor: 0.3, 0.05, 0.1 and 0.1. One is bought, so the next bit anywhere saves 0.1, of which
    # a bit averaged over four tensors holds four.
    assert found.unit == "nats"
    assert found.stored_bits == (4.5 + 2.25 + 2.5 + 2.25) / 4
    assert found.loss == pytest.approx(0.2 + 0.5 + 0.4 + 0.3)
    assert found.shadow_price == pytest.approx(0.4)
    tensors = by_layer(found)
    key = tensors[0, "key"]
    assert (key.chosen, key.loss, key.up, key.verdict) == ("int4g64", 0.2, None, "stays")
    assert key.price == pytest.approx(0.1)
    assert key.width_share == 0.25
    assert key.down is not None
    assert key.down.format == "int2g64"
    assert key.down.loss_change == pytest.approx(0.6)
    assert key.down.loss_per_bit == pytest.approx(0.3)
    assert key.down.plan_stored_bits == found.stored_bits - 2 / 4
    assert key.down.plan_loss == pytest.approx(found.loss + 0.6)
    assert key.down.balanced_change == pytest.approx(0.6 - 2 * 0.1)
    value = tensors[0, "value"]
    assert value.down is None
    assert value.up is not None
    assert value.up.loss_per_bit == pytest.approx(0.05)
    assert value.up.balanced_change == pytest.approx(-0.1 + 2 * 0.1)
    assert value.verdict == "stays"
    assert tensors[1, "key"].verdict == tensors[1, "value"].verdict == "stays"  # at the very price: no reason to move
    offers = {offer.format: offer for offer in value.offers}
    assert [offer.chosen for offer in value.offers] == [True, False]
    assert offers["rot2"].loss_per_bit is None
    assert offers["rot4"].loss_per_bit == pytest.approx(0.05)
    assert offers["rot4"].balanced_change == pytest.approx(0.1)


def test_the_calibrated_factor_is_in_every_loss_and_price() -> None:
    plain, calibrated = (
        explain(PLAN, scores_of(BY_HAND, geometry=geometry_json(2), factor=factor), ["0"]) for factor in (None, 2.0)
    )
    assert (plain.factor, calibrated.factor) == (1.0, 2.0)
    assert calibrated.loss == pytest.approx(2 * plain.loss)
    assert calibrated.shadow_price == pytest.approx(2 * plain.shadow_price)
    assert calibrated.tensors[0].down.loss_per_bit == pytest.approx(2 * plain.tensors[0].down.loss_per_bit)
    assert [tensor.verdict for tensor in calibrated.tensors] == [tensor.verdict for tensor in plain.tensors]


def test_a_tensor_in_the_wrong_place_is_told_what_it_would_gain() -> None:
    wrong = plan_of([("int2g64", "rot4"), ("int2g64", "rot2")], geometry=geometry_json(2))
    found = explain(wrong, scores_of(BY_HAND, geometry=geometry_json(2)), ["0"])
    key, value = found.tensors
    # As many bits as before, so the price is 0.1 again: int4g64 saves 0.6 for 2 bits, rot2 loses 0.1 and frees 2.
    assert (key.verdict, key.prefers) == ("would move", "int4g64")
    assert key.gain == pytest.approx(0.6 - 0.2)
    assert (value.verdict, value.prefers) == ("would move", "rot2")
    assert value.gain == pytest.approx(0.2 - 0.1)


def test_a_format_that_another_beats_at_no_more_bits_is_dominated() -> None:
    samples = [{"key": {"int2g64": [0.5], "int2g64c": [0.4], "int3g64": [0.1]}, "value": {"rot2": [0.1]}}]
    plan = plan_of([("int2g64", "rot2")], geometry=geometry_json(1))
    key, value = explain(plan, scores_of(samples, geometry=geometry_json(1)), ["0"]).tensors
    assert (key.verdict, key.prefers) == ("dominated", "int2g64c")
    assert [offer.on_hull for offer in key.offers] == [False, True, True]
    assert value.verdict == "stays"
    assert (value.up, value.down) == (None, None)


def test_a_wider_tensor_has_a_larger_share_of_the_price() -> None:
    wide = geometry_json(1)
    wide["layers"][0] |= {"kv_heads": 1, "key_head_dim": 64, "value_head_dim": 192}
    samples = [{"key": {"int2g64": [0.4], "int4g64": [0.1]}, "value": {"int2g64": [0.9], "int4g64": [0.2]}}]
    plan = plan_of([("int4g64", "int2g64")], geometry=wide)
    found = explain(plan, scores_of(samples, geometry=wide), ["0"])
    key, value = found.tensors
    assert (key.width_share, value.width_share) == (0.25, 0.75)
    # A bit of all elements costs 0.3 / 2 / (1/4) = 0.6 by the key, 0.7 / 2 / (3/4) by the value: the key goes first.
    assert found.shadow_price == pytest.approx(0.35 / 0.75)
    assert key.price == pytest.approx(0.25 * found.shadow_price)
    assert value.price == pytest.approx(0.35)
    assert value.up is not None
    assert value.up.plan_stored_bits == pytest.approx(found.stored_bits + 2 * 0.75)


@pytest.mark.parametrize("price", [3e-6, 3e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("seed", range(3))
def test_every_tensor_of_a_plan_made_by_one_price_stays_and_that_price_fits(seed: int, price: float) -> None:
    samples = random_samples(6, 4, seed)
    chosen = [
        tuple(
            min(FORMATS[name], key=lambda form: sum(entry[name][form]) / 4 + price * stored(form, name))
            for name in ("key", "value")
        )
        for entry in samples
    ]
    scores = scores_of(samples, geometry=geometry_json(6))
    found = explain(plan_of(chosen, geometry=geometry_json(6)), scores, ["0-5"])
    assert {tensor.verdict for tensor in found.tensors} == {"stays"}
    for tensor in found.tensors:
        # The shadow price is what a bit more would save anywhere, and no less than that.
        assert tensor.price is not None
        assert tensor.price <= price * (1 + 1e-9)
        if tensor.up is not None:
            assert tensor.up.loss_per_bit <= tensor.price * (1 + 1e-9)
        if tensor.down is not None:
            assert tensor.down.loss_per_bit >= price * (1 - 1e-9)


def test_the_error_of_a_move_is_over_sequences_each_compared_with_itself() -> None:
    samples = [{"key": {"int2g64": [0.3, 0.5], "int4g64": [0.1, 0.3]}, "value": {"rot2": [0.1, 0.1]}}]
    plan = plan_of([("int2g64", "rot2")], geometry=geometry_json(1))
    key, _ = explain(plan, scores_of(samples, geometry=geometry_json(1)), ["0"]).tensors
    assert key.up is not None
    assert key.up.loss_change_stderr == pytest.approx(0, abs=1e-15)  # both sequences save 0.2
    assert key.offers[0].stderr == pytest.approx(0.1)  # the losses themselves differ by 0.2: 0.1 is their stderr


# What is missing or another


def test_a_format_that_was_not_scored_has_no_verdict_and_no_plan_loss() -> None:
    plan = plan_of([("int8g64", "rot2"), ("int2g64", "rot2")], geometry=geometry_json(2))
    found = explain(plan, scores_of(BY_HAND, geometry=geometry_json(2)), ["0"])
    key, value = found.tensors
    assert (key.loss, key.verdict, key.up, key.down) == (None, "unknown", None, None)
    assert found.loss is None
    assert "int8g64 was not scored for the key of layer 0" in found.remarks[0]
    assert value.up is not None
    assert value.up.plan_loss is None


def test_full_precision_loses_nothing_scored_or_not() -> None:
    plan = plan_of([("full", "rot2"), ("int2g64", "rot2")], geometry=geometry_json(2))
    key, value = explain(plan, scores_of(BY_HAND, geometry=geometry_json(2)), ["0"]).tensors
    assert (key.loss, key.stored_bits) == (0.0, 16.0)
    assert key.down is not None
    assert key.down.loss_per_bit == pytest.approx(0.2 / 11.5)
    assert (value.verdict, value.prefers) == ("would move", "rot4")  # with so many bits, at so low a price


def test_a_plan_cheaper_than_all_that_was_scored_has_no_price() -> None:
    plan = plan_of([("int1g64", "rot1"), ("int1g64", "rot1")], geometry=geometry_json(2))
    found = explain(plan, scores_of(BY_HAND, geometry=geometry_json(2)), ["0"])
    assert found.shadow_price is None
    assert {tensor.verdict for tensor in found.tensors} == {"unknown"}


def test_only_formats_that_compete_are_offered_besides_the_chosen() -> None:
    scores = scores_of(random_samples(2, 2), geometry=geometry_json(2))
    plan = plan_of([("int3g64", "rot2")] * 2, geometry=geometry_json(2))
    key, value = explain(plan, scores, ["0"], formats="key:int2g64c,key:int4g64").tensors
    assert {offer.format for offer in key.offers} == {"int2g64c", "int3g64", "int4g64"}
    assert {offer.format for offer in value.offers} == set(FORMATS["value"])
    with pytest.raises(UsageError, match="int5g64"):
        explain(plan, scores, ["0"], formats="int5g64")


def test_other_scores_than_the_plans_own_are_said_to_be_so() -> None:
    scores = scores_of(BY_HAND, geometry=geometry_json(2))
    for digest, said in ((scores.digest, 0), ("sha256:other", 1)):
        plan = plan_of([("int4g64", "rot2")] * 2, geometry=geometry_json(2), provenance={"scores": digest})
        assert len(explain(plan, scores, ["0"]).remarks) == said


def test_a_plan_that_predicts_another_kl_is_said_to_do_so() -> None:
    solver = {"method": "exact", "metric": "loss_increase", "predicted_kl_nats": 0.5}
    plan = plan_of([("int4g64", "rot2")] * 2, geometry=geometry_json(2), solver=solver)
    (remark,) = explain(plan, scores_of(BY_HAND, geometry=geometry_json(2)), ["0"]).remarks
    assert "0.5" in remark


def test_a_plan_made_from_less_than_all_is_said_to_be() -> None:
    plan = plan_of(
        [("int4g64", "rot2")] * 2,
        geometry=geometry_json(2),
        provenance={"scores": None, "command": "kvprof allocate --budget 3 --tie=key-value --min-key-bits 4"},
    )
    (remark,) = explain(plan, scores_of(BY_HAND, geometry=geometry_json(2)), ["0"]).remarks
    assert "made with --min-key-bits, --tie; prices here are of a free choice" in remark


@pytest.mark.parametrize(("unit", "words"), [("nominal", "nominal bits"), ("bytes", "bytes at one context")])
def test_a_budget_in_other_units_is_said_to_have_other_prices(unit: str, words: str) -> None:
    plan = plan_of([("int4g64", "rot2")] * 2, geometry=geometry_json(2), budget={"requested": 3.0, "unit": unit})
    (remark,) = explain(plan, scores_of(BY_HAND, geometry=geometry_json(2)), ["0"]).remarks
    assert words in remark


def test_scores_of_another_model_are_refused() -> None:
    with pytest.raises(Mismatch):
        explain(PLAN, scores_of(BY_HAND, geometry=geometry_json(2, kv_heads=4)), ["0"])


# Metrics that know no formats


def norm_scores(**metrics: float) -> Scores:
    layers = [{"layer": layer, "key": metrics, "value": metrics} for layer in range(2)]
    return Scores.from_json({"schema": "kvprof.scores/1", "layers": layers}, "norms.json")


def test_a_plan_by_a_norm_is_explained_in_units_of_its_own() -> None:
    solver = {"method": "exact", "metric": "spectral_norm"}
    plan = plan_of([("int4g32", "int2g32"), ("int2g32", "int2g32")], solver=solver)
    found = explain(plan, norm_scores(spectral_norm=2.0, frobenius_norm=5.0), ["0"])
    assert (found.metric, found.unit) == ("spectral_norm", "spectral_norm^2 * 4^-bits")
    assert found.loss == pytest.approx(4 * (4**-4 + 3 * 4**-2))
    key, value = found.tensors
    assert [offer.format for offer in key.offers] == [f"int{bits}g32" for bits in (1, 2, 3, 4, 6, 8)]
    assert key.offers[2].loss == 4 * 4**-3
    assert key.up is not None
    assert key.up.loss_per_bit == pytest.approx(4 * (4**-4 - 4**-6) / 2)
    assert value.verdict == "stays"
    assert key.verdict == "would move"  # its fourth bit saves less than a third bit elsewhere
    other = explain(plan, norm_scores(spectral_norm=2.0, frobenius_norm=5.0), ["0"], metric="frobenius_norm")
    assert other.loss == pytest.approx(25 / 4 * found.loss)


def test_a_metric_is_found_where_the_plan_names_none() -> None:
    plan = plan_of([("int4g32", "int2g32")] * 2)
    assert explain(plan, norm_scores(frobenius_norm=1.0), ["0"]).metric == "frobenius_norm"
    assert explain(PLAN, scores_of(BY_HAND, geometry=geometry_json(2)), ["0"]).metric == "loss_increase"


def test_a_metric_that_is_unknown_lacking_or_without_formats_is_refused() -> None:
    plan = plan_of([("int4g32", "int2g32")] * 2)
    norms = norm_scores(spectral_norm=1.0)
    with pytest.raises(UsageError, match="did you mean 'spectral_norm'"):
        explain(plan, norms, ["0"], metric="spectral_nrm")
    with pytest.raises(InvalidFile, match="gradient_norm"):
        explain(plan, norms, ["0"], metric="gradient_norm")
    with pytest.raises(InvalidFile, match="loss_increase"):
        explain(plan, norms, ["0"], metric="loss_increase")
    with pytest.raises(UsageError, match="knows no formats"):
        explain(plan, norms, ["0"], formats="int3g64")
    with pytest.raises(InvalidFile, match="too large to square"):
        explain(plan, norm_scores(spectral_norm=1e200), ["0"])


# Layers


def skipping(plan: BitPlan, layer: int) -> BitPlan:
    value = plan.model_dump(mode="json", by_alias=True)
    value["layers"] = [entry for entry in value["layers"] if entry["layer"] != layer]
    return BitPlan.from_json(value | {"skipped": [{"layer": layer, "reason": "sliding window of 512 tokens"}]}, "plan")


def test_layers_are_named_singly_or_as_ranges() -> None:
    plan = plan_of([("int4g64", "rot2")] * 9)
    assert parse_layers(["7"], plan) == [7]
    assert parse_layers(["3-5", "8", "4", " 0 , 1 "], plan) == [0, 1, 3, 4, 5, 8]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("9", "layer 9 does not exist; the plan gives bits to layers 0-1, 3-8"),
        ("5-99", "layer 9 does not exist"),
        ("999999999", "does not exist"),
        ("2", "layer 2 is skipped (sliding window of 512 tokens)"),
        ("1-3", "layer 2 is skipped"),
        ("5-3", "write 3-5"),
        ("seven", "'seven'"),
        ("-1", "'-1'"),
        ("1.5", "'1.5'"),
        ("", "''"),
    ],
)
def test_a_layer_that_there_is_not_is_refused_with_those_that_there_are(text: str, words: str) -> None:
    plan = skipping(plan_of([("int4g64", "rot2")] * 9), 2)
    with pytest.raises(UsageError) as refusal:
        parse_layers([text], plan)
    assert words in str(refusal.value)


def test_one_tensor_alone_can_be_asked_for() -> None:
    scores = scores_of(BY_HAND, geometry=geometry_json(2))
    assert list(by_layer(explain(PLAN, scores, ["0-1"], tensor="value"))) == [(0, "value"), (1, "value")]
    with pytest.raises(UsageError, match="did you mean 'value'"):
        explain(PLAN, scores, ["0"], tensor="vlaue")
