"""A plan in the words of a runtime: which of its formats each tensor has, and what it writes.

Reads a BitPlan and a target; returns an Artefact, or says why the runtime cannot be told. Does not know any syntax:
each runtime's is a file of its own beside this one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from kvprof.allocate.budget import stored_bits_per_element
from kvprof.allocate.constraints import FULL, Assignment, Cell, Table, reach
from kvprof.allocate.costs import written
from kvprof.allocate.losses import entries_of, planned_tensors
from kvprof.allocate.target import WHOLE_CACHE, Target, own_token_remark, sliding_remark
from kvprof.errors import Inexpressible
from kvprof.records.external_formats import EXTERNAL
from kvprof.records.formats import TENSORS, USUAL_AXIS, TensorName, format_named
from kvprof.records.plan import BitPlan, TensorPlan


@dataclass(frozen=True)
class Artefact:
    """What a runtime is given.

    text: of the file. suffix: of its name. remarks: what to know before it is used.
    """

    text: str
    suffix: str
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Told:
    """A plan as a runtime has it: the formats of its constraints by name, and what to say of them."""

    assignment: Assignment
    remarks: tuple[str, ...]


def told(plan: BitPlan, target: Target) -> Told:
    """Return a plan in a target's formats. Raises Inexpressible, with the command that makes one that it can be told.

    A format of another quantizer stands for the target's own of equally wide codes and equal stored bits, with a
    remark: the bytes are the same, the rounding is not what was scored.
    """
    tensors = planned_tensors(plan)
    target = target.for_model(plan.geometry, plan.model.architecture)
    assignment, others = {}, {}
    for tensor, entry in zip(tensors, entries_of(plan, tensors), strict=True):
        if target.sliding == "full" and tensor.shape is not None and tensor.shape.window and not entry.is_full:
            what = f"layer {tensor.layer} has a {tensor.shape.window_text}, which it keeps in 16 bits"
            raise refused(plan, target, what)
        head_dim = tensor.head_dim or (entry.group_size if entry.is_external else None)
        place = f"the {tensor.word} of layer {tensor.layer}"
        if entry.recent_fraction and not entry.is_full:
            raise refused(plan, target, f"{place} keeps a share of the recent past in full precision")
        name = _name_for(entry, target, tensor.name, head_dim)
        if name is None:
            known = ", ".join(target.formats_of(tensor.name))
            raise refused(plan, target, f"{place} has {entry.name}; {target.name} knows {known}")
        if name != entry.name:
            others[entry.name + (" (per channel)" if entry.axis == "channel" else "")] = name
        assignment[tensor.layer, tensor.name] = name
    assert target.constraints is not None
    problem = target.constraints.misfit(assignment, plan.model.num_layers)
    if problem is not None:
        raise refused(plan, target, problem)
    return Told(assignment, (*_quantizer_remarks(target, others), *window_remarks(plan, target)))


def check_own(plan: BitPlan, target: Target) -> None:
    """Raise Inexpressible for a plan that is not of kvprof's own formats alone."""
    for entry in plan.layers:
        for tensor in TENSORS:
            form = entry.tensor(tensor)
            if form.is_external:
                raise refused(plan, target, f"the {tensor} of layer {entry.layer} has {form.name}, another runtime's")


def window_remarks(plan: BitPlan, target: Target) -> list[str]:
    """Return that a runtime keeps other tokens in full precision than the plan does."""
    if (remark := own_token_remark(plan, target)) is not None:
        return [remark]
    if plan.window == target.window:
        return []
    own = f"the first {plan.window.sink_tokens} and the last {plan.window.recent_tokens} tokens"
    does = (
        "quantizes every token"
        if target.window.with_own_token_exact == WHOLE_CACHE.with_own_token_exact
        else f"keeps the first {target.window.sink_tokens} and the last {target.window.recent_tokens}"
    )
    return [f"the plan keeps {own} in full precision, {target.name} {does}: its KL is not what was predicted"]


def _name_for(entry: TensorPlan, target: Target, tensor: TensorName, head_dim: int | None) -> str | None:
    """Return the target's format that stands for a plan's entry, or None."""
    known = target.formats_of(tensor)
    if entry.is_full:
        return FULL if FULL in known else None
    if entry.name in known and (entry.is_external or entry.axis == USUAL_AXIS[tensor]):
        return entry.name
    stored = entry.bits, entry.stored_bits(head_dim)
    if entry.is_external:  # of the formats that the runtime has one word for, the one of this model
        for name in known:
            if target.word(name) == target.word(entry.scheme) and _stored(name, tensor, head_dim) == stored:
                return name
    own = EXTERNAL[entry.scheme].family if entry.is_external else None
    for name in known:
        # Of one family two formats are two things that its runtimes tell apart.
        if name in EXTERNAL and EXTERNAL[name].family != own and _stored(name, tensor, head_dim) == stored:
            return name
    return None


def _stored(name: str, tensor: TensorName, head_dim: int | None) -> tuple[int, Fraction] | None:
    """Return the bits of a code of another runtime's format, and its stored bits; None where heads cannot have it."""
    if name not in EXTERNAL or not EXTERNAL[name].fits(head_dim):
        return None
    form = format_named(name, tensor, head_dim)
    return form.bits, form.stored_bits(head_dim)


def _quantizer_remarks(target: Target, others: dict[str, str]) -> list[str]:
    if not others:
        return []
    pairs = ", ".join(f"{own} as {name}" for own, name in others.items())
    return [
        f"scored with another quantizer than {target.name}'s: {pairs}, of the same bits, but rounded otherwise and "
        f"along each token's channels; `kvprof gradients --target {target.name}` scores its own"
    ]


def skipped_remarks(plan: BitPlan, target: Target, does: str) -> list[str]:
    """Return what a runtime does with the layers that a plan leaves alone, where there are any."""
    if not plan.skipped:
        return []
    layers = ", ".join(str(entry.layer) for entry in plan.skipped)
    remarks = [f"the plan leaves layers {layers} alone; {target.name} {does}"]
    sliding = sliding_remark(plan, target)
    return remarks if sliding is None else [*remarks, sliding]


def refused(plan: BitPlan, target: Target, problem: str) -> Inexpressible:
    """Return the error for a plan that a target cannot be told, with the command that makes one that it can."""
    budget = _nearest_budget(plan, target)
    advice = (
        f"Make one that it can: kvprof allocate --target {target.name} --budget {budget}"
        if budget is not None
        else "No plan for heads like these can be made for it."
    )
    return Inexpressible(f"{target.name} cannot be told this plan: {problem}.\n  {advice}")


def _nearest_budget(plan: BitPlan, target: Target) -> str | None:
    """Return the stored bits that a target can reach nearest to a plan's, as an option takes them; None for none."""
    tensors = planned_tensors(plan)
    target = target.for_model(plan.geometry, plan.model.architecture)
    stored = stored_bits_per_element(tensors, entries_of(plan, tensors))
    if target.constraints is None:
        return written(stored, "stored", math.ceil)
    bits = {
        (tensor.layer, tensor.name): {
            name: tensor.width * form.stored_bits(tensor.head_dim) for name, form in target.forms(tensor).items()
        }
        for tensor in tensors
    }
    unit = math.lcm(*(one.denominator for row in bits.values() for one in row.values()))
    cells = {place: {name: Cell(int(one * unit), 0.0) for name, one in row.items()} for place, row in bits.items()}
    ends = reach(target.constraints, Table(cells, plan.model.num_layers))
    if ends is None:
        return None
    low, high = (Fraction(end, unit * sum(tensor.width for tensor in tensors)) for end in ends)
    return written(max(stored, low), "stored", math.ceil) if stored < high else written(high, "stored", math.floor)
