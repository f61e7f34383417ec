"""The cheapest plan below a predicted KL: brute force, the factor, bytes, and what cannot be reached."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from handmade import full, geometry, scored, scores
from hypothesis import given, settings
from hypothesis import strategies as st
from requested import allocate
from score_factories import random_scores

from kvprof.allocate.kl_target import rounded_up
from kvprof.errors import InfeasibleBudget, UsageError
from kvprof.records.formats import format_named

FORMATS = ("int2g64", "rot2", "int3g128", "int4g64", "int8g64")
TWO = geometry(full(0, 1), full(1, 2))
Layers = tuple[tuple[dict[str, int], dict[str, int]], ...]

tables = st.fixed_dictionaries({name: st.integers(0, 30) for name in FORMATS})


@settings(max_examples=100, deadline=None)
@given(layers=st.tuples(st.tuples(tables, tables), st.tuples(tables, tables)), limit=st.integers(0, 60))
@pytest.mark.parametrize("unit", ["stored", "nominal"])
def test_no_cheaper_plan_stays_below(unit: str, layers: Layers, limit: int) -> None:
    source = scored(*_thousandths(layers), geometry=TWO)
    costs = []
    tensors = [(heads, name, table) for heads, pair in zip((1, 2), layers, strict=True)
               for name, table in zip(("key", "value"), pair, strict=True)]  # fmt: skip
    for names in itertools.product(FORMATS, repeat=4):
        if sum(table[form] for (_, _, table), form in zip(tensors, names, strict=True)) <= limit:
            forms = [format_named(form, name, 64) for (_, name, _), form in zip(tensors, names, strict=True)]
            bits = [Fraction(form.bits) if unit == "nominal" else form.stored_bits(64) for form in forms]
            costs.append(sum(heads * each for (heads, _, _), each in zip(tensors, bits, strict=True)) / 6)
    max_kl = limit / 1000 * (1 + 1e-9)  # sums of floats are not sums of thousandths
    if not costs:
        with pytest.raises(InfeasibleBudget, match="is below what these formats are predicted to reach"):
            allocate(source, max_kl=max_kl, unit=unit)
        return
    plan = allocate(source, max_kl=max_kl, unit=unit)
    assert getattr(plan.budget, f"{unit}_bits") == float(min(costs))
    assert plan.solver.predicted_kl_nats <= max_kl
    assert (plan.solver.method, plan.solver.optimal) == ("exact", True)


def _thousandths(layers: Layers) -> list[tuple[dict[str, float], ...]]:
    return [tuple({form: loss / 1000 for form, loss in table.items()} for table in pair) for pair in layers]


@pytest.mark.parametrize("factor", [None, 1.7, 0.4])
@pytest.mark.parametrize("tie", [None, "key-value"])
def test_it_inverts_a_budget(factor: float | None, tie: str | None) -> None:
    source = random_scores(6, factor=factor)
    for budget in ("2.5", "3.0", "4.1"):
        spent = allocate(source, budget=budget, tie=tie)
        kl = spent.solver.predicted_kl_nats
        plan = allocate(source, max_kl=kl, tie=tie)
        assert plan.solver.predicted_kl_nats <= kl
        assert plan.budget.stored_bits <= spent.budget.stored_bits
        assert (plan.budget.requested, plan.budget.unit) == (None, None)
        less = allocate(source, max_kl=kl * 0.999, tie=tie)
        assert less.budget.stored_bits > plan.budget.stored_bits or less.solver.predicted_kl_nats <= kl * 0.999


def test_bytes_are_the_cost_where_a_context_is_given() -> None:
    source = random_scores(5)
    in_bytes = allocate(source, max_kl=0.004, context=300, batch=3)
    in_bits = allocate(source, max_kl=0.004)
    assert in_bytes.solver.predicted_kl_nats <= 0.004
    assert in_bytes.bytes_at(300, 3) <= in_bits.bytes_at(300, 3)
    assert in_bits.budget.stored_bits <= in_bytes.budget.stored_bits
    memory = in_bytes.bytes_at(300, 3) - 1
    assert allocate(source, memory=f"{memory}B", context=300, batch=3).solver.predicted_kl_nats > 0.004


def test_a_generous_limit_gets_the_cheapest_plan_of_all() -> None:
    source = random_scores(3)
    plan = allocate(source, max_kl=100)
    with pytest.raises(InfeasibleBudget, match=f"cheapest plan: {plan.budget.stored_bits:g} "):
        allocate(source, budget=1)


def test_what_an_error_suggests_can_be_reached() -> None:
    source = random_scores(3, factor=1.3)
    with pytest.raises(InfeasibleBudget) as caught:
        allocate(source, max_kl="1e-12")
    assert caught.value.exit_code == 3
    assert "1e-12 nats a token is below" in str(caught.value)
    reachable = str(caught.value).split("try --max-kl ")[1].split(",")[0]
    assert allocate(source, max_kl=reachable).solver.predicted_kl_nats <= float(reachable)


def test_full_precision_reaches_nothing_at_all() -> None:
    plan = allocate(random_scores(2), max_kl=0, bits=(2, 16))
    assert plan.budget.stored_bits == 16
    assert plan.solver.predicted_kl_nats == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_kl": "nan"}, "no KL divergence"),
        ({"max_kl": "-1"}, "no KL divergence"),
        ({"max_kl": "little"}, "no KL divergence"),
        ({"max_kl": 1, "budget": 3}, "leave out --budget and --memory"),
        ({"max_kl": 1, "memory": "1GiB", "context": 9}, "leave out --budget and --memory"),
        ({"max_kl": 1, "batch": 2}, "--batch needs to know"),
        ({"max_kl": 1, "context": 9, "unit": "stored"}, "Leave out one of them"),
        ({"max_kl": 1, "context": 0}, "does not exist"),
        ({"max_kl": 1, "unit": "storde"}, "did you mean 'stored'"),
        ({"max_kl": 1, "metric": "spectral_norm"}, "spectral_norm predicts no KL divergence"),
        ({"max_kl": 1, "rule": "norm-greedy"}, "norm-greedy takes no --max-kl"),
    ],
)
def test_requests_that_make_no_sense_are_refused(options: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        allocate(random_scores(2), **options)


def test_a_norm_foretells_no_kl() -> None:
    with pytest.raises(UsageError, match="a norm predicts no KL divergence"):
        allocate(scores([1.0], [1.0]), max_kl=0.01)


@pytest.mark.parametrize(
    ("nats", "text"), [(0.0, "0"), (0.0123401, "0.0124"), (0.01, "0.01"), (9.9991e-5, "0.0001"), (1.0001, "1.01")]
)
def test_a_limit_is_suggested_in_three_digits_and_never_too_low(nats: float, text: str) -> None:
    assert rounded_up(nats) == text
    assert float(rounded_up(nats)) >= nats
