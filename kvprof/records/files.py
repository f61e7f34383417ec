"""Which file is which: the newest ones, the newest scores, a plan's place and name, short names of several files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import mode

from kvprof.errors import InvalidFile, UsageError, did_you_mean
from kvprof.records.formats import TENSORS
from kvprof.records.geometry import bytes_text
from kvprof.records.plan import BitPlan
from kvprof.records.runs import OUTPUTS, output_folder
from kvprof.records.scores import LOSS_INCREASE, METRICS, Scores, default_unit


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Return the files among paths, the last changed first; those of equal times in the order in which they come."""
    return sorted(filter(Path.is_file, paths), key=lambda path: -path.stat().st_mtime_ns)


def newest_scores(metric: str | None = None, outputs: Path = OUTPUTS) -> tuple[Path, Scores]:
    """Find the newest Scores file in the output folders, of those that have the metric where one is named; read it.

    Where none is named, its folder's scores with `loss_increase` are preferred to newer ones of the same model without;
    a measured divergence, often a sample of formats, serves only where its folder has nothing else. A broken file is
    passed over where another serves. Raises InvalidFile, saying what to run or what is broken, where none does;
    UsageError for a metric that cannot be allocated by.
    """
    if metric is not None and metric not in METRICS:
        raise UsageError(f"unknown metric {metric!r}: {did_you_mean(metric, METRICS)}")
    names = ("norms", "gradients", "divergence")
    broken: InvalidFile | None = None
    best: tuple[Path, Scores] | None = None
    for path in newest_first(path for name in names for path in outputs.glob(f"*/{name}.json")):
        if best is not None and path.parent != best[0].parent:
            continue
        try:
            scores = Scores.load(path)
        except InvalidFile as error:
            broken = broken or error
            continue
        if not scores.metrics or metric not in (None, *scores.metrics):
            continue
        if best is None or (_rank(path, scores) > _rank(*best) and _may_be_alike(scores, best[1])):
            best = path, scores
        if _rank(*best) == (True, True):
            break
    if best is not None:
        return best
    if broken is not None:
        raise broken
    wanted = f"scores with {metric}" if metric else "scores"
    makers = ["`kvprof norms`"] * (metric in (None, "spectral_norm", "frobenius_norm"))
    makers += ["`kvprof gradients`"] * (metric in (None, "gradient_norm", LOSS_INCREASE))
    raise InvalidFile(f"no {wanted} in {outputs}/.\n  Run {' or '.join(makers)} first, or name a file with --scores.")


def scores_for(target: str, outputs: Path = OUTPUTS) -> tuple[Path, Scores]:
    """Find the newest scores that were measured for a runtime, else the newest that `newest_scores` finds; read them.

    What is measured for a runtime lies in a folder of its name, within the model's.
    """
    broken: InvalidFile | None = None
    for path in newest_first(outputs.glob(f"*/{target}/gradients.json")):
        try:
            scores = Scores.load(path)
        except InvalidFile as error:
            broken = broken or error
            continue
        if LOSS_INCREASE in scores.metrics:
            return path, scores
    try:
        return newest_scores(LOSS_INCREASE, outputs)
    except InvalidFile:
        if broken is not None:
            raise broken from None
        raise


def _rank(path: Path, scores: Scores) -> tuple[bool, bool]:
    """Return what makes scores of one folder preferable to newer ones."""
    return path.stem != "divergence", LOSS_INCREASE in scores.metrics


def _may_be_alike(one: Scores, other: Scores) -> bool:
    """Whether nothing says that two files are of different models."""
    prints = [scores.model.fingerprint if scores.model else None for scores in (one, other)]
    return None in prints or prints[0] == prints[1]


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
