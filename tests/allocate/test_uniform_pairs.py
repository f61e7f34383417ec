"""Uniform pairs: those that scores predict to be good, few enough to measure; brute force says which they are."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from handmade import full, geometry, scores
from requested import allocate
from score_factories import random_scores

from kvprof import Scores
from kvprof.allocate.assemble import tensors_of
from kvprof.allocate.baselines import baseline_plans
from kvprof.allocate.uniform_pairs import SCORED_PAIRS, UNSCORED_PAIRS, uniform_pairs
from kvprof.records.formats import Format, format_named

LAYERS = 6
SHAPE = geometry(*(full(layer, 3) for layer in range(LAYERS)))
TENSORS = tensors_of({layer.layer: layer for layer in SHAPE.planned})


def own_of(key: str, value: str) -> list[Format]:
    return [format_named(key if tensor.name == "key" else value, tensor.name, 64) for tensor in TENSORS]


def names(pairs: list[tuple[Format, ...]]) -> list[tuple[str, str]]:
    """The names of each pair, which must be one format for all keys and one for all values."""
    found = []
    for pair in pairs:
        keys, values = ({form.name for form in part} for part in (pair[:LAYERS], pair[LAYERS:]))
        assert len(keys) == len(values) == 1
        found.append((*keys, *values))
    return found


def predicted(source: Scores, pair: tuple[str, str]) -> float:
    return sum(
        entry.tensor(name).loss_increase[form]
        for entry in source.layers
        for name, form in zip(("key", "value"), pair, strict=True)
    )


def stored(pair: tuple[str, str]) -> Fraction:
    return sum(format_named(form, name, 64).stored_bits(64) for name, form in zip(("key", "value"), pair, strict=True))


@pytest.mark.parametrize("budget", [2.25, 2.5, 3.0, 3.5, 4.4])
def test_the_pairs_are_the_best_foretold_that_the_plan_s_bits_allow(budget: float) -> None:
    source = random_scores(LAYERS, seed=3)
    plan = allocate(source, budget=budget)
    own = [entry.key for entry in plan.layers] + [entry.value for entry in plan.layers]
    found = names(uniform_pairs(TENSORS, own, source))
    assert 0 < len(set(found)) == len(found) <= SCORED_PAIRS
    allowed = Fraction(plan.budget.stored_bits) * 2
    assert all(stored(pair) <= allowed for pair in found)
    every = itertools.product(*(source.layers[0].tensor(name).loss_increase for name in ("key", "value")))
    ranked = sorted((pair for pair in every if stored(pair) <= allowed), key=lambda pair: predicted(source, pair))
    assert found[0] == ranked[0]
    assert [predicted(source, pair) for pair in found] == sorted(predicted(source, pair) for pair in found)


def test_the_best_of_each_pure_family_is_among_them_however_poor() -> None:
    layers = []
    for entry in random_scores(LAYERS).model_dump(mode="json")["layers"]:
        for name in ("key", "value"):
            losses = entry[name]["loss_increase"]
            losses |= {f"int{bits}g64c": 0.5 - bits / 100 for bits in (2, 3, 4)}  # far worse than all others
            entry[name] = {"loss_increase": losses}
        layers.append(entry)
    source = Scores.model_validate({"schema": "kvprof.scores/1", "geometry": SHAPE, "layers": layers})
    found = names(uniform_pairs(TENSORS, own_of("int4g64", "int4g64"), source))
    assert len(found) == SCORED_PAIRS
    for family in ("rot", "c", "g64"):
        assert any(all(family in form or form.endswith(family) for form in pair) for pair in found)
    assert ("int4g64c", "int4g64c") in found


@pytest.mark.parametrize(
    "pair", [("int3g64", "rot2"), ("int5g32", "int5g32"), ("full", "rot2"), ("int1g256", "int1g16")]
)
def test_a_plan_that_is_a_pair_is_among_them_scored_or_not(pair: tuple[str, str]) -> None:
    own = own_of(*pair)
    for source in (random_scores(LAYERS), None):
        found = names(uniform_pairs(TENSORS, own, source))
        assert pair[0] in {key for key, value in found if value == format_named(pair[1], "value", 64).name}


def test_without_losses_their_number_is_bounded_all_the_same() -> None:
    forms = [
        format_named(name, "key", 64) for name in ("int2g64", "int3g128", "int4g32c", "rot3", "int2g128c", "int6g64")
    ]
    values = [
        format_named(name, "value", 64) for name in ("rot1", "rot2", "int2g64", "int3g32c", "int4g16", "int8g64c")
    ]
    own = [*forms, *values]
    found = names(uniform_pairs(TENSORS, own))
    assert len(found) == UNSCORED_PAIRS
    assert uniform_pairs(TENSORS, own, scores([1.0] * LAYERS, [1.0] * LAYERS, SHAPE)) == uniform_pairs(TENSORS, own)


def test_a_plan_cheaper_than_all_scored_pairs_is_met_by_pairs_of_its_own_kind() -> None:
    found = names(uniform_pairs(TENSORS, own_of("int1g128", "rot1"), random_scores(LAYERS)))
    assert ("int1g128", "rot1") in found


def test_the_rivals_of_a_plan_by_losses_are_these_pairs() -> None:
    source = random_scores(LAYERS, seed=3)
    layers = [
        entry
        | {
            name: entry[name] | {"gradient_norm": 1.0, "spectral_norm": 2.0, "frobenius_norm": 3.0}
            for name in ("key", "value")
        }
        for entry in source.model_dump(mode="json")["layers"]
    ]
    every = Scores.model_validate(source.model_dump(mode="json", by_alias=True) | {"layers": layers})
    plan = allocate(source, budget=3)
    rivals = dict(baseline_plans(plan, every, every))["uniform"]
    assert 0 < len(rivals) <= SCORED_PAIRS
    assert all(rival.budget.stored_bits <= plan.budget.stored_bits for rival in rivals)
    assert (rivals[0].window, rivals[0].quantizer) == (plan.window, plan.quantizer)
