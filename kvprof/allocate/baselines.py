"""The plans that a plan must beat at no more stored bits: plain pairs of formats, the published rules, and chance.

Reads a BitPlan with its geometry, and Scores; writes BitPlans. Does not know how good any of them is.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from statistics import mode

from kvprof.allocate.assemble import assemble, tensors_of
from kvprof.allocate.budget import Limit, stored_bits_per_element
from kvprof.allocate.candidates import LARGEST_GROUP, USUAL_GROUP_SIZE
from kvprof.allocate.methods import kvmix, norm_greedy
from kvprof.allocate.task import without_sinks
from kvprof.allocate.uniform_pairs import all_can_rotate, fitted, uniform_pairs
from kvprof.errors import KvprofError, Mismatch
from kvprof.records.formats import CODE_BITS, FULL_BITS, USUAL_AXIS, Format, usual_format
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan, Provenance, Solver, TensorPlan
from kvprof.records.scores import Scores

GREEDY_BITS = (2, 3, 4, 6, 8)
"""What norm-greedy chooses from: without 1 bit it does far better."""
GROUP_SIZES = (32, 64, 128)
WIDER_GROUPS = (256, 512, 1024)
"""Tried where a rule cannot be as cheap as the plan with the usual ones."""


def baseline_plans(
    plan: BitPlan, norms: Scores, gradients: Scores | None = None, seed: int = 0
) -> tuple[tuple[str, tuple[BitPlan, ...]], ...]:
    """Return the baselines of a plan, each a name and the plans that it may put forward, the best of which counts.

    "uniform"                 one format for all keys and one for all values: see uniform_pairs.py
    "kvmix"                   the rule of arXiv 2506.08018; left out where there are no gradients
    "norm-greedy spectral"    the rule of arXiv 2502.15075 by the spectral norm
    "norm-greedy frobenius"   the same by the Frobenius norm
    "random"                  the plan's own formats, dealt to other tensors
    "kvmix, as published"     without sinks, and with the bits and the groups that its paper has
    "spectral, as published"  the greedy rule's plan without sinks; and so "frobenius, as published"

    All have the plan's window, recent fractions and quantizer, and store at most its bits an element, counted exactly,
    and as many of them as the rule can spend. Where a rule cannot be as cheap as the plan, even with WIDER_GROUPS, its
    cheapest plan stands: it stores more, and `Evaluation.comparable` leaves it out. As published, KVmix has more bits
    than the plan or fewer.
    norms: with `spectral_norm` and `frobenius_norm`. gradients: with `gradient_norm`, and `loss_increase` to tell which
    uniform pairs are worth a measurement. seed: of "random".
    Raises KvprofError for a plan without a geometry, Mismatch for scores of another model, InvalidFile for scores that
    lack a metric.
    """
    if plan.geometry is None:
        raise KvprofError(
            "this plan carries no geometry, so what its baselines may store is unknown.\n"
            "  Name the model that it is for."
        )
    plan.check_fits(plan.geometry)
    terms = _Terms(plan, plan.geometry)
    scored = None if gradients is None else terms.scores(gradients)
    pairs = uniform_pairs(terms.tensors, terms.own, scored)
    baselines = [("uniform", tuple(terms.baseline(formats, Solver(method="uniform")) for formats in pairs))]
    published = []
    if gradients is not None:
        baselines.append(("kvmix", (_kvmix(terms, gradients),)))
        published.append(("kvmix, as published", (_kvmix_as_published(terms, gradients),)))
    for norm in ("spectral", "frobenius"):
        greedy = _norm_greedy(terms, norms, f"{norm}_norm")
        baselines.append((f"norm-greedy {norm}", (greedy,)))
        if plan.window.sink_tokens:  # else it would be the same plan
            published.append((f"{norm}, as published", (_without_sinks(greedy),)))
    baselines.append(("random", (_random(terms, seed),)))
    return (*baselines, *published)


class _Terms:
    """What all baselines share: the plan, its tensors and their formats, and the bits that they may store."""

    def __init__(self, plan: BitPlan, geometry: CacheGeometry) -> None:
        self.plan = plan
        self.geometry = geometry
        self.tensors = tensors_of({shape.layer: shape for shape in geometry.planned})
        self.width = sum(tensor.width for tensor in self.tensors)
        self.own = self.formats_of(plan)
        self.allowed_bits = self.bits_of(self.own)

    def formats_of(self, plan: BitPlan) -> list[TensorPlan]:
        """Return what a plan has for each tensor."""
        entries = {entry.layer: entry for entry in plan.layers}
        return [entries[tensor.layer].tensor(tensor.name) for tensor in self.tensors]

    def bits_of(self, formats: Sequence[Format]) -> Fraction:
        """Return the stored bits an element, averaged over the cached width."""
        return stored_bits_per_element(self.tensors, formats)

    def distance(self, bits: Fraction) -> tuple[bool, Fraction]:
        """Return how far stored bits are from those allowed: more than allowed is farther than any fewer."""
        return bits > self.allowed_bits, abs(bits - self.allowed_bits)

    def scores(self, scores: Scores) -> Scores:
        """Return scores with the plan's geometry, known to cover its layers."""
        scores.check_fits(self.geometry, self.plan.model.fingerprint)
        missing = {tensor.layer for tensor in self.tensors} - {entry.layer for entry in scores.layers}
        if missing:
            raise Mismatch(f"the scores are for another model: the plan covers layer {min(missing)}, which they lack.")
        return scores.model_copy(update={"geometry": self.geometry})

    def baseline(self, formats: Sequence[Format], solver: Solver | None, scores: Scores | None = None) -> BitPlan:
        """Return the plan of these formats, all else as the plan itself has it."""
        return assemble(
            self.tensors,
            [
                TensorPlan(**form.model_dump() | {"recent_fraction": own.recent_fraction})
                for form, own in zip(formats, self.own, strict=True)
            ],
            model=self.plan.model,
            geometry=self.geometry,
            quantizer=self.plan.quantizer,
            window=self.plan.window,
            solver=solver,
            provenance=Provenance(scores=None if scores is None else scores.digest),
            limit=Limit(self.allowed_bits, "stored") if self.bits_of(formats) <= self.allowed_bits else None,
        )


def _kvmix(terms: _Terms, gradients: Scores) -> BitPlan:
    """Return KVmix's plan at the top fraction and group size whose bits come the nearest: the rule knows no budget."""
    scores = terms.scores(gradients)
    layers = len(terms.geometry.planned)

    def made(top: int, group_size: int) -> BitPlan:
        return kvmix(scores, top_fraction=f"{top}/{layers}", group_size=group_size, window=terms.plan.window)

    def bits(plan: BitPlan) -> Fraction:
        return terms.bits_of(terms.formats_of(plan))

    plans: list[BitPlan] = []
    for group_size in (*GROUP_SIZES, *WIDER_GROUPS):  # each top layer adds bits
        if group_size in WIDER_GROUPS and (
            min(map(bits, plans)) <= terms.allowed_bits or bits(made(0, group_size)) > terms.allowed_bits
        ):
            continue
        allowed = bisect_right(range(layers + 1), terms.allowed_bits, key=lambda top: bits(made(top, group_size)))
        plans.append(made(max(allowed - 1, 0), group_size))
    nearest = min(plans, key=lambda plan: terms.distance(bits(plan)))
    return terms.baseline(terms.formats_of(nearest), nearest.solver, gradients)


def _kvmix_as_published(terms: _Terms, gradients: Scores) -> BitPlan:
    """Return the plan that KVmix's paper would have of this model, at the bits that it has."""
    scores = terms.scores(gradients)
    plan = kvmix(scores, as_published=True, window=terms.plan.window)
    return _without_sinks(terms.baseline(terms.formats_of(plan), plan.solver, gradients))


def _without_sinks(plan: BitPlan) -> BitPlan:
    return plan.model_copy(update={"window": without_sinks(plan.window)})


def _norm_greedy(terms: _Terms, norms: Scores, metric: str) -> BitPlan:
    """Return the greedy rule's plan within the plan's stored bits.

    It has GREEDY_BITS, and groups of the size that most of the plan's keys have; where that is too dear, larger groups,
    then all widths, and then WIDER_GROUPS.
    """
    scores = terms.scores(norms)
    entries = [entry.key for entry in terms.plan.layers]
    sizes = [key.group_size for key in entries if key.scheme == "asymmetric" and not key.is_full]
    usual = min(mode(sizes or [USUAL_GROUP_SIZE]), LARGEST_GROUP)
    groups = sorted({usual, *(size for size in GROUP_SIZES if size > usual)})
    options: list[tuple[tuple[int, ...], int]] = [(GREEDY_BITS, size) for size in groups]
    options += [((*CODE_BITS, FULL_BITS), size) for size in reversed(groups)]
    wider = [((*CODE_BITS, FULL_BITS), size) for size in WIDER_GROUPS if size > max(groups)]

    def reached(option: tuple[tuple[int, ...], int]) -> Fraction:
        """Return the stored bits nearest to those allowed that a plan of these widths and groups can have."""
        widths, group_size = option
        costs = [
            sorted(
                tensor.width
                * usual_format(tensor.stored_as, bits, group_size, tensor.head_dim).stored_bits(tensor.head_dim)
                for bits in widths
            )
            for tensor in terms.tensors
        ]
        low, high = (sum(cost[end] for cost in costs) / Fraction(terms.width) for end in (0, -1))
        return min(max(terms.allowed_bits, low), high)

    options += [option for option in wider if reached(option) <= terms.allowed_bits]
    widths, group_size = best = min(options, key=lambda option: terms.distance(reached(option)))
    limit = Limit(reached(best), "stored")
    found = norm_greedy(scores, limit, metric=metric, bits=widths, group_size=group_size, window=terms.plan.window)
    return terms.baseline(terms.formats_of(found), found.solver, norms)


def _random(terms: _Terms, seed: int) -> BitPlan:
    """Return the plan with its formats dealt anew: over all tensors where that keeps the stored bits, exactly.

    Where it does not, since heads differ or keys have larger groups than a value can, keys are dealt to keys and
    values to values, of the same heads.
    """
    dealer = random.Random(seed)
    hands = list(zip(dealer.sample(terms.own, len(terms.own)), terms.own, terms.tensors, strict=True))
    formats = None
    if all_can_rotate(tensor for form, _, tensor in hands if form.scheme == "rotated"):
        formats = [
            fitted(form, tensor, own.axis if own.scheme == "asymmetric" else USUAL_AXIS[tensor.stored_as])
            for form, own, tensor in hands
        ]
    if formats is None or terms.bits_of(formats) != terms.allowed_bits:
        formats = list(terms.own)
        alike: dict[object, list[int]] = {}
        for place, tensor in enumerate(terms.tensors):
            alike.setdefault((tensor.name, tensor.width, tensor.head_dim), []).append(place)
        for places in alike.values():
            for place, source in zip(places, dealer.sample(places, len(places)), strict=True):
                formats[place] = terms.own[source]
    return terms.baseline(formats, Solver(method="random"))
