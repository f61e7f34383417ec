"""Uniform plans to beat: one format for all keys and one for all values, few enough to measure each.

Reads a plan's formats, and Scores where they predict which pairs are good; writes formats tensor by tensor.
Does not know how good any pair is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

from kvprof.allocate.budget import CachedTensor
from kvprof.allocate.candidates import USUAL_GROUP_SIZE
from kvprof.allocate.losses import PredictedLoss, predicted_losses, storage
from kvprof.errors import UsageError
from kvprof.records.external_formats import EXTERNAL
from kvprof.records.formats import (
    CODE_BITS,
    FULL_BITS,
    TENSORS,
    Axis,
    Format,
    TensorName,
    can_rotate,
    format_named,
    usual_format,
)
from kvprof.records.scores import LOSS_INCREASE, Scores

SCORED_PAIRS = 12
"""Pairs put forward where scores predict which are good: each costs a forward of all text."""
UNSCORED_PAIRS = 24
"""Pairs put forward where nothing does."""


class _Rung(NamedTuple):
    """All keys, or all values, in one format."""

    form: Format
    formats: tuple[Format, ...]
    """For each of these tensors, as its head dimension has it."""
    stored_bits: Fraction
    """Of all these tensors together, a token."""
    loss: float
    """What it is predicted to lose; 0 where nothing is predicted."""

    @property
    def family(self) -> tuple[str, str]:
        """The kind of quantizer: plain, clipped or rotated."""
        return (self.form.scheme, self.form.clip)

    def is_above(self, other: _Rung) -> bool:
        """Whether this is the same way to store a tensor, with more bits or finer groups and no less of either."""
        mine, its = self.form, other.form
        if mine.is_full or its.is_full:
            return not its.is_full
        alike = (mine.scheme, mine.axis, mine.clip) == (its.scheme, its.axis, its.clip)
        return alike and mine != its and mine.bits >= its.bits and mine.group_size <= its.group_size


_Pair = tuple[_Rung, _Rung]


class _Side(NamedTuple):
    """All keys, or all values, as the plan has them."""

    name: TensorName
    tensors: list[CachedTensor]
    own: list[Format]

    def rung(self, form: Format, formats: Sequence[Format], loss: float = 0.0) -> _Rung:
        """Return these formats of all tensors with what they store."""
        stored = (
            each.stored_bits(tensor.head_dim) * tensor.width for each, tensor in zip(formats, self.tensors, strict=True)
        )
        return _Rung(form, tuple(formats), sum(stored, Fraction(0)), loss)


def uniform_pairs(
    tensors: Sequence[CachedTensor], own: Sequence[Format], scores: Scores | None = None
) -> list[tuple[Format, ...]]:
    """Return pairs of one format for all keys and one for all values, as the formats of the tensors.

    tensors: keys first, then values. own: the plan's formats; no pair stores more bits than they do, and none leaves
    bits enough to better keys or values with more bits or finer groups. Where no pair is as cheap, the cheapest.
    scores: where every tensor has `loss_increase`, the pairs are of scored formats: the SCORED_PAIRS that are predicted
    to lose the least, the best of the purely plain, clipped and rotated ones among them. Otherwise they are of the
    formats that the plan itself has, at any bits: which is the best, only a measurement can tell, so that those of
    nearly equal bits come first, at most UNSCORED_PAIRS. A plan that is such a pair is among them.
    """
    both = list(zip(tensors, own, strict=True))
    sides = []
    for name in TENSORS:
        mine = [(tensor, _plain(form, name)) for tensor, form in both if tensor.name == name]
        sides.append(_Side(name, [tensor for tensor, _ in mine], [form for _, form in mine]))
    allowed = sum((form.stored_bits(tensor.head_dim) * tensor.width for tensor, form in both), Fraction(0))
    pairs: list[_Pair] = []
    if scores is not None and LOSS_INCREASE in scores.metrics:
        keys, values = (_scored_rungs(side, scores) for side in sides)
        pairs = _promising(_unraisable(keys, values, allowed))
    if not pairs:
        keys, values = (_rungs_of_plan(side) for side in sides)
        pairs = _unraisable(keys, values, allowed) or [min(itertools.product(keys, values), key=_stored)]
        pairs.sort(key=lambda pair: (abs(pair[0].form.bits - pair[1].form.bits), -_stored(pair)))
        pairs = pairs[:UNSCORED_PAIRS]
    found = [(*key.formats, *value.formats) for key, value in pairs]
    plan = tuple(form for side in sides for form in side.own)
    if all(_is_uniform(side) for side in sides) and plan not in found:
        found.insert(0, plan)
    return found


def fitted(form: Format, tensor: CachedTensor, axis: Axis) -> Format:
    """Return a format as a tensor has it whose groups go along an axis: rotated over whole heads, groups capped.

    Another runtime's lies as that runtime has it.
    """
    if form.is_external:
        return format_named(form.name, tensor.stored_as, tensor.head_dim)
    head_dim = _head_dim(tensor)
    if form.scheme == "rotated" and not form.is_full:
        return Format(scheme="rotated", bits=form.bits, group_size=head_dim, axis="token")
    group_size = min(form.group_size, head_dim) if axis == "token" else form.group_size
    return Format(bits=form.bits, group_size=group_size, axis=axis, clip=form.clip)


def all_can_rotate(tensors: Iterable[CachedTensor]) -> bool:
    """Whether the heads of all tensors have a power of two as dimension."""
    return all(can_rotate(_head_dim(tensor)) for tensor in tensors)


def _unraisable(keys: Sequence[_Rung], values: Sequence[_Rung], allowed: Fraction) -> list[_Pair]:
    """Return the pairs that fit and leave no bits to better either with."""

    def fits(key: _Rung, value: _Rung) -> bool:
        return key.stored_bits + value.stored_bits <= allowed

    better_keys, better_values = (
        [[better for better in rungs if better.is_above(rung)] for rung in rungs] for rungs in (keys, values)
    )
    return [
        (key, value)
        for (key, other_keys), (value, other_values) in itertools.product(
            zip(keys, better_keys, strict=True), zip(values, better_values, strict=True)
        )
        if fits(key, value)
        and not any(fits(other, value) for other in other_keys)
        and not any(fits(key, other) for other in other_values)
    ]


def _promising(pairs: Sequence[_Pair]) -> list[_Pair]:
    """Return the pairs that are predicted to lose the least, the best first, and of each pure family the best."""
    ranked = sorted(pairs, key=lambda pair: (pair[0].loss + pair[1].loss, -_stored(pair)))
    pure: dict[tuple[str, str], _Pair] = {}
    for key, value in ranked:
        if key.family == value.family and not key.form.is_full and not value.form.is_full:
            pure.setdefault(key.family, (key, value))
    others = [pair for pair in ranked if pair not in pure.values()][: SCORED_PAIRS - len(pure)]
    return [pair for pair in ranked if pair in pure.values() or pair in others]


def _scored_rungs(side: _Side, scores: Scores) -> list[_Rung]:
    """Return the ways to store all keys, or all values, in one format that was scored of each of them.

    16 bits are among them where the plan has them; they lose nothing. Formats of other runtimes are paired with their
    like.
    """
    families = {_family(form) for form in side.own if not form.is_full} or {None}
    found = [
        {
            storage(measured.format, tensor.head_dim): measured
            for measured in predicted_losses(scores, tensor)
            if _family(measured.format) in families
        }
        for tensor in side.tensors
    ]
    if not found[0]:
        return []
    names = dict.fromkeys(measured.format.name for measured in found[0].values())
    rungs = [rung for name in names if (rung := _scored_rung(side, name, found)) is not None]
    full = usual_format(side.name, FULL_BITS, USUAL_GROUP_SIZE)
    if any(form.is_full for form in side.own) and not any(rung.form.is_full for rung in rungs):
        rungs.append(side.rung(full, [full] * len(side.tensors)))
    return rungs


def _scored_rung(side: _Side, name: str, found: Sequence[dict[Hashable, PredictedLoss]]) -> _Rung | None:
    try:
        formats = [format_named(name, tensor.stored_as, tensor.head_dim) for tensor in side.tensors]
    except UsageError:  # not every head can be rotated
        return None
    losses = [
        measured.get(storage(form, tensor.head_dim))
        for form, tensor, measured in zip(formats, side.tensors, found, strict=True)
    ]
    known = [measured.loss for measured in losses if measured is not None]
    return side.rung(formats[0], formats, math.fsum(known)) if len(known) == len(losses) else None


def _rungs_of_plan(side: _Side) -> list[_Rung]:
    """Return all ways to store all keys, or all values, in one format: of the plan's kinds, at any bits.

    16 bits are among them where the plan has them. A plan that has nothing else is met by the usual formats.
    """
    full = usual_format(side.name, FULL_BITS, USUAL_GROUP_SIZE)
    rotatable = all_can_rotate(side.tensors)
    kinds = [form for form in side.own if not form.is_full and (rotatable or form.scheme != "rotated")]
    forms = dict.fromkeys(
        form.model_copy(update={"bits": bits})
        for form in (kinds or [full])
        for bits in CODE_BITS
        if not form.is_external
    )
    forms |= dict.fromkeys(form for form in kinds if form.is_external)
    if any(form.is_full for form in side.own):
        forms[full] = None
    rungs: dict[tuple[Format, ...], _Rung] = {}
    for form in forms:
        formats = tuple(fitted(form, tensor, form.axis) for tensor in side.tensors)
        if formats not in rungs:  # groups may be capped to the same
            rungs[formats] = side.rung(form, formats)
    return list(rungs.values())


def _family(form: Format) -> str | None:
    """Return whose quantizer rounds a format: None of kvprof's own."""
    return EXTERNAL[form.scheme].family if form.is_external else None


def _is_uniform(side: _Side) -> bool:
    """Whether the plan has one format for all keys, or all values, groups capped at each head dimension."""
    if len({(form.scheme, form.bits, form.axis, form.clip) for form in side.own}) > 1:
        return False
    widest = max(side.own, key=lambda form: form.group_size)
    return all(form == fitted(widest, tensor, widest.axis) for form, tensor in zip(side.own, side.tensors, strict=True))


def _plain(form: Format, name: TensorName) -> Format:
    """Return a plan's format less its recent fraction; of 16 bits there is one only."""
    if form.is_full:
        return usual_format(name, FULL_BITS, USUAL_GROUP_SIZE)
    axis, clip = form.axis, form.clip
    return Format(scheme=form.scheme, bits=form.bits, group_size=form.group_size, axis=axis, clip=clip)


def _stored(pair: _Pair) -> Fraction:
    return pair[0].stored_bits + pair[1].stored_bits


def _head_dim(tensor: CachedTensor) -> int:
    assert tensor.head_dim is not None  # a baseline's geometry is known
    return tensor.head_dim
