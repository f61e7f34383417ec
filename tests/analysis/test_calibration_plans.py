"""Are plans to calibrate by predicted without any factor, and made where nobody names one?"""

from __future__ import annotations

import pytest
from score_factories import geometry_json, plan_of, random_samples, random_scores, scores_of

from kvprof import Scores
from kvprof.allocate.budget import bit_limit
from kvprof.allocate.methods import exact
from kvprof.allocate.prediction import predict
from kvprof.analysis.calibration_plans import predict_plans, usual_plans
from kvprof.errors import InvalidFile, Mismatch

LAYERS = 6


@pytest.fixture
def scores() -> Scores:
    return random_scores(LAYERS)


def named(pair: tuple[str, str], **more: object):
    return plan_of([pair] * LAYERS, geometry=geometry_json(LAYERS), **more)


def test_a_plan_is_foretold_without_the_factor_of_an_earlier_calibration(scores: Scores) -> None:
    plan = named(("int2g64c", "rot2"))
    calibrated = random_scores(LAYERS, factor=1.7)
    (found,) = predict_plans(calibrated, {"mine": plan})
    assert found.predicted_nats == pytest.approx(predict(plan, scores).kl_nats)
    assert predict(plan, calibrated).kl_nats == pytest.approx(1.7 * found.predicted_nats)
    assert len(found.samples) == 16
    assert sum(found.samples) / 16 == pytest.approx(found.predicted_nats)
    assert (found.name, found.plan) == ("mine", plan)
    assert found.stored_bits == pytest.approx((2.5 + 2.25) / 2)


def test_a_format_that_was_not_scored_is_named_with_its_plan_and_tensor(scores: Scores) -> None:
    with pytest.raises(InvalidFile) as raised:
        predict_plans(scores, {"mine": named(("int8g32", "rot2"))})
    assert "mine: int8g32 was not scored for the key of layer 0, nor 5 other tensors' format" in str(raised.value)
    assert "--formats key:int8g32" in str(raised.value)


def test_scores_without_losses_say_which_option_names_others(scores: Scores) -> None:
    bare = scores.model_dump(mode="json", by_alias=True)
    for entry in bare["layers"]:
        entry["key"] = entry["value"] = {"gradient_norm": 1.0}
    with pytest.raises(InvalidFile, match="--scores"):
        predict_plans(Scores.from_json(bare, "bare"), {"mine": named(("rot2", "rot2"))})


def test_a_plan_of_another_model_is_named(scores: Scores) -> None:
    with pytest.raises(Mismatch, match="mine: "):
        predict_plans(scores, {"mine": named(("rot2", "rot2"), fingerprint="sha256:another")})


def test_the_usual_plans_are_the_best_at_two_budgets(scores: Scores) -> None:
    plans = usual_plans(scores)
    assert list(plans) == ["best within 2.5 bits", "best within 3.5 bits"]
    for plan, budget in zip(plans.values(), ("2.5", "3.5"), strict=True):
        assert plan.recipe == exact(scores, bit_limit(budget, "stored"), metric="loss_increase").recipe
        assert plan.budget.stored_bits <= float(budget)


def test_where_the_formats_do_not_reach_that_far_the_plans_lie_between_the_ends() -> None:
    samples = [
        {tensor: {name: losses[name] for name in ("rot3", "rot4")} for tensor, losses in entry.items()}
        for entry in random_samples(LAYERS, 4)
    ]
    plans = usual_plans(scores_of(samples, geometry=geometry_json(LAYERS)))
    bits = [plan.budget.stored_bits for plan in plans.values()]
    assert len(plans) == 2
    assert 3.25 <= min(bits) < max(bits) < 4.25


def test_a_single_plan_is_all_that_one_format_allows() -> None:
    samples = [
        {tensor: {"rot2": losses["rot2"]} for tensor, losses in entry.items()} for entry in random_samples(LAYERS, 4)
    ]
    (plan,) = usual_plans(scores_of(samples, geometry=geometry_json(LAYERS))).values()
    assert plan.budget.stored_bits == 2.25
