"""Resampled plans against linear programming, brute force and a population whose best plan is known; sources."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from score_factories import FORMATS, HEAD_DIM, geometry_json, plan_of, random_samples, random_scores, scores_of

from kvprof import Scores
from kvprof.allocate.budget import bit_limit, memory_limit
from kvprof.allocate.lp_relaxation import relax, total
from kvprof.allocate.methods import exact, uniform
from kvprof.analysis.bootstrap import Sampled, plain_problem, why_unknown, with_samples
from kvprof.analysis.source_agreement import disagreements
from kvprof.analysis.stability import STABLE_REGRET, StableAt, is_stable, stability, stable_at
from kvprof.analysis.uncertainty import uncertainty_of
from kvprof.errors import InfeasibleBudget, Mismatch, UsageError
from kvprof.records.formats import format_named

THREE = bit_limit("3", "stored")


# The relaxation


@st.composite
def knapsacks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float]:
    problems, items, choices = (draw(st.integers(1, most)) for most in (3, 4, 4))
    numbers = st.integers(0, 30)
    losses = np.array([[[draw(numbers) for _ in range(choices)] for _ in range(items)] for _ in range(problems)]) / 4
    costs = np.array([[draw(st.integers(0, 9)) for _ in range(choices)] for _ in range(items)], dtype=float)
    if choices > 1 and draw(st.booleans()):
        losses[:, 0, -1] = np.inf  # the first item has one choice fewer
        costs[0, -1] = costs[0, 0]
    least = costs.min(axis=1).sum()
    return losses, costs, float(least + draw(st.integers(0, 20)))


@settings(deadline=None, max_examples=150)
@given(knapsacks())
def test_a_mixture_is_the_best_that_linear_programming_finds(problem: tuple[np.ndarray, np.ndarray, float]) -> None:
    losses, costs, capacity = problem
    found = relax(losses, costs, capacity)
    items, choices = costs.shape
    one_each = np.kron(np.eye(items), np.ones(choices))
    for row, mine in enumerate(losses):
        bounds = [(0, 1) if np.isfinite(loss) else (0, 0) for loss in mine.ravel()]
        finite = np.where(np.isfinite(mine), mine, 0.0).ravel()
        solved = linprog(
            finite, A_ub=costs.ravel()[None], b_ub=[capacity], A_eq=one_each, b_eq=np.ones(items), bounds=bounds
        )
        assert found.loss(mine)[row] == pytest.approx(solved.fun, abs=1e-6)
        assert found.loss(losses)[row] == pytest.approx(solved.fun, abs=1e-6)
        assert costs[np.arange(items), found.picks[row]].sum() <= capacity + 1e-9
        assert total(mine, found.picks)[row] >= found.loss(mine)[row] - 1e-9


def test_losses_of_any_scale_are_relaxed_alike() -> None:
    scores = random_scores(6, 4)
    sampled = with_samples(plain_problem(scores, THREE, None, None, {}), scores)
    losses = sampled.mean(sampled.even)
    mixtures = [relax(losses * factor, sampled.costs, sampled.capacity) for factor in (1.0, 1e-200, 1e200)]
    assert all((other.picks == mixtures[0].picks).all() for other in mixtures)


def test_a_capacity_below_the_cheapest_choices_is_refused() -> None:
    with pytest.raises(ValueError, match="cheapest"):
        relax(np.ones((1, 2, 1)), np.full((2, 1), 3.0), 5.0)


# Resamples


def hand_sampled(sequences: int, strata: tuple[tuple[int, ...], ...]) -> Sampled:
    losses = np.arange(sequences, dtype=float).reshape(-1, 1, 1)
    return Sampled(losses, np.zeros((1, 1)), 0, np.zeros((1, 1, 1), dtype=np.int64), strata)


def test_resamples_keep_the_share_of_each_source() -> None:
    weights = hand_sampled(6, ((0, 1), (2, 3, 4, 5))).drawn(50, seed=1)
    assert weights.shape == (50, 6)
    assert weights[:, :2].sum(axis=1) == pytest.approx(2 / 6)
    assert weights[:, 2:].sum(axis=1) == pytest.approx(4 / 6)
    assert (weights >= 0).all()


@pytest.mark.parametrize("sequences", [2, 3, 16])
def test_resampled_means_vary_as_the_mean_of_new_sequences_would(sequences: int) -> None:
    weights = hand_sampled(sequences, (tuple(range(sequences)),)).drawn(40_000, seed=0)
    numbers = np.random.default_rng(0).normal(size=sequences)
    assert np.var(weights @ numbers) == pytest.approx(np.var(numbers, ddof=1) / sequences, rel=0.05)


def test_the_same_seed_gives_the_same_stability_and_another_one_nearly() -> None:
    scores = random_scores(8, 8)
    plan = exact(scores, THREE)
    assert stability(scores, plan) == stability(scores, plan)
    one, other = (stability(scores, plan, seed=seed) for seed in (0, 1))
    assert one != other
    assert one.changed_mean == pytest.approx(other.changed_mean, rel=0.5)


def test_two_sequences_make_two_resamples_counted_by_hand() -> None:
    # A budget of 3.25 bits: one of key and value may have 4 bits of code. The first text says key, the second value.
    samples = [{"key": {"int2g64": [0.9, 0.2], "int4g64": [0, 0]}, "value": {"int2g64": [0.1, 0.7], "int4g64": [0, 0]}}]
    scores = scores_of(samples, geometry=geometry_json(1), factor=3.0)
    plan = exact(scores, bit_limit("3.5", "stored"))
    assert [form.bits for form in (plan.layers[0].key, plan.layers[0].value)] == [4, 2]  # 0.55 against 0.4 on average
    found = stability(scores, plan, resamples=1000)
    # The first text alone keeps the plan, the second alone gives the value 4 bits: both tensors change.
    assert found.changed_mean == pytest.approx(1, abs=0.2)
    assert found.changed_p90 == 2
    assert found.regret_p90 == pytest.approx(0.55 / 0.4 - 1)
    assert not is_stable(found)


def test_sequences_that_all_say_the_same_leave_no_doubt() -> None:
    samples = random_samples(4, 1)
    same = [
        {name: {form: losses * 5 for form, losses in entry[name].items()} for name in ("key", "value")}
        for entry in samples
    ]
    scores = scores_of(same, geometry=geometry_json(4))
    found = stability(scores, exact(scores, THREE))
    assert (found.changed_mean, found.changed_p90, found.regret_p90) == (0, 0, pytest.approx(0, abs=1e-9))
    assert is_stable(found)
    assert stable_at(scores)


def test_flips_between_formats_of_the_same_worth_make_no_plan_unstable() -> None:
    draw = random.Random(0)

    def alike(loss: float) -> list[float]:
        return [loss * draw.uniform(0.999, 1.001) for _ in range(8)]

    samples = [
        {"key": {"int2g64": alike(4.0), "int2g64c": alike(4.0)}, "value": {"rot2": alike(1.0)}} for _ in range(10)
    ]
    scores = scores_of(samples, geometry=geometry_json(10))
    found = stability(scores, exact(scores, bit_limit("2.375", "stored")))
    assert found.changed_mean > 2
    assert found.regret_p90 < 0.001
    assert is_stable(found)


def test_the_regret_is_what_more_sequences_would_really_save() -> None:
    population = random_samples(20, 1200, seed=3, noise=1.0)
    draw = random.Random(5)

    def sampled(places: list[int]) -> Sampled:
        few = [
            {
                name: {form: [losses[place] for place in places] for form, losses in entry[name].items()}
                for name in entry
            }
            for entry in population
        ]
        drawn = scores_of(few, geometry=geometry_json(20))
        return with_samples(plain_problem(drawn, THREE, None, None, {}), drawn)

    everything = sampled(list(range(1200)))
    truth = everything.mean(everything.even)
    best = relax(truth, everything.costs, everything.capacity).loss(truth)[0]
    real, predicted, covered = [], [], 0
    for _ in range(12):
        places = draw.sample(range(1200), 16)
        few = sampled(places)
        mine = few.mean(few.even)
        real.append(relax(mine, few.costs, few.capacity).loss(truth[0])[0] / best - 1)
        resampled = relax(few.mean(few.drawn(100, 0)), few.costs, few.capacity).loss(mine[0])
        regret = resampled / relax(mine, few.costs, few.capacity).loss(mine)[0] - 1
        predicted.append(regret.mean())
        covered += real[-1] <= np.quantile(regret, 0.9)
    assert np.mean(predicted) == pytest.approx(np.mean(real), rel=0.3)
    assert covered >= 9


def test_pinned_tensors_never_change_and_tied_ones_are_both_counted() -> None:
    scores = random_scores(10, 6, noise=1.5)
    loose = stability(scores, exact(scores, THREE))
    some = ("key:*=3", "value:*=rot2")
    limit = bit_limit("2.8", "stored")
    pinned = stability(scores, exact(scores, limit, pins=some), pins=some)
    assert 0 < pinned.changed_p90 < loose.changed_p90
    every = ("key:*=int3g64", "value:*=rot2")
    assert stability(scores, exact(scores, bit_limit("2.875", "stored"), pins=every), pins=every).changed_p90 == 0
    tied = stability(scores, exact(scores, THREE, tie="key-value"), tie="key-value")
    assert tied.tensors == 20
    assert tied.changed_p90 > 0


def test_a_plan_of_fewer_formats_is_compared_with_plans_of_these() -> None:
    scores = random_scores(10, 6, noise=1.5)
    formats = "key:int3g64,value:rot2,value:rot3"
    plan = exact(scores, THREE, formats=formats)
    found = stability(scores, plan, formats=formats)
    assert 0 < found.changed_mean <= 10  # values alone have a choice


def test_a_plan_that_loses_nothing_on_most_texts_has_a_regret_that_is_a_number() -> None:
    lossless = {"int2g64": [0.0] * 4, "int4g64": [0.0] * 4}
    samples = [{"key": {"int4g64": [0.0] * 4, "int2g64": [0.0, 0.0, 0.0, 1e-300]}, "value": lossless}]
    scores = scores_of(samples, geometry=geometry_json(1))
    for budget in ("2.5", "3.5", "4.5"):
        found = stability(scores, exact(scores, bit_limit(budget, "stored")))
        assert found.regret_p90 >= 0


# Where nothing can be told


def without(scores: Scores, *fields: str, only: tuple[int, str, str] | None = None) -> Scores:
    """Return scores less some fields of every tensor, or of one format of one tensor."""
    value = scores.model_dump(mode="json", by_alias=True)
    for entry in value["layers"]:
        for name in ("key", "value"):
            for field in fields:
                if only is None:
                    entry[name].pop(field, None)
                elif (entry["layer"], name) == only[:2]:
                    entry[name][field].pop(only[2])
    return Scores.from_json(value, "less")


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (random_scores(2, 1), "single sequence"),
        (without(random_scores(2, 4), "loss_increase_samples"), "do not hold each sequence's own losses"),
        (without(random_scores(2, 4), "loss_increase_samples", only=(1, "key", "rot3")), "other sequences"),
    ],
    ids=["single", "none", "some"],
)
def test_nothing_is_told_of_stability_where_sequences_are_not_known(scores: Scores, words: str) -> None:
    assert words in (why_unknown(scores) or "")
    assert stability(scores, exact(scores, THREE)) is None
    assert not stable_at(scores)


def test_nothing_is_wrong_with_scores_that_hold_every_sequence() -> None:
    assert why_unknown(random_scores(2, 2)) is None


def test_a_plan_in_a_format_that_was_not_scored_has_no_stability() -> None:
    scores = random_scores(2, 4)
    assert stability(scores, plan_of([("int8g64", "rot2")] * 2, geometry=geometry_json(2))) is None


def test_scores_of_another_model_are_refused() -> None:
    with pytest.raises(Mismatch):
        stability(random_scores(2, 4), plan_of([("int3g64", "rot2")] * 3, geometry=geometry_json(3)))


# Enough sequences


def test_scores_become_stable_with_more_sequences() -> None:
    assert not stable_at(random_scores(20, 4, seed=1, noise=1.0))
    assert stable_at(random_scores(20, 200, seed=1, noise=1.0))


@pytest.mark.parametrize(
    "sources",
    [None, {"builtin": range(0, 6, 2), "self": range(1, 6, 2)}, {"builtin": range(5), "self": range(5, 6)}],
    ids=["one", "even", "uneven"],
)
def test_few_sequences_are_never_called_stable(sources: dict[str, range] | None) -> None:
    samples = random_samples(4, 6, noise=1e-9)
    few = scores_of(
        [
            {name: {form: losses[:3] for form, losses in entry[name].items()} for name in entry}
            if sources is None
            else entry
            for entry in samples
        ],
        geometry=geometry_json(4),
        sources=sources,
    )
    assert not stable_at(few)


def test_a_budget_that_no_plan_meets_is_an_error_but_usual_ones_are_passed_over() -> None:
    samples = [{"key": {"int6g64": [0.1] * 4, "int8g64": [0.05] * 4}, "value": {"int6g64": [0.1] * 4}}]
    scores = scores_of(samples, geometry=geometry_json(1))
    assert stable_at(scores)
    with pytest.raises(InfeasibleBudget):
        stable_at(scores, THREE)


def test_several_budgets_are_stable_when_each_one_is() -> None:
    few, many = (random_scores(20, sequences, seed=1, noise=1.0) for sequences in (4, 200))
    for budgets in ((), ("2.5",), ("2.5", 3.5)):
        assert StableAt(budgets)(many)
        assert not StableAt(budgets)(few)
    with pytest.raises(UsageError, match="three"):
        StableAt(["2.5", "three"])
    with pytest.raises(InfeasibleBudget):
        StableAt(["2.5", "0.5"])(many)


def test_what_no_plan_could_be_made_of_is_refused_before_anything_is_measured() -> None:
    geometry = random_scores(2, 4).geometry
    formats = {
        (layer, name): [format_named(form, name, HEAD_DIM) for form in FORMATS[name]]
        for layer in range(2)
        for name in ("key", "value")
    }
    for budgets in ((), ("1.75",), ("7.5",)):  # from int2g128 and rot1 to int6g64 and int8g64: 1.75 to 7.5
        StableAt(budgets).check(geometry, formats)
    for budget in ("1.74", "7.51"):
        with pytest.raises(InfeasibleBudget, match=r"--stable-at .*have 1\.75 to 7\.5 stored bits"):
            StableAt([budget]).check(geometry, formats)
    with pytest.raises(UsageError, match="for the key of layer 1"):
        StableAt([]).check(geometry, formats | {(1, "key"): []})


def test_the_limit_of_a_stable_regret_is_what_the_readme_says() -> None:
    assert STABLE_REGRET == 0.05


# Sources


HALVES = {"builtin": range(0, 16, 2), "self": range(1, 16, 2)}


def mixed(*, keep_samples: bool = True, alike: bool = False) -> Scores:
    """Scores of two texts to which other tensors matter, or the same."""
    texts = [random_samples(20, 16, seed) for seed in ((1, 1) if alike else (1, 2))]
    samples = [
        {
            name: {
                form: [texts[place % 2][layer][name][form][place] for place in range(16)]
                for form in texts[0][layer][name]
            }
            for name in ("key", "value")
        }
        for layer in range(20)
    ]
    return scores_of(samples, geometry=geometry_json(20), sources=HALVES, keep_samples=keep_samples)


@pytest.mark.parametrize("keep_samples", [True, False])
def test_texts_that_need_other_tensors_are_said_to_disagree(keep_samples: bool) -> None:
    scores = mixed(keep_samples=keep_samples)
    remarks = disagreements(scores, exact(scores, THREE))
    assert any("on builtin this plan" in remark and "--data builtin:2" in remark for remark in remarks)
    assert any("a plan from self alone" in remark and "does on builtin" in remark for remark in remarks)


@pytest.mark.parametrize("seed", range(5))
def test_halves_of_one_text_do_not_disagree(seed: int) -> None:
    scores = random_scores(20, 16, seed, noise=1.0, sources=HALVES)
    assert disagreements(scores, exact(scores, THREE)) == []


def test_the_ratios_are_what_brute_force_over_all_plans_finds() -> None:
    # Three tensors' worth of bits for four: the texts differ in which one to starve.
    forms = {"int2g64": 0, "int4g64": 1}
    builtin = [[0.8, 0.0], [0.4, 0.0], [0.1, 0.0], [0.5, 0.0]]  # (tensor, form)
    own = [[0.1, 0.0], [0.4, 0.0], [0.9, 0.0], [0.5, 0.0]]

    def column(tensor: int) -> dict[str, list[float]]:
        return {form: [builtin[tensor][place], own[tensor][place]] * 8 for form, place in forms.items()}

    samples = [{"key": column(2 * layer), "value": column(2 * layer + 1)} for layer in range(2)]
    scores = scores_of(samples, geometry=geometry_json(2), sources=HALVES)
    plan = exact(scores, bit_limit("4", "stored"))

    def best(losses: list[list[float]]) -> tuple[int, ...]:
        plans = [picks for picks in itertools.product((0, 1), repeat=4) if sum(picks) <= 3]
        return min(plans, key=lambda picks: lost(losses, picks))

    def lost(losses: list[list[float]], picks: tuple[int, ...]) -> float:
        return sum(losses[tensor][pick] for tensor, pick in enumerate(picks))

    together = best([[(a + b) / 2 for a, b in zip(*rows, strict=True)] for rows in zip(builtin, own, strict=True)])
    wanted = {
        f"on {name} this plan is predicted to lose {lost(losses, together) / lost(losses, best(losses)):.2f} times"
        for name, losses in (("builtin", builtin), ("self", own))
    } | {
        f"from {made} alone would lose {lost(there, best(here)) / lost(there, together):.2f} times what this one does "
        f"on {read}"
        for (made, here), (read, there) in itertools.permutations((("builtin", builtin), ("self", own)), 2)
    }
    found = disagreements(scores, plan)
    assert len(found) == len(wanted) == 4
    for part in wanted:
        assert any(part in remark for remark in found), (part, found)


def test_one_source_or_none_cannot_disagree() -> None:
    for sources in (None, {"builtin": range(16)}):
        scores = random_scores(4, 16, sources=sources)
        assert disagreements(scores, exact(scores, THREE)) == []


def test_sources_whose_losses_are_not_known_say_nothing() -> None:
    scores = without(mixed(keep_samples=False), "loss_increase_by_source")
    assert disagreements(scores, exact(scores, THREE)) == []
    gap = without(mixed(keep_samples=False), "loss_increase_by_source", only=(3, "key", "self"))
    assert disagreements(gap, exact(gap, THREE)) == []


def test_a_text_that_loses_nothing_is_no_division_by_zero() -> None:
    samples = [
        {name: {"int2g64": [0.0, 0.5] * 8, "int4g64": [0.0, 0.1] * 8} for name in ("key", "value")} for _ in range(2)
    ]
    scores = scores_of(samples, geometry=geometry_json(2), sources=HALVES)
    plan = exact(scores, THREE)
    assert disagreements(scores, plan) == []
    assert stability(scores, plan) is not None


# All doubts of a new plan together


def test_a_new_plan_comes_with_its_stability_and_what_the_texts_say() -> None:
    scores = mixed()
    found = uncertainty_of(scores, exact(scores, THREE))
    assert found.stability == stability(scores, exact(scores, THREE))
    assert list(found.remarks) == disagreements(scores, exact(scores, THREE))
    blind = uncertainty_of(mixed(keep_samples=False), exact(mixed(keep_samples=False), THREE))
    assert blind.stability is None
    assert "cannot be told: the scores do not hold" in blind.remarks[0]


@pytest.mark.parametrize("factor", [None, 1.7])
def test_the_best_pair_of_a_plan_of_bytes_takes_no_more_bytes(factor: float | None) -> None:
    """Two layers of four slide, so that their bits cost next to nothing: by bits, another pair would be the best."""
    geometry = geometry_json(4)
    for layer in (0, 2):
        geometry["layers"][layer] |= {"kind": "sliding", "window": 512}
    scores = scores_of(random_samples(4, 8, 3), geometry=geometry, factor=factor)
    plan = exact(scores, memory_limit("10MB", 32768))
    losses = {}
    for pair in itertools.product(FORMATS["key"], FORMATS["value"]):
        one = uniform(scores, *pair)
        assert one.solver is not None
        if one.bytes_at(32768) <= plan.bytes_at(32768):
            losses["/".join(pair)] = one.solver.predicted_kl_nats
    found = uncertainty_of(scores, plan, context=32768).best_pair
    assert found is not None
    assert found[0] == min(losses, key=losses.__getitem__)
    assert found[1] == pytest.approx(losses[found[0]])
    assert uncertainty_of(scores, plan).best_pair != found


def test_nothing_is_doubted_of_a_plan_that_losses_did_not_choose() -> None:
    scores = mixed()
    for plan in (uniform(scores, 4, 2), plan_of([("int3g64", "rot2")] * 20, geometry=geometry_json(20))):
        assert uncertainty_of(scores, plan) == uncertainty_of(scores, plan.model_copy(update={"solver": None}))
        assert uncertainty_of(scores, plan).stability is None
