"""The names of result files: where a plan or a frontier goes, and what several files are called beside each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import mode

from kvprof.records.formats import TENSORS
from kvprof.records.geometry import bytes_text
from kvprof.records.plan import BitPlan
from kvprof.records.scores import Scores, default_unit
from kvprof.storage.folders import output_folder


def frontier_path(scores: Scores, path: Path, out: Path | None) -> Path:
    """Return where a frontier goes: `out` where that is a .json file, else frontier.json in the folder.

    path: of the scores; the folder is found as `plan_path` finds it. Raises OutputError where it cannot be written.
    """
    if out is not None and out.suffix == ".json":
        return out
    return output_folder(scores.model.id if scores.model and scores.model.id else path.stem, out) / "frontier.json"


def plan_path(plan: BitPlan, scores: Path, out: Path | None, max_kl: str | None = None) -> Path:
    """Return where a plan goes: `out` where that is a .json file, else a file named after its budget in the folder.

    The folder is `out`, or that of the model in `outputs/`; of a model without an id, that of the scores' file name.
    max_kl: what was asked for instead of a budget. Raises OutputError where it cannot be written.
    """
    if out is not None and out.suffix == ".json":
        return out
    return output_folder(plan.model.id or scores.stem, out) / plan_name(plan, max_kl)


def plan_name(plan: BitPlan, max_kl: str | None = None) -> str:
    """Return a plan's file name: plan-2.50.json, plan-1.50GiB.json, plan-kl-0.01.json, plan-kvmix.json.

    A unit other than its metric's usual one is named: plan-2.50-stored.json by a norm, plan-2.50-nominal.json by
    `loss_increase`.
    """
    words = ["plan"]
    solver, budget = plan.solver, plan.budget
    if solver is not None and solver.method != "exact":
        words.append(solver.method)
    if solver is not None and solver.target is not None:
        words.append(solver.target)
    if max_kl is not None:
        words.append(f"kl-{_amount(float(max_kl))}")
    elif budget is not None and budget.requested is not None:
        if budget.unit == "bytes":
            words.append(bytes_text(budget.requested).replace(" ", ""))
        else:
            two = f"{budget.requested:.2f}"
            words.append(two if float(two) == budget.requested else _amount(budget.requested))
            usual = default_unit(solver.metric if solver else None)
            words += [budget.unit] if budget.unit not in (None, usual) else []
    elif solver is not None and solver.method == "uniform":
        words.append(_uniform_name(plan))
    return "-".join(words) + ".json"


def short_names(paths: Iterable[Path]) -> list[str]:
    """Return a short name for each file: its stem, or where two are alike, all of its path."""
    found = list(paths)
    times = Counter(path.stem for path in found)
    names = [path.stem if times[path.stem] == 1 else str(path) for path in found]
    return [name.encode(errors="replace").decode() for name in names]  # a file's name may be no text


def _amount(number: float) -> str:
    return f"{number:.15g}"


def _uniform_name(plan: BitPlan) -> str:
    """Return k4v2, or for other than plain formats int3g64c-rot2: what most layers have, since some may be pinned."""
    entries = [[entry.tensor(tensor) for entry in plan.layers] for tensor in TENSORS]
    if all(form.scheme == "asymmetric" and form.clip == "none" for forms in entries for form in forms):
        keys, values = (mode(form.bits for form in forms) for forms in entries)
        return f"k{keys}v{values}"
    return "-".join(mode(form.name for form in forms) for forms in entries)
