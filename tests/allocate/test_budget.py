"""Units, exactly: a plan's cost recomputed in fractions, the feasible range, bytes against BitPlan.bytes_at."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest
from handmade import full, geometry, scores, uneven_scores
from requested import allocate

from kvprof import BitPlan, Scores
from kvprof.allocate.budget import bit_limit, memory_limit
from kvprof.errors import InfeasibleBudget, UsageError
from kvprof.records.geometry import KVLayer, RecurrentState
from kvprof.records.plan import Window
from kvprof.records.requests.plan import AllocateRequest
from kvprof.records.words import parse_memory

GIB = 2**30


def average_bits(plan: BitPlan, unit: str) -> Fraction:
    """Recompute a plan's bits per element from its entries and its geometry alone, exactly."""
    total, width = Fraction(0), 0
    for entry in plan.layers:
        shape = plan.geometry.layers[entry.layer] if plan.geometry else None
        for form, head_dim in (
            (entry.key, shape.key_head_dim if shape else None),
            (entry.value, shape.value_head_dim if shape else None),
        ):
            elements = shape.kv_heads * head_dim if shape else 1
            bits = Fraction(form.bits)
            if unit == "stored" and form.bits < 16:
                if form.axis == "channel" or head_dim is None:
                    bits += Fraction(32, form.group_size)
                else:
                    bits += Fraction(32 * (-(-head_dim // form.group_size)), head_dim)
            total, width = total + bits * elements, width + elements
    return total / width


def test_no_plan_exceeds_its_budget() -> None:
    rng = random.Random(0)
    feasible = 0
    for _ in range(2000):
        size = rng.randint(1, 4)
        dims = (64, 80, 96, 128, 192)
        shapes = [full(layer, rng.randint(1, 8), rng.choice(dims), rng.choice(dims)) for layer in range(size)]
        numbers = [[rng.choice([0.0, 1.0, rng.lognormvariate(0, 3)]) for _ in shapes] for _ in "kv"]
        unit = rng.choice(["nominal", "stored"])
        budget = f"{rng.uniform(1, 10):.{rng.randint(0, 6)}f}"
        try:
            plan = allocate(
                scores(*numbers, geometry(*shapes) if rng.random() < 0.7 else None),
                rule=rng.choice(["exact", "norm-greedy"]),
                budget=budget,
                unit=unit,
                group_size=rng.choice([16, 32, 48, 128]),
            )
        except InfeasibleBudget:
            continue
        feasible += 1
        assert average_bits(plan, unit) <= Fraction(budget)
        assert getattr(plan.budget, f"{unit}_bits") <= plan.budget.requested == float(budget)
        assert plan.budget.nominal_bits == float(average_bits(plan, "nominal"))
        assert plan.budget.stored_bits == float(average_bits(plan, "stored"))
    assert feasible > 1000


@pytest.mark.parametrize("budget", ["2.3", 2.3, "2.30", "23e-1"])
def test_a_budget_is_the_decimal_number_it_is_written_as(budget: str | float) -> None:
    assert bit_limit(budget).amount == Fraction(23, 10)
    plan = allocate(scores([1.0] * 5, [1.0] * 5), budget=budget, bits=(2, 3))
    assert average_bits(plan, "nominal") == Fraction(23, 10)
    assert plan.budget.nominal_bits == plan.budget.requested == 2.3


@pytest.mark.parametrize("budget", ["two", "nan", "inf", "", "2,5", "1e999999999", "1e-999999999"])
def test_a_budget_that_is_no_number_is_refused(budget: str) -> None:
    with pytest.raises(UsageError, match="is not a number of bits"):
        bit_limit(budget)


@pytest.mark.parametrize("budget", ["0", "-1", "1e-3"])
def test_a_number_that_no_plan_can_meet_is_infeasible(budget: str) -> None:
    with pytest.raises(InfeasibleBudget, match="cheapest plan: 1 "):
        allocate(scores([1.0] * 5, [1.0] * 5), budget=budget)


def test_the_advice_for_a_budget_that_pins_make_infeasible_names_the_pins() -> None:
    with pytest.raises(InfeasibleBudget, match="loosen --pin"):
        allocate(scores([1.0] * 5, [1.0] * 5), budget="2.5", pins=["key:*=8"])
    with pytest.raises(InfeasibleBudget) as caught:
        allocate(scores([1.0] * 5, [1.0] * 5), budget="5", pins=["key:*=8", "value:*=1"])
    assert "--bits" not in str(caught.value)


def test_an_unknown_unit_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'stored'"):
        bit_limit("2.5", "storde")


@pytest.mark.parametrize(
    ("budget", "unit", "words"),
    [
        (
            "1.99",
            "nominal",
            ["1.99 nominal bits per element is below", "cheapest plan: 2 ", "try --budget 2,", "below 2"],
        ),
        ("8.01", "nominal", ["8.01 nominal bits per element is more", "dearest: 8", "try --budget 8,", "above 8"]),
        ("2.9999999", "stored", ["2.9999999 stored", "cheapest plan: 3 ", "try --budget 3,", "larger --group-size"]),
        ("9.5", "stored", ["dearest: 9\n", "try --budget 9,"]),
    ],
)
def test_an_infeasible_budget_names_the_feasible_range(budget: str, unit: str, words: list[str]) -> None:
    with pytest.raises(InfeasibleBudget) as caught:
        allocate(scores([1.0, 2.0], [3.0, 4.0]), budget=budget, unit=unit, bits=(2, 4, 8))
    assert caught.value.exit_code == 3
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("rule", ["exact", "norm-greedy"])
@pytest.mark.parametrize("unit", ["nominal", "stored"])
def test_both_ends_of_the_range_that_an_error_names_are_feasible(rule: str, unit: str) -> None:
    for impossible, word in (("0.001", "cheapest plan:"), ("99", "dearest:")):
        with pytest.raises(InfeasibleBudget) as caught:
            allocate(uneven_scores(), rule=rule, budget=impossible, unit=unit, group_size=48)
        end = str(caught.value).split(word)[1].split()[0]
        assert allocate(uneven_scores(), rule=rule, budget=end, unit=unit, group_size=48).layers


def test_memory_ends_of_the_range_are_feasible_and_exact() -> None:
    for impossible, word in (("1B", "cheapest plan:"), ("1TiB", "dearest:")):
        with pytest.raises(InfeasibleBudget) as caught:
            allocate(uneven_scores(), memory=impossible, context=5000)
        end = str(caught.value).split(word)[1].split()[0]
        plan = allocate(uneven_scores(), memory=end, context=5000)
        assert plan.bytes_at(5000) == parse_memory(end)


@pytest.mark.parametrize("rule", ["exact", "norm-greedy"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("context", "batch"), [(700, 1), (4096, 3), (12345, 7)])
def test_a_memory_budget_is_what_the_plan_says_it_takes(rule: str, dtype: str, context: int, batch: int) -> None:
    source = uneven_scores(dtype)
    low = allocate(source, rule="uniform", bits_key=1, bits_value=1).bytes_at(context, batch)
    high = allocate(source, rule="uniform", bits_key=8, bits_value=8).bytes_at(context, batch)
    for share in (0, 0.2, 0.5, 0.9, 1):
        memory = low + round(share * (high - low))
        plan = allocate(source, rule=rule, memory=f"{memory}B", context=context, batch=batch)
        assert plan.bytes_at(context, batch) <= memory == plan.budget.requested
        assert plan.budget.unit == "bytes"
    assert plan.bytes_at(context, batch) == high


def test_a_memory_budget_buys_the_best_plan_of_all() -> None:
    shape = geometry(full(0, 1, 64, 80), full(1, 2, 64, 64))
    source = scores([5.0, 3.0], [2.0, 4.0], shape)
    plans = [
        allocate(source, rule="uniform", bits_key=2, bits_value=2, metric="spectral_norm", pins=pins)
        for pins in (
            [f"key:0={a}", f"key:1={b}", f"value:0={c}", f"value:1={d}"]
            for a, b, c, d in itertools.product((1, 2, 4, 8), repeat=4)
        )
    ]
    memory = sum(extreme(plan.bytes_at(1000) for plan in plans) for extreme in (min, max)) // 2
    best = min(plan.solver.objective for plan in plans if plan.bytes_at(1000) <= memory)
    plan = allocate(source, memory=f"{memory}B", context=1000, bits=(1, 2, 4, 8))
    assert plan.solver.objective == pytest.approx(best, rel=1e-12)


def test_memory_within_the_window_needs_no_codes() -> None:
    source = scores([1.0], [1.0], geometry(full(0)))
    plan = allocate(source, memory="51200B", context=100, window=Window(sink_tokens=4, recent_tokens=128))
    assert plan.bytes_at(100) == 51200


def test_memory_needs_a_geometry() -> None:
    with pytest.raises(UsageError, match="carry no geometry"):
        allocate(scores([1.0], [1.0]), memory="1GiB", context=100)


def test_memory_needs_the_size_of_every_recurrent_state() -> None:
    recurrent = KVLayer(layer=1, kind="recurrent", kv_heads=0, key_head_dim=0, value_head_dim=0, skipped="a state")
    with pytest.raises(UsageError, match="the size of the recurrent states of layer 1 is not known"):
        allocate(scores([1.0], [1.0], geometry(full(0), recurrent)), memory="1GiB", context=100)
    counted = recurrent.model_copy(update={"state": RecurrentState(elements=1000, float32_elements=10)})
    known = geometry(full(0), counted)
    window = Window(sink_tokens=4, recent_tokens=128)
    plan = allocate(scores([1.0], [1.0], known), memory=f"{51200 + 2040}B", context=100, window=window)
    assert plan.bytes_at(100) == 51200 + 1000 * known.element_bytes + 10 * 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("bits", [2, 16])
def test_bytes_per_token_are_what_one_more_token_costs_in_the_long_run(dtype: str, bits: int) -> None:
    plan = allocate(uneven_scores(dtype), rule="uniform", bits_key=bits, bits_value=3)
    assert plan.budget.bytes_per_token == (plan.bytes_at(40_132) - plan.bytes_at(20_132)) / 20_000


def test_bytes_per_token_are_unknown_without_a_geometry() -> None:
    budget = allocate(scores([1.0], [1.0]), rule="uniform", bits_key=2, bits_value=4).budget
    assert (budget.nominal_bits, budget.stored_bits, budget.bytes_per_token) == (3.0, 4.0, None)
    assert (budget.requested, budget.unit) == (None, None)


def test_averages_weigh_each_tensor_by_its_cached_width() -> None:
    source: Scores = scores([1.0], [1.0], geometry(full(0, 1, 64, 192)))
    budget = allocate(source, rule="uniform", bits_key=8, bits_value=4).budget
    assert (budget.nominal_bits, budget.stored_bits) == (5.0, 6.0)
    assert budget.bytes_per_token == 256 * 6 / 8


def test_full_precision_counts_sixteen_bits_and_no_scales() -> None:
    budget = allocate(scores([1.0], [1.0]), rule="uniform", bits_key=16, bits_value=2).budget
    assert (budget.nominal_bits, budget.stored_bits) == (9.0, 9.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1B", 1),
        ("1.5GiB", GIB * 3 // 2),
        ("800 MB", 800 * 10**6),
        ("2KiB", 2048),
        ("2kb", 2000),
        ("0.1MiB", 104857),
        ("1TB", 10**12),
        ("3 tib", 3 * 2**40),
        (" 1GB ", 10**9),
        ("2MiB", 2**21),
    ],
)
def test_memory_is_read_with_its_unit(text: str, expected: int) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GiB", "5", "-1GiB", "1.5.2GB", "1e3MB", "nan GB", "0GiB", "0.5B", "1GiBs", "9" * 99]
)
def test_memory_that_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"memory|unknown unit"):
        parse_memory(text)


def test_a_misspelt_memory_unit_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown unit 'GiBs'.*did you mean 'GiB'"):
        parse_memory("3GiBs")


@pytest.mark.parametrize(("context", "batch"), [(0, 1), (10, 0), (-5, 2)])
def test_a_cache_of_nothing_is_refused(context: int, batch: int) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        memory_limit("1GiB", context, batch)


def test_bits_are_read_ascending_and_once() -> None:
    assert AllocateRequest.of({"bits": "8, 2,4,2,16"}).bits == (2, 4, 8, 16)


@pytest.mark.parametrize("text", ["", "7", "2,,3", "2;3", "two", "0", "-1", "2.0"])
def test_bits_that_no_codes_have_are_refused_with_those_that_they_have(text: str) -> None:
    with pytest.raises(UsageError, match="choose from 1, 2, 3, 4, 5, 6, 8, 16"):
        AllocateRequest.of({"bits": text})


@pytest.mark.parametrize(("context", "batch"), [(2**62, 1), (2**53, 2**53), (2**36 + 1, 1)])
def test_more_tokens_than_any_cache_holds_are_refused(context: int, batch: int) -> None:
    with pytest.raises(UsageError, match=f"{batch} sequences of {context} tokens are more than 68719476736 tokens"):
        memory_limit("1GiB", context, batch)
