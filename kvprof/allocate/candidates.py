"""What a plan may choose from: for each tensor its candidate formats, and the loss of each.

Reads Scores, and what a user allows; writes lists of candidates. Does not know budgets, nor how one is chosen.
By `loss_increase` the candidates are the formats that were scored (see scored.py); by a norm or a gradient norm, which
know no formats, the usual format at several widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from typing_extensions import TypedDict

from kvprof.allocate.budget import CachedTensor
from kvprof.allocate.losses import PredictedLoss
from kvprof.allocate.pins import Pin, parse_pins
from kvprof.allocate.scored import ScoredFormats
from kvprof.errors import UsageError
from kvprof.records.formats import FULL_BITS, TensorName, known_bits, parse_formats, usual_format
from kvprof.records.requests.plan import NARROWING, WindowedChoice
from kvprof.records.requests.request import as_option
from kvprof.records.scores import LOSS_INCREASE, Scores

USUAL_BITS = (1, 2, 3, 4, 6, 8)
USUAL_GROUP_SIZE = 32
LARGEST_GROUP = 2**31

Pins = Mapping[tuple[int, TensorName], Pin]


class Allowed(TypedDict, total=False):
    """What a plan may choose from; what is absent or None restricts nothing."""

    bits: Sequence[int] | None
    """Widths of codes; 16 is full precision, which loses nothing."""
    formats: str | None
    """Names as `parse_formats` reads them; a tensor that none is for keeps all that were scored."""
    group_size: int | None
    """Of every `asymmetric` format; for values capped at the head dimension."""
    min_key_bits: int | None
    """The fewest bits of code that a key may have."""
    pins: Sequence[str]
    """Tensors set by hand: see pins.py. A pin may ask for what `bits` and `formats` leave out."""


def allowed_by(request: WindowedChoice) -> Allowed:
    """Return what a request allows."""
    return Allowed(
        bits=request.bits,
        formats=request.formats,
        group_size=request.group_size,
        min_key_bits=request.min_key_bits,
        pins=request.pin or (),
    )


def narrowing(allowed: Allowed) -> list[str]:
    """Return the options of a user that leave something out of the choice."""
    return [as_option(name) for name in NARROWING if allowed.get("pins" if name == "pin" else name)]


def candidates_of(
    scores: Scores, tensors: Sequence[CachedTensor], metric: str, allowed: Allowed
) -> list[list[PredictedLoss]]:
    """Return each tensor's candidates with their losses.

    A loss is in nats a token; where the metric is no `loss_increase`, it is score^2 * 4^-bits in units of the greatest
    score's square.
    Raises UsageError, saying what there is, where what is allowed leaves a tensor nothing or was not scored;
    InvalidFile for scores that lack the metric.
    """
    check_group_size(allowed.get("group_size"))
    pins = parse_pins(allowed.get("pins", ()), tensors)
    if metric == LOSS_INCREASE:
        candidates = _scored(scores, tensors, allowed, pins)
    else:
        candidates = _usual(scores, tensors, metric, allowed, pins)
    least = allowed.get("min_key_bits")
    if least is None:
        return candidates
    if not 1 <= least <= FULL_BITS:
        raise UsageError(f"--min-key-bits {least} is no width of codes; give 1 to 8, or {FULL_BITS}.")
    return [
        _wide_enough(tensor, choices, least, pins) if tensor.name == "key" else choices
        for tensor, choices in zip(tensors, candidates, strict=True)
    ]


def check_group_size(group_size: int | None) -> None:
    """Raise UsageError for a group size that no format has."""
    if group_size is not None and not 1 <= group_size <= LARGEST_GROUP:
        raise UsageError(f"a group size of {group_size} does not exist; try {USUAL_GROUP_SIZE}.")


def _usual(
    scores: Scores, tensors: Sequence[CachedTensor], metric: str, allowed: Allowed, pins: Pins
) -> list[list[PredictedLoss]]:
    """Return the usual format of every width, narrowest first: a single one where a tensor is pinned."""
    if allowed.get("formats") is not None:
        raise UsageError(
            f"--formats needs scores with {LOSS_INCREASE}: {metric} knows no formats.\n"
            "  Choose with --bits and --group-size, or measure formats with `kvprof gradients`."
        )
    wanted = allowed.get("bits")
    widths = known_bits(USUAL_BITS if wanted is None else wanted)
    group_size = allowed.get("group_size") or USUAL_GROUP_SIZE
    score_of = {(layer, name): score for layer, name, score in scores.metric(metric)}
    greatest = max(score_of[tensor.layer, tensor.name] for tensor in tensors) or 1.0

    def choices(tensor: CachedTensor) -> list[PredictedLoss]:
        pin = pins.get((tensor.layer, tensor.name))
        if pin is None:
            formats = [usual_format(tensor.stored_as, bits, group_size, tensor.head_dim) for bits in widths]
        else:
            formats = [pin.usual(tensor, group_size)]
        relative = (score_of[tensor.layer, tensor.name] / greatest) ** 2
        return [PredictedLoss(form, relative * 4.0**-form.bits, None, None) for form in formats]

    return [choices(tensor) for tensor in tensors]


def _scored(scores: Scores, tensors: Sequence[CachedTensor], allowed: Allowed, pins: Pins) -> list[list[PredictedLoss]]:
    """Return the formats that were scored, and full precision where it is asked for."""
    wanted, text = allowed.get("bits"), allowed.get("formats")
    widths = None if wanted is None else known_bits(wanted)
    names = {} if text is None else parse_formats(text)
    formats = ScoredFormats(scores, tensors)
    formats.check_scored(names)
    group_size = allowed.get("group_size")
    candidates = []
    for tensor in tensors:
        pin = pins.get((tensor.layer, tensor.name))
        if pin is not None:
            candidates.append(formats.pinned(tensor, pin, names.get(tensor.name), group_size))
        else:
            candidates.append(formats.chosen(tensor, names.get(tensor.name), widths, group_size))
    return candidates


def _wide_enough(tensor: CachedTensor, choices: list[PredictedLoss], least: int, pins: Pins) -> list[PredictedLoss]:
    """Return a key's candidates of at least so many bits."""
    wide = [choice for choice in choices if choice.format.bits >= least]
    if not wide and (pin := pins.get((tensor.layer, tensor.name))):
        raise UsageError(
            f"pin {pin.text!r} sets the key of layer {tensor.layer} to {pin}, but --min-key-bits asks for {least}.\n"
            "  Leave out one of the two."
        )
    if not wide:
        most = max(choice.format.bits for choice in choices)
        raise UsageError(
            f"--min-key-bits {least} leaves the key of layer {tensor.layer} no format; its candidates have at most "
            f"{most} bits.\n  Ask for {most}, or allow wider formats."
        )
    return wide
