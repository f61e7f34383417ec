"""The exact problem with every sequence's own losses, as arrays that a bootstrap can weigh anew.

Reads Scores with samples and an exact problem; writes arrays of losses. Does not choose formats.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from kvprof.allocate.budget import Limit, stored_bits_per_element
from kvprof.allocate.candidates import Allowed
from kvprof.allocate.losses import entries_of, planned_tensors
from kvprof.allocate.lp_relaxation import Floats, Ints
from kvprof.allocate.problem import ExactProblem
from kvprof.records.formats import TENSORS
from kvprof.records.plan import BitPlan, Window
from kvprof.records.scores import LOSS_INCREASE, Scores


@dataclass(frozen=True)
class Sampled:
    """What may be chosen, and what each choice loses on every sequence."""

    losses: Floats
    """(sequences, items, choices), nats a token without the calibrated factor; infinite where an item has fewer
    choices."""
    costs: Floats
    """(items, choices), in the problem's units."""
    capacity: int
    candidates: Ints
    """(items, choices, tensors an item): the place of each tensor's candidate."""
    strata: tuple[tuple[int, ...], ...]
    """The sequences of each source; all in one where sources are unknown or one of them gave a single sequence."""

    @property
    def sequences(self) -> int:
        """How many sequences the losses are of."""
        return len(self.losses)

    @property
    def even(self) -> Floats:
        """The weights that make the mean over all sequences: (1, sequences)."""
        return np.full((1, self.sequences), 1 / self.sequences)

    def drawn(self, resamples: int, seed: int) -> Floats:
        """Return weights (resamples, sequences) of sequences drawn with replacement, each source apart.

        Of n sequences of a source n - 1 are drawn: the variance of their mean is then the unbiased one (McCarthy and
        Snowden 1985), which tells where sequences are few.
        """
        rng = random.Random(seed)
        weights = np.zeros((resamples, self.sequences))
        for stratum in self.strata:
            number = len(stratum)
            for resample in weights:
                drawn = rng.choices(range(number), k=number - 1)
                resample[list(stratum)] = np.bincount(drawn, minlength=number) / (number - 1) * number / self.sequences
        return weights

    def mean(self, weights: Floats) -> Floats:
        """Return losses weighted over sequences. weights: (R, sequences); returns (R, items, choices)."""
        absent = np.isinf(self.losses[0])
        finite = np.where(absent, 0.0, self.losses).reshape(self.sequences, -1)
        means = (weights @ finite).reshape(len(weights), *absent.shape)
        means[:, absent] = np.inf
        return means

    def changed(self, picks: Ints, other: Ints) -> Ints:
        """Return how many tensors two selections give different candidates. picks, other: (R, items); returns (R,)."""
        items = np.arange(picks.shape[-1])
        return np.asarray((self.candidates[items, picks] != self.candidates[items, other]).sum(axis=(-2, -1)))


def why_unknown(scores: Scores) -> str | None:
    """Return why nothing can be said of other sequences than those that were measured, or None where it can."""
    columns = [
        (entry.tensor(name).loss_increase_samples or {}).get(form)
        for entry in scores.layers
        for name in TENSORS
        for form in entry.tensor(name).loss_increase or ()
    ]
    lengths = {0 if column is None else len(column) for column in columns}
    if not columns or lengths == {0}:
        return "the scores do not hold each sequence's own losses"
    if len(lengths) > 1:
        return "the scores hold some formats' losses on other sequences than those of the rest"
    if lengths == {1}:
        return "the scores were measured on a single sequence"
    return None


def with_samples(problem: ExactProblem, scores: Scores) -> Sampled:
    """Return a problem by scores of which nothing is unknown, its limit spent; raises InfeasibleBudget."""
    rows = [[choice.samples or () for choice in choices] for choices in problem.candidates]
    losses, costs, candidates = arrays(problem, rows)
    return Sampled(losses, costs, problem.capacity(problem.limit), candidates, _strata(scores, len(losses)))


def plain_problem(
    scores: Scores, limit: Limit, window: Window | None, tie: str | None, allowed: Allowed
) -> ExactProblem:
    """Return the problem of spending as much as a limit says, by losses without the calibrated factor.

    tie, allowed: as `methods.exact` takes them. Raises as `ExactProblem` does.
    """
    plain = scores.model_copy(update={"kl_calibration": None})
    return ExactProblem(plain, limit, LOSS_INCREASE, allowed, tie, window)


def problem_of(
    plan: BitPlan, scores: Scores, tie: str | None, allowed: Allowed, context: int | None = None, batch: int = 1
) -> ExactProblem:
    """Return the problem that a plan solves: of the bits that it stores, or of its bytes at a context.

    The two differ where layers slide: at a long context their bits cost little. Raises as `plain_problem` does.
    """
    if context is not None:
        limit = Limit(Fraction(plan.bytes_at(context, batch)), "bytes", context, batch)
    else:
        tensors = planned_tensors(plan, scores.geometry)
        limit = Limit(stored_bits_per_element(tensors, entries_of(plan, tensors)), "stored")
    return plain_problem(scores, limit, plan.window, tie, allowed)


def arrays(problem: ExactProblem, rows: Sequence[Sequence[Sequence[float]]]) -> tuple[Floats, Floats, Ints]:
    """Return losses, costs and candidates as `Sampled` has them, the losses by any rows instead of sequences.

    rows: for each tensor and candidate as many numbers.
    """
    shape = (len(problem.items), max(map(len, problem.items)))
    columns = [np.array(choices, dtype=np.float64) for choices in rows]  # (candidates, rows)
    losses = np.full((columns[0].shape[1], *shape), np.inf)
    costs = np.empty(shape)
    candidates = np.zeros((*shape, len(problem.groups[0].tensors)), dtype=np.int64)
    for place, (group, item) in enumerate(zip(problem.groups, problem.items, strict=True)):
        picks = np.array(group.choices)  # (choices, tensors)
        parts = [columns[tensor][picks[:, column]] for column, tensor in enumerate(group.tensors)]
        losses[:, place, : len(picks)] = np.sum(parts, axis=0).T
        costs[place] = item[0][0]
        costs[place, : len(picks)] = [cost for cost, _ in item]
        candidates[place, : len(picks)] = picks
    return losses, costs, candidates


def _strata(scores: Scores, number: int) -> tuple[tuple[int, ...], ...]:
    """Return the sequences of each source."""
    together = (tuple(range(number)),)
    source_of = None if scores.calibration is None else scores.calibration.source_of
    if source_of is None or len(source_of) != number:
        return together
    strata = tuple(
        tuple(place for place, source in enumerate(source_of) if source == wanted) for wanted in sorted(set(source_of))
    )
    return strata if all(len(stratum) > 1 for stratum in strata) else together
