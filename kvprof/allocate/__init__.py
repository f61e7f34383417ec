"""From Scores and a budget to a BitPlan: arithmetic on records, no tensors.

`allocate` is what the command calls: it picks the method by name, reads the limit and refuses options that do not go
together. It decides nothing about bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvprof.allocate.budget import Limit, bit_limit, memory_limit
from kvprof.allocate.candidates import USUAL_GROUP_SIZE, Allowed
from kvprof.allocate.constrained import plan_within
from kvprof.allocate.coverage import covered_scores
from kvprof.allocate.kl_target import cheapest, parse_kl
from kvprof.allocate.methods import GREEDY_METRICS, KVMIX_FRACTION, default_metric, exact, kvmix, norm_greedy, uniform
from kvprof.allocate.pins import check_pins
from kvprof.allocate.target import Target, check_latents
from kvprof.allocate.task import usual_window, without_sinks
from kvprof.callables import make_callable
from kvprof.errors import UsageError, did_you_mean
from kvprof.records.document import LONGEST_TEXT
from kvprof.records.formats import TensorName, parse_formats
from kvprof.records.plan import BitPlan, Provenance, Window
from kvprof.records.requests.plan import AllocateRequest
from kvprof.records.scores import LOSS_INCREASE, METRICS, Scores, default_unit

__all__ = ["RULES", "allocate", "allocate_as_asked", "check_request", "metric_needed"]

RULES = ("exact", "norm-greedy", "kvmix", "uniform")

_LIMIT_OPTIONS = ("--budget", "--unit", "--memory", "--context", "--batch")
_OPTIONS = {
    "exact": (*_LIMIT_OPTIONS, "--max-kl", "--metric", "--bits", "--formats", "--min-key-bits", "--tie", "--target"),
    "norm-greedy": (*_LIMIT_OPTIONS, "--metric", "--bits", "--min-key-bits", "--as-published"),
    "kvmix": ("--top-fraction", "--as-published"),
    "uniform": ("--bits-key", "--bits-value", "--formats", "--metric"),
}
"""The options that each rule obeys, besides those that all of them do."""
_ALL_OPTIONS = frozenset(option for options in _OPTIONS.values() for option in options)


def metric_needed(
    rule: str,
    metric: str | None = None,
    max_kl: str | float | None = None,
    formats: str | None = None,
    target: str | None = None,
) -> str | None:
    """Return the metric that scores must have to serve a request; None where any that can be allocated by will do.

    Raises UsageError for an unknown rule.
    """
    _check_rule(rule)
    if rule == "kvmix":
        return "gradient_norm"
    if metric is None and rule == "norm-greedy":
        return GREEDY_METRICS[0]
    if metric is None and rule == "exact" and not (max_kl is None and formats is None and target is None):
        return LOSS_INCREASE
    return metric


def allocate(
    scores: Scores,
    *,
    rule: str = "exact",
    budget: str | float | None = None,
    unit: str | None = None,
    memory: str | None = None,
    context: int | None = None,
    batch: int | None = None,
    max_kl: str | float | None = None,
    metric: str | None = None,
    bits: Sequence[int] | None = None,
    formats: str | None = None,
    min_key_bits: int | None = None,
    tie: str | None = None,
    target: Target | None = None,
    top_fraction: str | float | None = None,
    as_published: bool = False,
    bits_key: int | None = None,
    bits_value: int | None = None,
    group_size: int | None = None,
    pins: Sequence[str] = (),
    window: Window | None = None,
    layers: str | None = None,
) -> BitPlan:
    """Return the plan of a rule, named as in RULES.

    budget, unit: bits per element, "nominal" or "stored"; by default what the metric's own is: stored bits of formats
    that were scored, nominal bits by a norm. memory, context, batch: bytes of cache, such as "1.5GiB", for `batch`
    (default 1) sequences of `context` tokens. max_kl: instead of a limit, see `kl_target.cheapest`; costs are counted
    in `unit`, stored bits by default, or in bytes where a context is given. metric, bits, formats, min_key_bits, tie:
    see `methods.exact`. target: a runtime, within whose constraints the plan is solved. top_fraction:
    for `kvmix`. as_published: `norm-greedy` and `kvmix` as their papers have them, without sinks, and KVmix with the
    groups of its kernels. bits_key, bits_value, or formats as "key:rot3,value:rot2": for `uniform`. group_size: of
    scored formats, all by default; else USUAL_GROUP_SIZE. pins: see pins.py. window: by default the scores' own, or the
    target's. layers: `full` leaves sliding layers alone, `all` (the default) only where a plan would save nothing of
    them, in `context` tokens where these are given.
    Raises UsageError for an unknown rule, an option that the rule would ignore or lacks, or options that contradict
    each other; and whatever the rule raises.
    """
    _refuse_ignored(
        rule,
        {
            "--budget": budget,
            "--unit": unit,
            "--memory": memory,
            "--context": context,
            "--batch": batch,
            "--max-kl": max_kl,
            "--metric": metric,
            "--bits": bits,
            "--formats": formats,
            "--min-key-bits": min_key_bits,
            "--tie": tie,
            "--target": target,
            "--top-fraction": top_fraction,
            "--as-published": as_published or None,
            "--bits-key": bits_key,
            "--bits-value": bits_value,
        },
    )
    window = window or usual_window(scores, own=None if target is None else target.window)
    if as_published:
        window = without_sinks(window)
    if target is not None:
        check_latents(target, scores.geometry)
    scores = covered_scores(scores, layers, window, context, target)
    usual_group = USUAL_GROUP_SIZE if group_size is None else group_size
    if rule == "kvmix":
        return kvmix(
            scores,
            top_fraction=KVMIX_FRACTION if top_fraction is None else top_fraction,
            group_size=usual_group,
            as_published=as_published,
            pins=pins,
            window=window,
        )
    if rule == "uniform":
        key, value = _pair(bits_key, bits_value, formats)
        return uniform(scores, key, value, metric=metric, group_size=usual_group, pins=pins, window=window)
    allowed = Allowed(bits=bits, formats=formats, group_size=group_size, min_key_bits=min_key_bits, pins=pins)
    if target is not None:
        if max_kl is not None or tie is not None:
            raise UsageError("--target takes a --budget or --memory; leave out --max-kl and --tie.")
        if metric not in (None, LOSS_INCREASE):
            raise UsageError(f"--target needs {LOSS_INCREASE}: {metric} knows no formats.")
        limit = _limit(rule, LOSS_INCREASE, budget, unit, memory, context, batch)
        return plan_within(scores, target, limit, window=window, **allowed)
    if max_kl is not None:
        _check_inverse(metric, budget, memory)
        measure = _measure(unit, context, batch)
        return cheapest(scores, max_kl, measure, tie=tie, window=window, **allowed)
    metric = metric or default_metric(scores, METRICS if rule == "exact" else GREEDY_METRICS)
    limit = _limit(rule, metric, budget, unit, memory, context, batch)
    if rule == "norm-greedy":
        return norm_greedy(scores, limit, metric=metric, window=window, **allowed)
    return exact(scores, limit, metric=metric, tie=tie, window=window, **allowed)


def allocate_as_asked(
    scores: Scores, request: AllocateRequest, target: Target | None = None, command: str | None = None
) -> BitPlan:
    """Return the plan of a request, which it keeps in its provenance.

    target: the runtime that the request names. command: for readers. Raises as `allocate` does.
    """
    options = request.said()
    for name in ("sink_tokens", "recent_tokens", "scores", "target"):
        options.pop(name, None)
    options["pins"] = options.pop("pin", ())
    own = None if target is None else target.window
    plan = allocate(
        scores,
        **options,
        target=target,
        window=usual_window(scores, request.sink_tokens, request.recent_tokens, own),
    )
    if command is not None and len(command) > LONGEST_TEXT:
        command = None  # no file could be read with it; the request says the same
    made = (plan.provenance or Provenance()).model_copy(update={"command": command, "request": request})
    return plan.model_copy(update={"provenance": made})


def check_request(rule: str = "exact", target: object = None, metric: str | None = None, **options: Any) -> None:
    """Raise the UsageError that `allocate` would for a request whatever the scores: before they are measured.

    options: as `allocate` takes them; None where one is not given.
    """
    given = {"target": target, "metric": metric, **options}
    _refuse_ignored(
        rule, {f"--{name.replace('_', '-')}": None if value is False else value for name, value in given.items()}
    )
    asked = {name: options.get(name) for name in ("budget", "unit", "memory", "context", "batch")}
    check_pins(options.get("pin") or ())
    if rule == "kvmix":
        return
    if rule == "uniform":
        _pair(options.get("bits_key"), options.get("bits_value"), options.get("formats"))
    elif options.get("max_kl") is not None:
        _check_inverse(metric, asked["budget"], asked["memory"])
        parse_kl(options["max_kl"])
        _measure(asked["unit"], asked["context"], asked["batch"])
    else:
        _limit(rule, metric or LOSS_INCREASE, **asked)


def _check_rule(rule: str) -> None:
    if rule not in RULES:
        raise UsageError(f"unknown rule {rule!r}: {did_you_mean(rule, RULES)}")


def _refuse_ignored(rule: str, options: Mapping[str, object]) -> None:
    """Raise UsageError for an unknown rule, and for an option, by its name and value, that the rule would ignore."""
    _check_rule(rule)
    for option, value in options.items():
        if value is not None and option in _ALL_OPTIONS and option not in _OPTIONS[rule]:
            takes = ", ".join(_OPTIONS[rule])
            raise UsageError(f"--rule {rule} takes no {option}; it would change nothing.\n  {rule} takes {takes}.")


def _pair(bits_key: int | None, bits_value: int | None, formats: str | None) -> tuple[int | str, int | str]:
    """Return what `uniform` gives keys and values: widths, or formats by name."""
    if formats is None:
        if bits_key is None or bits_value is None:
            raise UsageError(
                "--rule uniform needs the bits of both.\n"
                "  Give --bits-key 4 --bits-value 2, or --formats key:int3g64,value:rot2."
            )
        return bits_key, bits_value
    if bits_key is not None or bits_value is not None:
        raise UsageError("--formats and --bits-key, --bits-value both say what a uniform plan is; give one of them.")
    names = parse_formats(formats)

    def only(tensor: TensorName) -> str:
        if len(names[tensor]) != 1:
            raise UsageError(
                f"--rule uniform needs one format for {tensor}s, found {', '.join(names[tensor]) or 'none'}.\n"
                "  Write --formats key:int3g64,value:rot2."
            )
        return names[tensor][0]

    return only("key"), only("value")


def _check_inverse(metric: str | None, budget: str | float | None, memory: str | None) -> None:
    """Raise UsageError for what does not go together with --max-kl."""
    if budget is not None or memory is not None:
        raise UsageError("--max-kl asks for the cheapest plan; leave out --budget and --memory.")
    if metric not in (None, LOSS_INCREASE):
        raise UsageError(f"--max-kl needs {LOSS_INCREASE}: {metric} predicts no KL divergence.")


def _measure(unit: str | None, context: int | None, batch: int | None) -> Limit:
    """Return what the cost of a plan is counted in, where there is no limit to it."""
    if context is None:
        if batch is not None:
            raise UsageError("--batch needs to know how many tokens to hold.\n  Add --context 32768.")
        return bit_limit(0, default_unit(LOSS_INCREASE) if unit is None else unit)
    if unit is not None:
        raise UsageError("--unit counts bits; with --context, --max-kl counts bytes. Leave out one of them.")
    return memory_limit("1B", context, 1 if batch is None else batch)


def _limit(
    rule: str,
    metric: str,
    budget: str | float | None,
    unit: str | None,
    memory: str | None,
    context: int | None,
    batch: int | None,
) -> Limit:
    """Return the one limit that the options give."""
    if budget is not None and memory is not None:
        raise UsageError("--budget and --memory are two limits; give one of them.")
    if budget is not None:
        if context is not None or batch is not None:
            raise UsageError(
                "--context and --batch belong to --memory or --max-kl; a budget in bits does not depend on them."
            )
        return bit_limit(budget, default_unit(metric) if unit is None else unit)
    if memory is not None:
        if unit is not None:
            raise UsageError("--unit belongs to --budget; --memory counts bytes.")
        if context is None:
            raise UsageError("--memory needs to know how many tokens to hold.\n  Add --context 32768.")
        return memory_limit(memory, context, 1 if batch is None else batch)
    or_kl = ", or --max-kl 0.01" if rule == "exact" else ""
    raise UsageError(f"--rule {rule} needs a limit.\n  Give --budget 2.5, or --memory 1.5GiB --context 32768{or_kl}.")


make_callable(__name__, "kvprof.api.plan")
