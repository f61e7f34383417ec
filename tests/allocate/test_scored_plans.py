"""Plans by `loss_increase`: brute force over all formats, what may be chosen, pins, ties, what a plan predicts."""

from __future__ import annotations

import itertools
import math
import statistics
from fractions import Fraction
from typing import Any

import pytest
from handmade import format_names, full, geometry, recurrent, scored, scores, sliding
from hypothesis import given, settings
from hypothesis import strategies as st
from requested import allocate
from score_factories import random_scores

from kvprof import BitPlan, Scores
from kvprof.allocate.dispatch import allocate_as_asked
from kvprof.allocate.losses import stderr_of_mean
from kvprof.allocate.prediction import predict
from kvprof.errors import InfeasibleBudget, InvalidFile, UsageError
from kvprof.records.formats import format_named
from kvprof.records.plan import Window
from kvprof.records.requests.plan import AllocateRequest

KEYS = {"int2g64": 0.3, "int3g64": 0.1, "int4g64": 0.02, "int4g128": 0.03, "rot2": 0.2, "int8g64": 0.001}
VALUES = {"rot1": 0.5, "rot2": 0.15, "int2g64": 0.25, "int4g64": 0.02, "int8g64": 0.002}
TWO = geometry(full(0, 1, 64, 64), full(1, 2, 64, 64))


def two_layers(shape: Any = TWO, **fields: Any) -> Scores:
    """Two layers, the second's keys and the first's values more sensitive; the second layer is twice as wide."""
    worse = {name: 3 * loss for name, loss in KEYS.items()}
    fine = {name: loss / 5 for name, loss in VALUES.items()}
    return scored((KEYS, VALUES), (worse, fine), geometry=shape, **fields)


def by_brute_force(source: Scores, budget: Fraction, unit: str, allows: Any = lambda keys, values: True) -> float:
    """The least sum of losses of all plans within a budget, from the names' own definition."""
    tensors = []
    for entry in source.layers:
        heads = 1 if source.geometry is None else source.geometry.layers[entry.layer].kv_heads
        for name in ("key", "value"):
            losses = entry.tensor(name).loss_increase
            tensors.append([(format_named(word, name, 64), heads, loss) for word, loss in losses.items()])
    width = sum(choices[0][1] for choices in tensors)
    best = math.inf
    for picked in itertools.product(*tensors):
        bits = sum(heads * (form.bits if unit == "nominal" else form.stored_bits(64)) for form, heads, _ in picked)
        if bits <= budget * width and allows([p[0] for p in picked[::2]], [p[0] for p in picked[1::2]]):
            best = min(best, sum(loss for _, _, loss in picked))
    return best


# What is best


@pytest.mark.parametrize("unit", ["stored", "nominal"])
@pytest.mark.parametrize("budget", ["1.8", "2.25", "2.5", "3", "3.7", "5", "8"])
def test_bits_groups_and_quantizers_are_chosen_together(budget: str, unit: str) -> None:
    plan = allocate(two_layers(), budget=budget, unit=unit)
    assert plan.solver.objective == pytest.approx(by_brute_force(two_layers(), Fraction(budget), unit), rel=1e-12)
    assert (plan.solver.method, plan.solver.metric, plan.solver.optimal) == ("exact", "loss_increase", True)
    assert getattr(plan.budget, f"{unit}_bits") <= float(budget)


losses = st.floats(0, 1, allow_subnormal=False)
tables = st.dictionaries(st.sampled_from(["int2g64", "int3g64c", "rot2", "rot4", "int8g64"]), losses, min_size=1)


@settings(max_examples=100, deadline=None)
@given(layers=st.lists(st.tuples(tables, tables), min_size=1, max_size=3), budget=st.integers(16, 90))
@pytest.mark.parametrize("tie", [None, "key-value"])
def test_no_plan_within_the_budget_loses_less(tie: str | None, layers: Any, budget: int) -> None:
    source = scored(*layers, geometry=geometry(*(full(layer, layer + 1) for layer in range(len(layers)))))

    def equal(keys: Any, values: Any) -> bool:
        return tie is None or all(key.bits == value.bits for key, value in zip(keys, values, strict=True))

    least = by_brute_force(source, Fraction(budget, 10), "stored", equal)
    try:
        plan = allocate(source, budget=budget / 10, tie=tie)
    except (InfeasibleBudget, UsageError):  # above the dearest plan, below the cheapest, or no width in common
        return
    assert plan.solver.objective == pytest.approx(least, rel=1e-11, abs=1e-300)


def test_a_budget_means_stored_bits_where_formats_are_known() -> None:
    plan = allocate(two_layers(), budget=2.5)
    assert (plan.budget.unit, plan.budget.requested) == ("stored", 2.5)
    assert plan.budget.stored_bits <= 2.5
    assert allocate(scores([1.0], [1.0]), budget=2.5).budget.unit == "nominal"


def test_a_memory_budget_counts_window_and_part_filled_groups() -> None:
    plan = allocate(two_layers(), memory="400KiB", context=700, batch=2)
    assert plan.bytes_at(700, 2) <= 400 * 1024
    better = [allocate(two_layers(), budget=bits) for bits in (2, 2.5, 3, 3.5, 4, 5, 6)]
    fitting = [other.solver.objective for other in better if other.bytes_at(700, 2) <= 400 * 1024]
    assert plan.solver.objective <= min(fitting)


def test_layers_that_are_skipped_need_no_losses() -> None:
    shape = geometry(full(0), sliding(1), recurrent(2), full(3))
    source = scored((KEYS, VALUES), ({}, {}), (KEYS, VALUES), geometry=shape)
    assert source.metrics == ("loss_increase",)
    assert [entry.layer for entry in allocate(source, budget=3).layers] == [0, 3]


# The default metric


def test_losses_are_preferred_where_every_planned_tensor_has_them() -> None:
    norms = [
        {"layer": n, **{name: {"spectral_norm": 1.0 + n, "loss_increase": {"int2g64": 0.1, "int4g64": 0.01}}
                        for name in ("key", "value")}}
        for n in range(2)
    ]  # fmt: skip
    both = Scores.model_validate({"schema": "kvprof.scores/1", "layers": norms})
    assert both.metrics == ("loss_increase", "spectral_norm")
    assert allocate(both, budget=3).solver.metric == "loss_increase"
    assert allocate(both, budget=3, metric="spectral_norm").budget.unit == "nominal"
    assert allocate(both, budget=3, rule="norm-greedy").solver.metric == "spectral_norm"
    del norms[1]["value"]["loss_increase"]
    partly = Scores.model_validate({"schema": "kvprof.scores/1", "layers": norms})
    assert allocate(partly, budget=3).solver.metric == "spectral_norm"
    with pytest.raises(InvalidFile, match="no loss_increase for the value of layer 1"):
        allocate(partly, budget=3, metric="loss_increase")


def test_norm_greedy_does_not_spend_losses() -> None:
    with pytest.raises(UsageError, match=r"one number a tensor(.|\n)*--rule exact"):
        allocate(two_layers(), budget=3, rule="norm-greedy", metric="loss_increase")
    with pytest.raises(InvalidFile, match="no spectral_norm"):
        allocate(two_layers(), budget=3, rule="norm-greedy")


# What may be chosen


def test_bits_restrict_the_widths_and_sixteen_is_full_precision_for_nothing() -> None:
    plan = allocate(two_layers(), budget=3, bits=(2, 3))
    assert {entry.tensor(name).bits for entry in plan.layers for name in ("key", "value")} <= {2, 3}
    plan = allocate(two_layers(), budget=13, bits=(2, 16))
    assert "full" in {name for pair in format_names(plan) for name in pair}
    assert plan.solver.objective < allocate(two_layers(), budget="2.375", bits=(2,)).solver.objective
    assert "full" not in {name for pair in format_names(allocate(two_layers(), budget=8)) for name in pair}


def test_a_group_size_restricts_formats_that_have_one() -> None:
    plan = allocate(two_layers(), budget=4.25, group_size=128)
    assert {key for key, _ in format_names(plan)} <= {"int4g128", "rot2"}  # values of 64 channels have groups of 64
    with pytest.raises(UsageError, match=r"--group-size 32: no format of such groups(.|\n)*int2g64, int3g64"):
        allocate(two_layers(), budget=3, group_size=32)


def test_formats_are_named_for_both_or_one_of_the_tensors() -> None:
    plan = allocate(two_layers(), budget=3, formats="rot2,key:int4g64")
    assert {key for key, _ in format_names(plan)} <= {"rot2", "int4g64"}
    assert {value for _, value in format_names(plan)} == {"rot2"}
    plan = allocate(two_layers(), budget=3, formats="key:rot2")
    assert {key for key, _ in format_names(plan)} == {"rot2"}
    assert len({value for _, value in format_names(plan)}) > 1
    plan = allocate(two_layers(), budget=9, formats="rot2,rot1,full")  # rot1 was scored for values alone
    assert {name for pair in format_names(plan) for name in pair} <= {"rot1", "rot2", "full"}
    assert "int2g64" in {
        value for _, value in format_names(allocate(two_layers(), budget="2.375", formats="int2g128,key:rot2"))
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"formats": "int5g64"}, r"--formats: int5g64 was not scored for keys or values(.|\n)*rot1"),
        ({"formats": "key:rot1"}, r"rot1 was not scored for keys.\n  scored: int2g64, int3g64"),
        ({"formats": "int2"}, "'int2' is no format"),
        ({"formats": ""}, "is no format"),
        ({"bits": (5,)}, r"key of layer 0 is left to choose from(.|\n)*scored: int2g64"),
        ({"formats": "rot2", "bits": (3,)}, "is left to choose from"),
        ({"group_size": 0}, "--group-size 0: at least 1"),
        ({"min_key_bits": 0}, "--min-key-bits 0: at least 1"),
        ({"min_key_bits": 9}, r"leaves the key of layer 0 no format(.|\n)*at most 8 bits"),
        ({"tie": "kv"}, "unknown --tie 'kv'"),
    ],
)
def test_what_cannot_be_chosen_is_an_error_that_says_what_can(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        allocate(two_layers(), budget=3, **options)


def test_a_norm_knows_no_formats() -> None:
    with pytest.raises(UsageError, match="spectral_norm knows no formats"):
        allocate(scores([1.0], [1.0]), budget=3, formats="int2g64")


@pytest.mark.parametrize("rule", ["exact", "norm-greedy"])
def test_keys_can_be_given_a_least_width(rule: str) -> None:
    source = two_layers() if rule == "exact" else scores([0.1, 0.2], [5.0, 9.0], TWO)
    plan = allocate(source, rule=rule, budget="3.5", min_key_bits=4)
    assert min(entry.key.bits for entry in plan.layers) >= 4
    assert min(entry.value.bits for entry in plan.layers) < 4


def test_formats_of_another_runtime_are_left_to_its_plans() -> None:
    source = scored(({**KEYS, "q4_0": 1e-9, "MXFP4": 0.0}, {**VALUES, "q8_0": 1e-9}))
    assert set(source.passed_over) == {"MXFP4", "rot1", "rot2"}  # of heads that nobody described
    assert allocate(source, budget=3).solver.objective > 1e-3
    with pytest.raises(InvalidFile, match="key of layer 0 is one that a plan can give it"):
        allocate(scored(({"MXFP4": 0.1}, {"MXFP4": 0.1})), budget=3)
    with pytest.raises(UsageError, match=r"key of layer 0 is other runtimes': q4_0\.\n.*--target"):
        allocate(scored(({"q4_0": 0.1}, {"q4_0": 0.1})), budget=3)


def test_without_a_geometry_keys_and_values_are_equally_wide_and_nothing_is_rotated() -> None:
    plan = allocate(two_layers(shape=None), budget=3)
    assert plan.budget.stored_bits <= 3
    assert plan.budget.bytes_per_token is None
    assert {name[:3] for pair in format_names(plan) for name in pair} == {"int"}


def test_heads_that_cannot_be_rotated_are_given_other_formats() -> None:
    shape = geometry(full(0, 1, 80, 80), full(1, 1, 64, 64))
    plan = allocate(two_layers(shape=shape), budget="2.7")
    assert format_names(plan)[0][0].startswith("int")


@pytest.mark.parametrize("options", [{"budget": 3}, {"budget": 3, "tie": "key-value"}, {"max_kl": 1e308}])
def test_losses_too_large_to_add_up_are_refused(options: dict[str, Any]) -> None:
    table = {"int2g64": 1.7e308, "int4g64": 1.6e308}
    with pytest.raises(InvalidFile, match="too large to add up"):
        allocate(scored((table, table)), **options)
    with pytest.raises(InvalidFile, match="too large to add up"):
        allocate(scored((table, table)), rule="uniform", formats="int2g64")


def test_what_is_said_of_a_plan_whose_losses_cannot_be_added_up_is_refused_too() -> None:
    table = {"int2g64": 1.7e308, "int4g64": 1.0}
    plan = allocate(scored(({"int2g64": 1.0}, {"int2g64": 1.0})), budget=2.5)
    with pytest.raises(InvalidFile, match="too large to add up"):
        predict(plan, scored((table, table)))


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_the_error_of_a_mean_is_that_of_numbers_of_any_size(scale: float) -> None:
    samples = [0.5, 2.0, 1.25, 7.0]
    expected = statistics.stdev(samples) / 2
    assert stderr_of_mean([scale * sample for sample in samples]) == pytest.approx(scale * expected, rel=1e-12)


def test_losses_of_nothing_make_the_cheapest_plan() -> None:
    table = {"int2g64": 0.0, "int4g64": 0.0}
    plan = allocate(scored((table, table)), budget=4)
    assert plan.budget.stored_bits == 2.5
    assert (plan.solver.predicted_kl_nats, plan.solver.optimal) == (0.0, True)


# Pins


def test_a_pin_by_width_takes_the_best_scored_format_of_that_width() -> None:
    plan = allocate(two_layers(), budget=4.5, pins=["key:0=4", "value:*=2"])
    assert format_names(plan)[0][0] == "int4g64"
    assert {value for _, value in format_names(plan)} == {"rot2"}
    poor = allocate(two_layers(), budget="2.6", pins=["key:0=4", "key:1=2", "value:*=2"])
    assert format_names(poor)[0][0] == "int4g128"  # the finer groups do not fit


def test_a_pin_by_name_and_full_precision_can_always_be_had() -> None:
    pins = ["key:0=int4g128", "key:1=full", "value:0=16", "value:1=rot1"]
    plan = allocate(two_layers(), budget="9.125", pins=pins, formats="int8g64", bits=(8,))
    assert format_names(plan) == [("int4g128", "full"), ("full", "rot1")]
    assert plan.solver.objective == pytest.approx(0.03 + 0.5 / 5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pins": ["key:0=5"]}, r"pin 'key:0=5': 5 bits was not scored for the key of layer 0(.|\n)*int4g128"),
        ({"pins": ["value:1=int4g32"]}, r"int4g32 was not scored for the value of layer 1"),
        ({"pins": ["key:0=int7g64"]}, "pin 'key:0=int7g64': 'int7g64' is no format"),
        ({"pins": ["key:0=4", "key:0=int4g64"]}, "sets the key of layer 0 to int4g64, an earlier pin to 4"),
        ({"pins": ["key:0=3"], "group_size": 128}, "3 bits in groups of 128 was not scored"),
        ({"pins": ["key:1=2"], "min_key_bits": 4}, r"pin 'key:1=2'(.|\n)*--min-key-bits asks for 4"),
        ({"pins": ["key:1=4", "value:1=2"], "tie": "key-value"}, "keys may have 4 bits, values 2"),
        ({"pins": ["value:0=1"], "tie": "key-value"}, "layer 0 have no width in common"),
    ],
)
def test_pins_that_contradict_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        allocate(two_layers(), budget=3, **options)


def test_a_pin_names_a_format_where_none_was_scored_too() -> None:
    source = scores([1.0, 2.0], [1.0, 2.0], TWO)
    plan = allocate(source, budget=4, pins=["key:0=int4g64c", "value:1=rot3"])
    assert (plan.layers[0].key.name, plan.layers[1].value.name) == ("int4g64c", "rot3")
    with pytest.raises(UsageError, match="pin 'value:0=rot3', layer 0: rot3 needs a head dimension"):
        allocate(scores([1.0], [1.0]), budget=4, pins=["value:0=rot3"])


# Ties


@pytest.mark.parametrize("metric", ["loss_increase", "spectral_norm"])
def test_tied_keys_and_values_have_codes_of_one_width(metric: str) -> None:
    source = two_layers() if metric == "loss_increase" else scores([9.0, 1.0], [1.0, 5.0], TWO)
    plan = allocate(source, budget=4, tie="key-value")
    assert all(entry.key.bits == entry.value.bits for entry in plan.layers)
    free = allocate(source, budget=4)
    assert free.solver.objective <= plan.solver.objective


def test_the_range_of_tied_budgets_is_that_of_tied_plans() -> None:
    with pytest.raises(InfeasibleBudget, match=r"cheapest plan: 2\.25 .*dearest: 8\.5"):
        allocate(two_layers(), budget=2, tie="key-value")
    assert allocate(two_layers(), budget="2.25", tie="key-value").budget.stored_bits == 2.25


# What a plan predicts


def test_the_predicted_kl_is_the_sum_times_the_factor() -> None:
    plain, calibrated = (random_scores(4, factor=factor) for factor in (None, 1.75))
    plans = [allocate(source, budget=2.75) for source in (plain, calibrated)]
    assert plans[0].layers == plans[1].layers
    assert plans[0].solver.predicted_kl_nats == plans[0].solver.objective == plans[1].solver.objective
    assert plans[1].solver.predicted_kl_nats == pytest.approx(1.75 * plans[1].solver.objective, rel=1e-15)
    ratio = plans[1].solver.predicted_kl_stderr_nats / plans[0].solver.predicted_kl_stderr_nats
    assert ratio == pytest.approx(1.75)


def test_the_standard_error_is_that_of_the_sequences_sums() -> None:
    source = random_scores(3, sequences=8)
    plan = allocate(source, budget=3)
    sums = [0.0] * 8
    for entry, measured in zip(plan.layers, source.layers, strict=True):
        for name in ("key", "value"):
            samples = measured.tensor(name).loss_increase_samples[entry.tensor(name).name]
            sums = [total + sample for total, sample in zip(sums, samples, strict=True)]
    mean = sum(sums) / 8
    variance = sum((total - mean) ** 2 for total in sums) / 7
    assert plan.solver.predicted_kl_stderr_nats == pytest.approx(math.sqrt(variance / 8))


def test_without_samples_errors_add_up_as_if_independent_and_full_precision_has_none() -> None:
    tensor = {"loss_increase": {"int2g64": 0.1}, "loss_increase_stderr": {"int2g64": 0.03}}
    layers = [{"layer": 0, "key": tensor, "value": tensor | {"loss_increase_stderr": {"int2g64": 0.04}}}]
    source = Scores.model_validate({"schema": "kvprof.scores/1", "layers": layers})
    assert allocate(source, budget=2.5).solver.predicted_kl_stderr_nats == pytest.approx(0.05)
    pinned = allocate(source, budget="9.25", pins=["key:0=16"])
    assert pinned.solver.predicted_kl_stderr_nats == pytest.approx(0.04)
    assert allocate(two_layers(), budget=3).solver.predicted_kl_stderr_nats is None


def test_a_uniform_plan_foretells_its_kl_where_its_formats_were_scored() -> None:
    plan = allocate(two_layers(), rule="uniform", bits_key=4, bits_value=2, group_size=64)
    assert plan.solver.objective == pytest.approx(0.02 * 4 + 0.25 * 1.2)
    assert (plan.solver.metric, plan.solver.optimal) == ("loss_increase", False)
    unknown = allocate(two_layers(), rule="uniform", bits_key=4, bits_value=2)  # groups of 32
    assert (unknown.solver.objective, unknown.solver.predicted_kl_nats) == (None, None)


def test_a_uniform_plan_can_be_named_by_its_formats() -> None:
    plan = allocate(two_layers(), rule="uniform", formats="key:int4g128,value:rot2")
    assert format_names(plan) == [("int4g128", "rot2")] * 2
    assert plan.solver.predicted_kl_nats == pytest.approx(0.03 * 4 + 0.15 * 1.2)
    for formats in ("rot2,rot3", "key:rot2"):
        with pytest.raises(UsageError, match="needs one format for"):
            allocate(two_layers(), rule="uniform", formats=formats)
    with pytest.raises(UsageError, match="give one of them"):
        allocate(two_layers(), rule="uniform", formats="rot2", bits_key=4)


def test_a_plan_has_the_window_that_its_scores_were_measured_with() -> None:
    decoding = {"window": {"sink_tokens": 2, "recent_tokens": 64}, "suffix_fraction": 0.5, "tokens": 512}
    assert allocate(two_layers(), budget=3).window == Window(sink_tokens=4, recent_tokens=128)
    measured = two_layers(decoding=decoding)
    assert allocate(measured, budget=3).window == Window(sink_tokens=2, recent_tokens=64)
    other = Window(sink_tokens=0, recent_tokens=32)
    assert allocate(measured, budget=3, window=other).window == other


def test_the_plan_reads_back_as_it_was_written() -> None:
    request = AllocateRequest(budget="2.5")
    plan = allocate_as_asked(random_scores(3, factor=1.5), request, command="kvprof allocate --budget 2.5")
    assert BitPlan.from_json(plan.model_dump(mode="json", by_alias=True), "plan") == plan
