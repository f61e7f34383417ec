"""The plan of a request: its rule's method, its limit, and what does not go together.

Reads Scores and a request; writes a BitPlan. Decides nothing about bits.
"""

from __future__ import annotations

from kvprof.allocate.budget import Limit, bit_limit, memory_limit
from kvprof.allocate.candidates import USUAL_GROUP_SIZE, allowed_by
from kvprof.allocate.constrained import plan_within
from kvprof.allocate.coverage import covered_scores
from kvprof.allocate.kl_target import cheapest, parse_kl
from kvprof.allocate.methods import GREEDY_METRICS, KVMIX_FRACTION, default_metric, exact, kvmix, norm_greedy, uniform
from kvprof.allocate.pins import check_pins
from kvprof.allocate.target import Target, check_serves
from kvprof.allocate.task import usual_window, without_sinks
from kvprof.errors import UsageError
from kvprof.records.document import LONGEST_TEXT
from kvprof.records.formats import TensorName, parse_formats
from kvprof.records.plan import BitPlan, Provenance
from kvprof.records.requests.plan import AllocateRequest
from kvprof.records.requests.request import as_option
from kvprof.records.scores import LOSS_INCREASE, METRICS, Scores, default_unit

_LIMITS = ("budget", "unit", "memory", "context", "batch")
_OBEYED = {
    "exact": (*_LIMITS, "max_kl", "metric", "bits", "formats", "min_key_bits", "tie", "target", "device"),
    "norm-greedy": (*_LIMITS, "metric", "bits", "min_key_bits", "as_published"),
    "kvmix": ("top_fraction", "as_published"),
    "uniform": ("bits_key", "bits_value", "formats", "metric"),
}
"""What each rule obeys, besides what all of them do."""
_NOT_BY_ALL = frozenset(name for names in _OBEYED.values() for name in names)


def metric_needed(request: AllocateRequest) -> str | None:
    """Return the metric that scores must have to serve a request; None where any that can be allocated by will do."""
    if request.rule == "kvmix":
        return "gradient_norm"
    if request.metric is None and request.rule == "norm-greedy":
        return GREEDY_METRICS[0]
    needs_formats = not (request.max_kl is None and request.formats is None and request.target is None)
    return LOSS_INCREASE if request.metric is None and request.rule == "exact" and needs_formats else request.metric


def plan_by(scores: Scores, request: AllocateRequest, target: Target | None = None) -> BitPlan:
    """Return the plan of a request.

    target: the runtime that the request names, within whose constraints the plan is solved. Bits per element are by
    default counted as the metric has them: stored bits of formats that were scored, nominal bits by a norm. A
    `group_size` is of scored formats, all by default; else USUAL_GROUP_SIZE. The window is by default the scores' own,
    or the target's; `as_published` has no sinks. `layers`: "full" leaves sliding layers alone, "all" (the default) only
    where a plan would save nothing of them, in `context` tokens where these are given.
    Raises UsageError for an option that the rule would ignore or lacks, or options that contradict each other; and
    whatever the rule raises.
    """
    _refuse_ignored(request)
    own = None if target is None else target.window
    window = usual_window(scores, request.sink_tokens, request.recent_tokens, own)
    if request.as_published:
        window = without_sinks(window)
    if target is not None:
        check_serves(target, scores.geometry)
        target = target.on_device(request.device)
    elif request.device is not None:
        raise UsageError(f"--device {request.device} is of --target llama.cpp.\n  Leave it out, or give the target.")
    scores = covered_scores(scores, request.layers, window, request.context, target)
    group_size = USUAL_GROUP_SIZE if request.group_size is None else request.group_size
    pins, metric = request.pin or (), request.metric
    if request.rule == "kvmix":
        return kvmix(
            scores,
            top_fraction=KVMIX_FRACTION if request.top_fraction is None else request.top_fraction,
            group_size=group_size,
            as_published=request.as_published,
            pins=pins,
            window=window,
        )
    if request.rule == "uniform":
        key, value = _pair(request)
        return uniform(scores, key, value, metric=metric, group_size=group_size, pins=pins, window=window)
    allowed = allowed_by(request)
    if target is not None:
        if request.max_kl is not None or request.tie is not None:
            raise UsageError("--target takes a --budget or --memory; leave out --max-kl and --tie.")
        if metric not in (None, LOSS_INCREASE):
            raise UsageError(f"--target needs {LOSS_INCREASE}: {metric} knows no formats.")
        return plan_within(scores, target, _limit(request, LOSS_INCREASE), window=window, **allowed)
    if request.max_kl is not None:
        _check_inverse(request)
        return cheapest(scores, request.max_kl, _measure(request), tie=request.tie, window=window, **allowed)
    metric = metric or default_metric(scores, METRICS if request.rule == "exact" else GREEDY_METRICS)
    limit = _limit(request, metric)
    if request.rule == "norm-greedy":
        return norm_greedy(scores, limit, metric=metric, window=window, **allowed)
    return exact(scores, limit, metric=metric, tie=request.tie, window=window, **allowed)


def allocate_as_asked(
    scores: Scores, request: AllocateRequest, target: Target | None = None, command: str | None = None
) -> BitPlan:
    """Return the plan of a request, which it keeps in its provenance.

    target: the runtime that the request names. command: for readers. Raises as `plan_by` does.
    """
    plan = plan_by(scores, request, target)
    if command is not None and len(command) > LONGEST_TEXT:
        command = None  # no file could be read with it; the request says the same
    made = (plan.provenance or Provenance()).model_copy(update={"command": command, "request": request})
    return plan.model_copy(update={"provenance": made})


def check_request(request: AllocateRequest) -> None:
    """Raise the UsageError that a request would whatever the scores: before they are measured."""
    _refuse_ignored(request)
    check_pins(request.pin or ())
    if request.rule == "kvmix":
        return
    if request.rule == "uniform":
        _pair(request)
    elif request.max_kl is not None:
        _check_inverse(request)
        parse_kl(request.max_kl)
        _measure(request)
    else:
        _limit(request, request.metric or LOSS_INCREASE)


def _refuse_ignored(request: AllocateRequest) -> None:
    """Raise UsageError for an option that the rule would ignore."""
    obeyed = _OBEYED[request.rule]
    for name in request.said():
        if name in _NOT_BY_ALL and name not in obeyed:
            raise UsageError(
                f"--rule {request.rule} takes no {as_option(name)}; it would change nothing.\n"
                f"  {request.rule} takes {', '.join(map(as_option, obeyed))}."
            )


def _pair(request: AllocateRequest) -> tuple[int | str, int | str]:
    """Return what `uniform` gives keys and values: widths, or formats by name."""
    if request.formats is None:
        if request.bits_key is None or request.bits_value is None:
            raise UsageError(
                "--rule uniform needs the bits of both.\n"
                "  Give --bits-key 4 --bits-value 2, or --formats key:int3g64,value:rot2."
            )
        return request.bits_key, request.bits_value
    if request.bits_key is not None or request.bits_value is not None:
        raise UsageError("--formats and --bits-key, --bits-value both say what a uniform plan is; give one of them.")
    names = parse_formats(request.formats)

    def only(tensor: TensorName) -> str:
        if len(names[tensor]) != 1:
            raise UsageError(
                f"--rule uniform needs one format for {tensor}s, found {', '.join(names[tensor]) or 'none'}.\n"
                "  Write --formats key:int3g64,value:rot2."
            )
        return names[tensor][0]

    return only("key"), only("value")


def _check_inverse(request: AllocateRequest) -> None:
    """Raise UsageError for what does not go together with --max-kl."""
    if request.budget is not None or request.memory is not None:
        raise UsageError("--max-kl asks for the cheapest plan; leave out --budget and --memory.")
    if request.metric not in (None, LOSS_INCREASE):
        raise UsageError(f"--max-kl needs {LOSS_INCREASE}: {request.metric} predicts no KL divergence.")


def _measure(request: AllocateRequest) -> Limit:
    """Return what the cost of a plan is counted in, where there is no limit to it."""
    if request.context is None:
        if request.batch is not None:
            raise UsageError("--batch needs to know how many tokens to hold.\n  Add --context 32768.")
        return bit_limit(0, request.unit or default_unit(LOSS_INCREASE))
    if request.unit is not None:
        raise UsageError("--unit counts bits; with --context, --max-kl counts bytes. Leave out one of them.")
    return memory_limit("1B", request.context, 1 if request.batch is None else request.batch)


def _limit(request: AllocateRequest, metric: str) -> Limit:
    """Return the one limit that a request gives."""
    if request.budget is not None and request.memory is not None:
        raise UsageError("--budget and --memory are two limits; give one of them.")
    if request.budget is not None:
        if request.context is not None or request.batch is not None:
            raise UsageError(
                "--context and --batch belong to --memory or --max-kl; a budget in bits does not depend on them."
            )
        return bit_limit(request.budget, request.unit or default_unit(metric))
    if request.memory is not None:
        if request.unit is not None:
            raise UsageError("--unit belongs to --budget; --memory counts bytes.")
        if request.context is None:
            raise UsageError("--memory needs to know how many tokens to hold.\n  Add --context 32768.")
        return memory_limit(request.memory, request.context, 1 if request.batch is None else request.batch)
    or_kl = ", or --max-kl 0.01" if request.rule == "exact" else ""
    raise UsageError(
        f"--rule {request.rule} needs a limit.\n  Give --budget 2.5, or --memory 1.5GiB --context 32768{or_kl}."
    )
