"""One plan on one sequence: measured once, kept in the journal, and found there again.

Reads a model and its text; writes journal entries. Does not know which plans compete, nor what is told of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvprof.errors import KvprofError
from kvprof.evaluate.logits import Route, planned_logits, reference_logits
from kvprof.evaluate.summary import SequenceResult
from kvprof.metrics import token_kl, token_nll, top1_agreement
from kvprof.models.load import wider_dtype_advice
from kvprof.records.plan import BitPlan
from kvprof.storage.journal import Journal


class Pieces:
    """All that is measured, a sequence and a plan at a time.

    Plans that store the same in the same way share their pieces, whatever they are called and wherever they come from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Sequence[Sequence[int]],
        measure_from: int,
        route: Route,
        log: Journal,
    ) -> None:
        self._model, self._sequences, self._first, self._route, self._log = model, sequences, measure_from, route, log
        with log.understood():
            for key, entry in log.done.items():
                self._check_measured(key, entry)

    def _check_measured(self, key: str, entry: dict[str, Any]) -> None:
        """Raise ValueError, or whatever reading it raises, for what `measure` has not added."""
        what, _, index = key.rpartition(" ")
        tokens = len(self._sequences[int(index)]) - self._first
        numbers, agrees = [entry["nll_nats"]], []
        if entry.keys() != ({"nll_nats"} if what == "reference" else {"kl_nats", "agrees", "nll_nats"}):
            raise ValueError(key)
        if what != "reference":
            numbers, agrees = [*numbers, *entry["kl_nats"]], entry["agrees"]
            if not len(agrees) == len(numbers) - 1 == tokens:
                raise ValueError(key)
        if not all(type(number) is float and math.isfinite(number) for number in numbers) or {*agrees} - {0, 1}:
            raise ValueError(key)

    def keys(self, plans: Iterable[BitPlan], index: int) -> dict[str, BitPlan | None]:
        """Return the journal's key of each piece of a sequence with its plan; None is full precision."""
        return {f"reference {index}": None, **{f"{plan.recipe} {index}": plan for plan in plans}}

    def has(self, key: str) -> bool:
        """Whether a piece is measured."""
        return key in self._log.done

    def measure(self, plans: Iterable[BitPlan], index: int, finished: Callable[[], None]) -> None:
        """Measure what is missing of a sequence; one forward in full precision serves all plans."""
        missing = {key: plan for key, plan in self.keys(plans, index).items() if not self.has(key)}
        if not missing:
            return
        ids = self._sequences[index]
        reference = reference_logits(self._model, ids, self._first)
        targets = torch.tensor(ids[self._first + 1 :], device=reference.device)
        for key, plan in missing.items():
            if plan is None:
                nll = float(token_nll(reference[:-1], targets).sum())
                entry: dict[str, object] = {"nll_nats": nll}
                finite = math.isfinite(nll)
            else:
                # Held by no name here, a plan's logits are gone before those of the next one come.
                entry, finite = _compared(
                    reference, planned_logits(self._model, plan, ids, self._route, self._first), targets
                )
            if not finite:
                raise KvprofError(_overflow_advice(self._model, "full precision" if plan is None else "the plan"))
            self._log.add(key, entry)
            finished()

    def mean_kl(self, plan: BitPlan, indices: Sequence[int]) -> float:
        """Return a plan's mean KL over some sequences."""
        numbers = [kl for result in self.results(plan, indices) for kl in result.kl_nats]
        return math.fsum(numbers) / len(numbers)

    def results(self, plan: BitPlan, indices: Sequence[int]) -> list[SequenceResult]:
        """Return what was measured of a plan on each sequence."""
        recipe = plan.recipe
        found = [self._log.done[f"{recipe} {index}"] for index in indices]
        return [SequenceResult(tuple(one["kl_nats"]), tuple(one["agrees"]), one["nll_nats"]) for one in found]

    def reference(self, indices: Sequence[int]) -> tuple[list[float], list[int]]:
        """Return each sequence's negative log likelihood in full precision, and its number of targets."""
        nll = [self._log.done[f"reference {index}"]["nll_nats"] for index in indices]
        return nll, [len(self._sequences[index]) - self._first - 1 for index in indices]


def _compared(reference_TV: Tensor, planned_TV: Tensor, targets: Tensor) -> tuple[dict[str, object], bool]:
    """Return the journal's entry of a plan on a sequence, and whether all of its numbers are finite."""
    planned_TV = planned_TV.to(reference_TV.device)
    kl, nll = token_kl(reference_TV, planned_TV), float(token_nll(planned_TV[:-1], targets).sum())
    agrees = top1_agreement(reference_TV, planned_TV).int().tolist()
    entry: dict[str, object] = {"kl_nats": kl.tolist(), "agrees": agrees, "nll_nats": nll}
    return entry, math.isfinite(nll) and bool(kl.isfinite().all())


def _overflow_advice(model: PreTrainedModel, what: str) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    advice = wider_dtype_advice(model, "the model's weights are damaged, or the text drives it out of range")
    return f"the logits of {what} are not finite in {dtype}.\n  {advice}"
