"""Is each evaluated plan found by its digest, and predicted by its own scores as they are calibrated by now?"""

from __future__ import annotations

import math
from typing import Any

import pytest
from score_factories import geometry_json, model_json, plan_of, random_scores

from kvprof import BitPlan, Scores
from kvprof.analysis.plan_checks import check_plans
from kvprof.records.evaluation import Evaluation

LAYERS = 3
FORMATS = [("int2g64c", "rot2"), ("rot3", "int2g64"), ("int3g64", "rot1")]


@pytest.fixture
def scores() -> Scores:
    return random_scores(LAYERS)


def plan(scores: Scores | None, said: float | None = None, formats: Any = FORMATS) -> BitPlan:
    return plan_of(
        formats,
        geometry=geometry_json(LAYERS),
        provenance={"scores": None if scores is None else scores.digest},
        solver={"method": "exact", "predicted_kl_nats": said},
    )


def evaluation(*plans: BitPlan, kl_nats: float = 0.02, measured_from: int = 256) -> Evaluation:
    position = {"first": measured_from, "last": 511, "tokens": 256, "kl_nats": kl_nats, "top1_agreement": 0.9}
    results = [
        {
            "name": f"plan {number}", "role": "plan" if number == 0 else "against", "digest": one.digest,
            "nominal_bits": 2.5, "stored_bits": 3.0 - number / 4, "bytes_per_token": 100.0, "contexts": [],
            "kl_nats": kl_nats, "kl_stderr_nats": 0.001, "kl_p99_nats": 0.5, "top1_agreement": 0.9, "perplexity": 12.0,
            "by_position": [position],
        }
        for number, one in enumerate(plans)
    ]  # fmt: skip
    text = {"dataset": "builtin", "split": "held-out", "sequences": 1, "sequence_length": 512, "tokens": 512, "seed": 0}
    return Evaluation.from_json(
        {
            "schema": "kvprof.evaluation/1", "model": model_json(LAYERS), "dtype": "float32", "text": text,
            "path": "fast", "measured_from": measured_from, "reference_perplexity": 11.0, "plans": results,
        },
        "handmade",
    )  # fmt: skip


def total(scores: Scores) -> float:
    """The sum of a plan's losses, looked up by hand."""
    return math.fsum(
        entry.tensor(tensor).loss_increase[name]
        for entry, pair in zip(scores.layers, FORMATS, strict=True)
        for tensor, name in zip(("key", "value"), pair, strict=True)
    )


def test_a_plan_is_predicted_by_its_own_scores_with_the_factor_they_have_by_now(scores: Scores) -> None:
    made = plan(scores, said=123.0)  # before the scores were calibrated
    factor = {"factor": 1.7, "plans": 3, "sequences": 4, "spread": 1.1}
    calibrated = Scores.from_json(scores.model_dump(mode="json", by_alias=True) | {"kl_calibration": factor}, "x")
    (check,) = check_plans({"mine": made}, [evaluation(made)], [random_scores(LAYERS, seed=9), calibrated])
    assert check.predicted_kl_nats == pytest.approx(1.7 * total(scores))
    assert (check.name, check.stored_bits, check.measured_kl_nats) == ("mine", 3.0, 0.02)
    assert (check.measured_kl_stderr_nats, check.text, check.measured_from) == (0.001, "builtin (held-out)", 256)
    assert check.ratio == pytest.approx(0.02 / (1.7 * total(scores)))


def test_a_plan_whose_scores_are_gone_is_predicted_as_it_says(scores: Scores) -> None:
    made = plan(random_scores(LAYERS, seed=5), said=0.0125)
    (check,) = check_plans({"mine": made}, [evaluation(made)], [scores])
    assert check.predicted_kl_nats == 0.0125


def test_a_plan_that_says_nothing_is_predicted_by_the_scores_at_hand(scores: Scores) -> None:
    made = plan(None)
    (check,) = check_plans({"mine": made}, [evaluation(made)], [scores])
    assert check.predicted_kl_nats == pytest.approx(total(scores))


def test_a_copy_of_a_plan_was_measured_as_it_was(scores: Scores) -> None:
    made = plan(scores)
    checks = check_plans({"mine": made, "copy": made}, [evaluation(made)], [scores])
    assert [check.name for check in checks] == ["mine", "copy"]


def test_plans_that_nothing_predicts_or_measures_are_left_out(scores: Scores) -> None:
    unscored = plan(None, formats=[("int8g32", "int8g32")] * LAYERS)
    unmeasured = plan(scores)
    assert check_plans({"a": unscored, "b": unmeasured}, [evaluation(unscored)], [scores]) == []
    assert check_plans({}, [evaluation(unmeasured)], [scores]) == []


def test_the_cheapest_plan_comes_first_and_a_file_read_twice_counts_once(scores: Scores) -> None:
    first, second = plan(scores), plan(scores, said=1.0)
    found = evaluation(first, second)
    checks = check_plans({"first": first, "second": second}, [found, found], [scores])
    assert [check.name for check in checks] == ["second", "first"]
