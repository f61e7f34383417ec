"""The rules against published plans, brute force and each other; pins; options that do not go together."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from handmade import full, geometry, published, recurrent, scores, sliding, uneven_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from requested import allocate

from kvprof import BitPlan, Scores
from kvprof.allocate.dispatch import allocate_as_asked
from kvprof.errors import InvalidFile, KvprofError, UsageError
from kvprof.records.plan import Provenance, Window
from kvprof.records.requests.plan import AllocateRequest

PUBLISHED_BITS = (1, 2, 3, 4, 8)


def key_bits(plan: BitPlan) -> list[int]:
    return [entry.key.bits for entry in plan.layers]


def value_bits(plan: BitPlan) -> list[int]:
    return [entry.value.bits for entry in plan.layers]


def mean(bits: list[int]) -> float:
    return sum(bits) / len(bits)


# Published figures


def test_llama_3_2_1b_by_frobenius_norm_gets_the_published_plan() -> None:
    plan = allocate(published("Llama3.2-1B", "frobenius_norm"), budget=2.5, bits=PUBLISHED_BITS)
    assert key_bits(plan) == [4] + [3] * 15
    assert value_bits(plan) == [1, 1] + [2] * 12 + [3, 2]
    assert round(plan.solver.objective, 2) == 564.75
    assert plan.solver.optimal


def test_llama_3_2_1b_by_spectral_norm_has_the_published_objective() -> None:
    plan = allocate(published("Llama3.2-1B", "spectral_norm"), budget=2.5, bits=PUBLISHED_BITS)
    assert round(plan.solver.objective, 4) == 10.9968


def test_llama_3_1_8b_by_spectral_norm_has_the_published_means() -> None:
    plan = allocate(published("Llama3.1-8B-it", "spectral_norm"), budget=2.5, bits=PUBLISHED_BITS)
    assert (mean(key_bits(plan)), mean(value_bits(plan))) == (3.8125, 1.1875)
    assert round(plan.solver.objective, 4) == 23.8421


@pytest.mark.parametrize("rule", ["exact", "norm-greedy"])
@pytest.mark.parametrize("factor", [1e-5, 1e5, 1 / 3, 1e-200, 1e100])
@pytest.mark.parametrize("metric", ["spectral_norm", "frobenius_norm"])
def test_the_scale_of_the_scores_changes_no_plan(rule: str, factor: float, metric: str) -> None:
    plans = [
        allocate(published("Qwen3-4B", metric, scale), rule=rule, budget=2.5, bits=PUBLISHED_BITS)
        for scale in (1.0, factor)
    ]
    assert plans[0].layers == plans[1].layers


@pytest.mark.parametrize(("fraction", "key", "value"), [(None, 2.1875, 2.375), ("0.3", 2.28125, 2.5625)])
def test_kvmix_has_the_published_averages(fraction: str | None, key: float, value: float) -> None:
    numbers = random.Random(0).sample(range(1000), 64)
    source = scores(numbers[:32], numbers[32:], metric="gradient_norm")
    plan = allocate(source, rule="kvmix", top_fraction=fraction)
    assert (mean(key_bits(plan)), mean(value_bits(plan))) == (key, value)


# The rules


def _sixths(bits: int) -> str:
    """Return the budget that allows six tensors so many bits together, and at most a rounding more."""
    return f"{math.ceil(bits / 6 * 10**6) / 10**6:.6f}"


ties = st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, 4.0, 8.0]), min_size=3, max_size=3)


@settings(max_examples=150, deadline=None)
@given(keys=ties, values=ties, budget=st.integers(6, 24), factor=st.sampled_from([1e-5, 0.1, 1e5, 1 / 3]))
@pytest.mark.parametrize("rule", ["exact", "norm-greedy"])
def test_the_scale_of_tied_scores_changes_no_plan(
    rule: str, keys: list[float], values: list[float], budget: int, factor: float
) -> None:
    plans = [
        allocate(scores(keys, values, factor=scale), rule=rule, budget=_sixths(budget), bits=(1, 2, 3, 4))
        for scale in (1.0, factor)
    ]
    assert plans[0].layers == plans[1].layers


positive = st.lists(st.floats(0.01, 100), min_size=3, max_size=3)


@settings(max_examples=150, deadline=None)
@given(keys=positive, values=positive, budget=st.integers(6, 24))
def test_exact_is_the_best_of_all_plans(keys: list[float], values: list[float], budget: int) -> None:
    bits = (1, 2, 4)
    plan = allocate(scores(keys, values), budget=_sixths(budget), bits=bits)
    least = min(
        math.fsum(score**2 * 4.0**-b for score, b in zip(keys + values, assignment, strict=True))
        for assignment in itertools.product(bits, repeat=6)
        if sum(assignment) <= budget
    )
    assert plan.solver.objective == pytest.approx(least, rel=1e-12)
    assert (plan.solver.method, plan.solver.metric, plan.solver.optimal) == ("exact", "spectral_norm", True)


@pytest.mark.parametrize("limit", [{"budget": "3.1"}, {"budget": "4.3", "unit": "stored"}, {"memory": "9MB"}])
def test_exact_is_never_worse_than_greedy(limit: dict[str, Any]) -> None:
    rng = random.Random(1)
    for _ in range(30):
        shapes = [
            full(layer, rng.randint(1, 8), rng.choice([64, 80, 128]), rng.choice([64, 96])) for layer in range(12)
        ]
        source = scores(*([rng.lognormvariate(0, 2) for _ in shapes] for _ in "kv"), geometry(*shapes))
        window = {"context": 2000} if "memory" in limit else {}
        try:
            exact, greedy = (allocate(source, rule=rule, **limit, **window) for rule in ("exact", "norm-greedy"))
        except KvprofError:
            continue
        assert exact.solver.objective <= greedy.solver.objective * (1 + 1e-12)
        assert (greedy.solver.method, greedy.solver.optimal) == ("norm-greedy", False)


def test_equal_scores_give_keys_before_values_and_early_layers_the_bits() -> None:
    for rule in ("exact", "norm-greedy"):
        plan = allocate(scores([0.3] * 4, [0.3] * 4), rule=rule, budget=2.75, bits=(2, 3))
        assert (key_bits(plan), value_bits(plan)) == ([3, 3, 3, 3], [3, 3, 2, 2])


def test_greedy_goes_on_with_what_still_fits() -> None:
    # Layer 0's key, 40 of the 64 elements, would gain the most, but the budget buys only 25 bits beyond 2 each.
    shape = geometry(full(0, 1, 40, 8), full(1, 1, 8, 8))
    plan = allocate(scores([9.0, 1.0], [1.0, 1.0], shape), rule="norm-greedy", budget="2.4", bits=(2, 3))
    assert (key_bits(plan), value_bits(plan)) == ([2, 3], [3, 3])


def test_greedy_passes_over_a_width_that_costs_no_less_than_a_wider_one() -> None:
    # Groups of 2 add 16 bits of scales to every code, so that full precision is the cheapest format.
    plan = allocate(scores([1.0], [1.0]), rule="norm-greedy", budget=16, unit="stored", bits=(4, 8, 16), group_size=2)
    assert key_bits(plan) == value_bits(plan) == [16]


def test_kvmix_ranks_keys_and_values_apart_and_ties_by_layer() -> None:
    source = scores([1, 5, 5, 2, 5], [7, 1, 1, 1, 7], metric="gradient_norm")
    plan = allocate(source, rule="kvmix", top_fraction="0.4")
    assert key_bits(plan) == [2, 3, 3, 2, 2]
    assert value_bits(plan) == [4, 2, 2, 2, 4]
    assert (plan.solver.method, plan.solver.metric, plan.solver.optimal) == ("kvmix", "gradient_norm", False)
    assert plan.solver.objective == pytest.approx((1 + 4 + 25) / 16 + 50 / 64 + 98 / 256 + 3 / 16)


def test_as_published_there_are_no_sinks_and_kvmix_has_groups_of_eleven() -> None:
    source = scores([1, 5, 5, 2, 5], [7, 1, 1, 1, 7], metric="gradient_norm")
    plan = allocate(source, rule="kvmix", top_fraction="0.4", group_size=64, as_published=True)
    assert [entry.key.name for entry in plan.layers] == ["int2g64", "int3g11", "int3g11", "int2g64", "int2g64"]
    assert [entry.value.name for entry in plan.layers] == ["int4g64", "int2g64", "int2g64", "int2g64", "int4g64"]
    greedy = [
        allocate(source, rule="norm-greedy", budget=3, recent_tokens=20, as_published=own) for own in (False, True)
    ]
    assert greedy[0].layers == greedy[1].layers
    with pytest.raises(UsageError, match="--as-published has no sinks, --sink-tokens asks for 4"):
        allocate(source, rule="norm-greedy", budget=3, sink_tokens=4, as_published=True)
    assert (plan.window.sink_tokens, plan.window.recent_tokens) == (0, 128)
    assert (greedy[1].window.sink_tokens, greedy[1].window.recent_tokens) == (0, 20)


def test_kvmix_counts_its_fraction_as_a_decimal() -> None:
    source = scores([1.0] * 10, [1.0] * 10, metric="gradient_norm")
    assert key_bits(allocate(source, rule="kvmix", top_fraction=0.7)).count(3) == 7  # 0.7 * 10 < 7 in binary


def test_uniform_gives_one_width_to_keys_and_one_to_values() -> None:
    plan = allocate(scores([1.0, 2.0], [1.0, 2.0]), rule="uniform", bits_key=4, bits_value=2)
    assert (key_bits(plan), value_bits(plan)) == ([4, 4], [2, 2])
    assert (plan.solver.method, plan.solver.metric, plan.solver.objective) == ("uniform", None, None)


def test_uniform_states_the_objective_of_a_metric_that_is_asked_for() -> None:
    plan = allocate(scores([2.0], [4.0]), rule="uniform", bits_key=1, bits_value=2, metric="spectral_norm")
    assert plan.solver.objective == 4 / 4 + 16 / 16


# What a plan says


def test_a_plan_carries_what_its_scores_know() -> None:
    source = uneven_scores()
    request = AllocateRequest(budget=3, sink_tokens=0, recent_tokens=32)
    plan = allocate_as_asked(source, request, command="kvprof allocate")
    assert [entry.layer for entry in plan.layers] == [0, 2, 4]
    assert [(skip.layer, skip.reason) for skip in plan.skipped] == [
        (1, "sliding window of 512 tokens"),
        (3, "recurrent state"),
    ]
    assert plan.geometry == source.geometry
    assert plan.model.num_layers == 5
    assert plan.provenance == Provenance(scores=source.digest, command="kvprof allocate", request=request)
    assert plan.window == Window(sink_tokens=0, recent_tokens=32)
    assert BitPlan.from_json(plan.model_dump(mode="json", by_alias=True), "plan") == plan


def test_formats_are_the_usual_ones_with_groups_capped_at_a_value_head() -> None:
    source = scores([1.0], [1.0], geometry(full(0, 2, 128, 64)))
    (entry,) = allocate(source, budget=3, group_size=128).layers
    assert (entry.key.axis, entry.key.group_size) == ("channel", 128)
    assert (entry.value.axis, entry.value.group_size) == ("token", 64)


def test_skipped_layers_sway_no_plan() -> None:
    shape = geometry(full(0), sliding(1), full(2))
    loud, quiet = (scores([1.0, other, 2.0], [1.0, other, 2.0], shape) for other in (1e9, 0.0))
    assert allocate(loud, budget=2.5).layers == allocate(quiet, budget=2.5).layers


def test_the_first_metric_is_the_default() -> None:
    source = Scores.model_validate(
        {
            "schema": "kvprof.scores/1",
            "layers": [
                {"layer": 0, "key": {"frobenius_norm": 1.0, "gradient_norm": 2.0},
                 "value": {"frobenius_norm": 1.0, "gradient_norm": 2.0}},
            ],
        }
    )  # fmt: skip
    assert allocate(source, budget=2).solver.metric == "gradient_norm"


def test_a_metric_that_the_scores_lack_is_an_error_that_says_so() -> None:
    with pytest.raises(InvalidFile, match="no gradient_norm"):
        allocate(scores([1.0], [1.0]), rule="kvmix")
    with pytest.raises(UsageError, match="did you mean 'spectral_norm'"):
        allocate(scores([1.0], [1.0]), budget=2, metric="spectral")


def test_scores_too_large_to_square_are_refused() -> None:
    with pytest.raises(InvalidFile, match="too large to square"):
        allocate(scores([1e300], [1.0]), budget=2)


def test_a_model_of_which_every_layer_is_skipped_has_nothing_to_plan() -> None:
    with pytest.raises(InvalidFile, match="every layer of this model is skipped"):
        allocate(scores([1.0], [1.0], geometry(sliding(0), recurrent(1))), budget=2)


# Pins


@pytest.mark.parametrize("rule", ["exact", "norm-greedy"])
def test_pins_hold_and_are_paid_for(rule: str) -> None:
    source = scores([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
    plan = allocate(source, rule=rule, budget=3, bits=(2, 4), pins=["key:0=8", "value:1-2=1", "value:1=1"])
    assert (plan.layers[0].key.bits, plan.layers[1].value.bits, plan.layers[2].value.bits) == (8, 1, 1)
    assert plan.budget.nominal_bits <= 3


def test_a_star_pins_every_layer_to_plan() -> None:
    plan = allocate(uneven_scores(), budget=4, pins=["key:*=5"])
    assert key_bits(plan) == [5, 5, 5]


def test_pins_hold_for_rules_without_a_budget() -> None:
    source = scores([1.0, 2.0], [1.0, 2.0], metric="gradient_norm")
    assert key_bits(allocate(source, rule="uniform", bits_key=2, bits_value=2, pins=["key:1=16"])) == [2, 16]
    assert key_bits(allocate(source, rule="kvmix", pins=["key:0=6"])) == [6, 2]


@pytest.mark.parametrize(
    ("pins", "words"),
    [
        (["kye:0=8"], "pin 'kye:0=8'.*did you mean 'key'"),
        (["key:0"], "cannot read the pin 'key:0'"),
        (["key:-1=8"], "cannot read the pin"),
        (["key:0=7"], "pin 'key:0=7': '7' is not a width of codes; choose from 1, 2, 3, 4, 5, 6, 8, 16"),
        (["key:5=8"], "pin 'key:5=8': there is no layer 5 to plan; the last is 4"),
        (["value:0-2=8"], "pin 'value:0-2=8': layer 1 is skipped"),
        (["value:3-2=8"], "run backwards"),
        (["key:*=4", "key:0=8"], "pin 'key:0=8' sets the key of layer 0 to 8 bits, an earlier pin to 4"),
    ],
)
def test_a_wrong_pin_is_named(pins: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        allocate(uneven_scores(), budget=3, pins=pins)


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "exakt", "budget": 3}, "did you mean 'exact'"),
        ({}, "--rule exact needs a limit"),
        ({"rule": "norm-greedy"}, "--rule norm-greedy needs a limit"),
        ({"budget": 3, "memory": "1MB"}, "two limits"),
        ({"budget": 3, "context": 5}, "belong to --memory"),
        ({"memory": "1MB"}, "Add --context"),
        ({"memory": "1MB", "context": 5, "unit": "stored"}, "--unit belongs to --budget"),
        ({"budget": 3, "top_fraction": 0.2}, "exact takes no --top-fraction"),
        ({"budget": 3, "bits": (2, 7)}, "'7' is not a width"),
        ({"budget": 3, "bits": ()}, "no widths"),
        ({"budget": 3, "group_size": 0}, "--group-size 0: at least 1"),
        ({"rule": "kvmix", "budget": 2.3}, "kvmix takes no --budget"),
        ({"rule": "kvmix", "memory": "1MB"}, "kvmix takes no --memory"),
        ({"rule": "kvmix", "bits": (2, 4)}, "kvmix takes no --bits"),
        ({"rule": "kvmix", "metric": "spectral_norm"}, "kvmix takes no --metric"),
        ({"rule": "kvmix", "top_fraction": 1.5}, "not between 0 and 1"),
        ({"rule": "kvmix", "top_fraction": "many"}, "not between 0 and 1"),
        ({"budget": 3, "as_published": True}, "exact takes no --as-published"),
        ({"rule": "uniform", "bits_key": 4}, "needs the bits of both"),
        ({"rule": "uniform", "bits_key": 4, "bits_value": 7}, "'7' is not a width"),
        ({"rule": "uniform", "bits_key": 4, "bits_value": 2, "budget": 3}, "uniform takes no --budget"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        allocate(scores([1.0, 2.0], [1.0, 2.0]), **options)
