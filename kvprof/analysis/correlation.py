"""Are the scores any good? Every metric held against measured divergence, and plans' predicted KL against measured.

Reads Scores, plans and evaluations; writes an Audit. Does not measure, nor know where files lie.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median, quantiles

from kvprof import __version__
from kvprof.analysis.plan_checks import check_plans
from kvprof.analysis.ranks import spearman
from kvprof.errors import InvalidFile, Mismatch, UsageError
from kvprof.records.audit import Agreement, Audit, AuditPoint, PlanCheck, RatioSpread
from kvprof.records.evaluation import Evaluation
from kvprof.records.formats import FULL_BITS, TENSORS, TensorName, format_named
from kvprof.records.geometry import check_same_model
from kvprof.records.plan import BitPlan, head_dim_of
from kvprof.records.scores import LOSS_INCREASE, SCALAR_METRICS, DecodingSetup, Scores, TensorScores
from kvprof.records.words import counted


def hold_against(
    divergence: Scores,
    others: Mapping[str, Scores],
    plans: Mapping[str, BitPlan] | None = None,
    evaluations: Sequence[Evaluation] = (),
) -> Audit:
    """Hold every metric of the other scores against the measured divergence, and plans against their evaluations.

    others: scores by name; where two of them have the same metric, the name tells them apart. Of a `loss_increase` that
    was predicted for every sequence that the divergence read, only these sequences count: that one text is harder than
    another says nothing about a score. plans: by name; a plan is found in an evaluation by its digest.
    Raises UsageError for scores that are no measured divergence, Mismatch where a file is of another model, InvalidFile
    where nothing can be compared.
    """
    if divergence.source != "divergence":
        what = f"{divergence.source!r}" if divergence.source else "not said"
        raise UsageError(
            f"these scores were not measured one tensor at a time (their source is {what}).\n"
            "  Run `kvprof divergence` first, and name its divergence.json."
        )
    for name, scores in others.items():
        _check_same_model(name, scores, divergence)
    points = _points(divergence, others)
    if not points:
        raise InvalidFile("this divergence holds no measured tensor.\n  Run `kvprof divergence` again.")
    labels = list(dict.fromkeys(label for point in points for label in point.scores))
    if not labels:
        raise InvalidFile(
            f"{', '.join(others) or 'no scores'}: nothing here speaks of the tensors and formats that were measured.\n"
            "  Run `kvprof gradients` with the same --formats."
        )
    agreements, ratios = [], []
    for bits, group, members in _groups(points):
        for label in labels:
            pairs = [(point, point.scores[label]) for point in members if label in point.scores]
            if not pairs:
                continue
            agreements.append(
                Agreement(
                    label=label,
                    group=group,
                    bits=bits,
                    tensors=len(pairs),
                    spearman=spearman([score for _, score in pairs], [point.measured_nats for point, _ in pairs]),
                )
            )
            if label.startswith(LOSS_INCREASE):
                ratios += _spread(label, group, bits, pairs)
    predicting = [scores for scores in others.values() if _has_losses(scores)]
    own = _fitting(plans or {}, divergence)
    checks = check_plans(own, evaluations, predicting)
    return Audit(
        kvprof_version=__version__,
        model=divergence.model,
        text=divergence.calibration,
        decoding=divergence.decoding,
        kl_calibration=next((scores.kl_calibration for scores in predicting if scores.kl_calibration), None),
        points=tuple(points),
        agreements=tuple(agreements),
        ratios=tuple(ratios),
        plans=tuple(checks),
        remarks=tuple(_remarks(divergence, others, plans or {}, own, checks, labels)),
    )


def _points(divergence: Scores, others: Mapping[str, Scores]) -> list[AuditPoint]:
    """Return every measured number with what each metric says of the same tensor, and of the same format."""
    labels = _labels(others)
    entries = {name: {entry.layer: entry for entry in scores.layers} for name, scores in others.items()}
    read = {name: _read_alike(divergence, scores) for name, scores in others.items()}
    points = []
    for entry in divergence.layers:
        for tensor in TENSORS:
            measured = entry.tensor(tensor)
            for form, nats in (measured.loss_increase or {}).items():
                bits = _bits(divergence, entry.layer, tensor, form)
                if bits == FULL_BITS:
                    continue
                numbers = {}
                for (name, metric), label in labels.items():
                    if entry.layer not in entries[name]:
                        continue
                    found = entries[name][entry.layer].tensor(tensor)
                    number = _loss(found, form, read[name]) if metric == LOSS_INCREASE else getattr(found, metric)
                    if number is not None:
                        numbers[label] = number
                points.append(
                    AuditPoint(
                        layer=entry.layer,
                        tensor=tensor,
                        format=form,
                        bits=bits,
                        measured_nats=nats,
                        measured_stderr_nats=(measured.loss_increase_stderr or {}).get(form),
                        scores=numbers,
                    )
                )
    return points


def _read_alike(divergence: Scores, scores: Scores) -> list[int] | None:
    """Return the places of the divergence's sequences among those of other scores; None where one is not there."""
    mine, theirs = (text and text.sequence_fingerprints for text in (divergence.calibration, scores.calibration))
    if not mine or not theirs or not set(mine) <= set(theirs):
        return None
    return [theirs.index(fingerprint) for fingerprint in mine]


def _loss(found: TensorScores, form: str, rows: Sequence[int] | None) -> float | None:
    """Return what a format was predicted to lose, of these sequences alone where each one's own is known."""
    samples = (found.loss_increase_samples or {}).get(form)
    if rows is None or samples is None:
        return (found.loss_increase or {}).get(form)
    return fmean(samples[row] for row in rows)


def _labels(others: Mapping[str, Scores]) -> dict[tuple[str, str], str]:
    """Return a label for each metric of each of the scores: the metric's name, with the scores' own where two share."""
    found = [
        (name, metric)
        for metric in (LOSS_INCREASE, *SCALAR_METRICS)
        for name, scores in others.items()
        if any(getattr(entry.tensor(tensor), metric) is not None for entry in scores.layers for tensor in TENSORS)
    ]
    metrics = [metric for _, metric in found]
    return {(name, metric): metric if metrics.count(metric) == 1 else f"{metric} ({name})" for name, metric in found}


def _bits(divergence: Scores, layer: int, tensor: TensorName, form: str) -> int:
    """Return the width of a format's codes."""
    head_dim = 2**10  # a file without a geometry does not say it, and the width does not depend on it
    if divergence.geometry is not None:
        head_dim = head_dim_of(divergence.geometry.layers[layer], tensor)
    try:
        return format_named(form, tensor, head_dim).bits
    except UsageError as error:
        raise InvalidFile(f"the divergence of the {tensor} of layer {layer}: {error}") from None


def _groups(points: Sequence[AuditPoint]) -> Iterator[tuple[int, str, list[AuditPoint]]]:
    """Yield (bits, name, points): for each width of code all tensors, then the keys and the values of each format."""
    for bits in sorted({point.bits for point in points}):
        wide = [point for point in points if point.bits == bits]
        yield bits, counted(bits, "bit"), wide
        for tensor in TENSORS:
            for form in dict.fromkeys(point.format for point in wide if point.tensor == tensor):
                yield (
                    bits,
                    f"{tensor}s {form}",
                    [point for point in wide if point.tensor == tensor and point.format == form],
                )


def _spread(label: str, group: str, bits: int, pairs: Sequence[tuple[AuditPoint, float]]) -> list[RatioSpread]:
    """Return how predicted over measured spreads; nothing where no ratio is a number."""
    ratios = [(score / point.measured_nats, point) for point, score in pairs if score > 0 and point.measured_nats > 0]
    if not ratios:
        return []
    numbers = [ratio for ratio, _ in ratios]
    tenths = quantiles(numbers, n=10, method="inclusive") if len(numbers) > 1 else numbers
    worst, place = max(ratios, key=lambda pair: abs(math.log(pair[0])))
    return [
        RatioSpread(
            label=label,
            group=group,
            bits=bits,
            tensors=len(numbers),
            median=median(numbers),
            low=tenths[0],
            high=tenths[-1],
            worst=worst,
            worst_layer=place.layer,
            worst_tensor=place.tensor,
        )
    ]


def _remarks(
    divergence: Scores,
    others: Mapping[str, Scores],
    plans: Mapping[str, BitPlan],
    own: Mapping[str, BitPlan],
    checks: Sequence[PlanCheck],
    labels: Sequence[str],
) -> Iterator[str]:
    """Say what keeps the numbers from being comparable, and what is missing."""
    ours = divergence.decoding
    for name, scores in others.items():
        theirs = scores.decoding
        if ours is None or theirs is None or not _has_losses(scores):
            continue
        if (theirs.window, theirs.suffix_fraction) != (ours.window, ours.suffix_fraction):
            yield (
                f"{name} speaks of {_decoder(theirs)}, the divergence of {_decoder(ours)}: "
                "their sizes are not comparable, only their order"
            )
        read, text = _read_alike(divergence, scores), scores.calibration
        if read is None:
            yield f"{name} is not known to have read what the divergence read: how hard a text is counts, too"
        elif text is not None and len(read) < text.sequences:
            yield f"of {name}, the {len(read)} of {text.sequences} sequences that the divergence read"
    if not any(label.startswith(LOSS_INCREASE) for label in labels):
        yield "no scores here have loss_increase for what was measured, so only ranks are compared: kvprof gradients"
    if strange := [name for name in plans if name not in own]:
        yield f"left out, as plans of another model: {', '.join(strange)}"
    missing = [name for name in own if name not in {check.name for check in checks}]
    if missing:
        yield (
            f"not measured as a whole, or never predicted: {', '.join(missing)}; "
            "`kvprof evaluate PLAN --against ANOTHER` measures several for one evaluation.json"
        )
    if any(check.measured_from == 0 for check in checks):
        yield (
            "an evaluation that counts every position, from 0 on, holds tokens that read nothing quantized, which the "
            "prediction does not: `kvprof evaluate --measure-from` leaves them out"
        )


def _decoder(decoding: DecodingSetup) -> str:
    window = decoding.window
    sinks = counted(window.sink_tokens, "sink")
    return f"{sinks}, a window of {window.recent_tokens} and the last {decoding.suffix_fraction:.0%} of each sequence"


def _has_losses(scores: Scores) -> bool:
    return any(entry.tensor(tensor).loss_increase for entry in scores.layers for tensor in TENSORS)


def _fitting(plans: Mapping[str, BitPlan], divergence: Scores) -> dict[str, BitPlan]:
    """Return the plans that can be the divergence's model's: a folder may hold others."""
    if divergence.geometry is None:
        return dict(plans)
    fingerprint = divergence.model.fingerprint if divergence.model else None
    fitting = {}
    for name, plan in plans.items():
        with contextlib.suppress(Mismatch):
            plan.check_fits(divergence.geometry, fingerprint)
            fitting[name] = plan
    return fitting


def _check_same_model(name: str, scores: Scores, divergence: Scores) -> None:
    """Raise Mismatch, naming the scores, where they are of another model than the divergence."""
    geometry = divergence.geometry or scores.geometry
    if geometry is None:
        return
    fingerprint = divergence.model.fingerprint if divergence.model else None
    check_same_model(f"file {name}", scores.model, scores.geometry, geometry, fingerprint)
