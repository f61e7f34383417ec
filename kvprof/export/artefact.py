"""A plan in the words of a runtime: which of its formats each tensor has, and what it writes.

Reads a BitPlan and a target; returns an Artefact, or says why the runtime cannot be told. Does not know any syntax:
each runtime's is a file of its own beside this one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from kvprof.allocate.grammars import FULL, Assignment
from kvprof.allocate.measured import planned_tensors
from kvprof.allocate.targets import WHOLE_CACHE, Target
from kvprof.errors import Inexpressible
from kvprof.records.foreign import FOREIGN
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
    """A plan as a runtime has it: the formats of its grammar by name, and what to say of them."""

    assignment: Assignment
    remarks: tuple[str, ...]


def told(plan: BitPlan, target: Target) -> Told:
    """Return a plan in a target's formats. Raises Inexpressible, with the command that makes one that it can be told.

    A format of another quantizer stands for the target's own of equally wide codes and equal stored bits, with a
    remark: the bytes are the same, the rounding is not what was scored.
    """
    entries = {entry.layer: entry for entry in plan.layers}
    assignment, others = {}, {}
    for tensor in planned_tensors(plan):
        entry = entries[tensor.layer].tensor(tensor.name)
        head_dim = tensor.head_dim or (entry.group_size if entry.is_foreign else None)
        place = f"the {tensor.name} of layer {tensor.layer}"
        if entry.recent_fraction and not entry.is_full:
            raise refused(plan, target, f"{place} keeps a share of the recent past in full precision")
        name = _name_for(entry, target, tensor.name, head_dim)
        if name is None:
            known = ", ".join(target.formats_of(tensor.name))
            raise refused(plan, target, f"{place} has {entry.name}; {target.name} knows {known}")
        if name != entry.name:
            others[entry.name] = name
        assignment[tensor.layer, tensor.name] = name
    assert target.grammar is not None
    problem = target.grammar.misfit(assignment, plan.model.num_layers)
    if problem is not None:
        raise refused(plan, target, problem)
    return Told(assignment, (*_quantizer_remarks(target, others), *window_remarks(plan, target)))


def told_own(plan: BitPlan, target: Target) -> tuple[str, ...]:
    """See to it that a plan is of kvprof's own formats alone, and return no remarks; raises Inexpressible."""
    for entry in plan.layers:
        for tensor in TENSORS:
            form = entry.tensor(tensor)
            if form.is_foreign:
                raise refused(plan, target, f"the {tensor} of layer {entry.layer} has {form.name}, another runtime's")
    return ()


def window_remarks(plan: BitPlan, target: Target) -> list[str]:
    """Return that a runtime keeps other tokens in full precision than the plan does."""
    if plan.window == target.window:
        return []
    own = f"the first {plan.window.sink_tokens} and the last {plan.window.recent_tokens} tokens"
    does = (
        "quantizes every token"
        if target.window == WHOLE_CACHE
        else f"keeps the first {target.window.sink_tokens} and the last {target.window.recent_tokens}"
    )
    return [f"the plan keeps {own} in full precision, {target.name} {does}: its KL is not what was predicted"]


def _name_for(entry: TensorPlan, target: Target, tensor: TensorName, head_dim: int | None) -> str | None:
    """Return the target's format that stands for a plan's entry, or None."""
    known = target.formats_of(tensor)
    if entry.is_full:
        return FULL if FULL in known else None
    if entry.name in known and (entry.is_foreign or entry.axis == USUAL_AXIS[tensor]):
        return entry.name
    stored = entry.bits, entry.stored_bits(head_dim)
    for name in known:
        if name in FOREIGN and FOREIGN[name].fits(head_dim):
            form = format_named(name, tensor, head_dim)
            if (form.bits, form.stored_bits(head_dim)) == stored:
                return name
    return None


def _quantizer_remarks(target: Target, others: dict[str, str]) -> list[str]:
    if not others:
        return []
    pairs = ", ".join(f"{own} as {name}" for own, name in others.items())
    return [
        f"scored with another quantizer than {target.name}'s: {pairs}, of the same bits but rounded otherwise; "
        f"`kvprof gradients --target {target.name}` scores its own"
    ]


def refused(plan: BitPlan, target: Target, problem: str) -> Inexpressible:
    """Return the error for a plan that a target cannot be told, with the command that makes one that it can."""
    budget = Fraction(math.ceil(_stored_bits(plan) * 10_000), 10_000)
    return Inexpressible(
        f"{target.name} cannot be told this plan: {problem}.\n  Make one that it can: kvprof allocate --target "
        f"{target.name} --budget {float(budget):g}"
    )


def _stored_bits(plan: BitPlan) -> Fraction:
    tensors = planned_tensors(plan)
    entries = {entry.layer: entry for entry in plan.layers}
    total = sum(
        tensor.width * entries[tensor.layer].tensor(tensor.name).stored_bits(tensor.head_dim) for tensor in tensors
    )
    return Fraction(total) / sum(tensor.width for tensor in tensors)
