"""Which file is which: any file opened by what it says it is, the newest scores, a plan's place and name."""

from __future__ import annotations

from pathlib import Path
from statistics import mode

from kvprof.errors import InvalidFile, UsageError, did_you_mean
from kvprof.records.document import read_json, schema_of
from kvprof.records.evaluation import Evaluation
from kvprof.records.formats import TENSORS
from kvprof.records.geometry import bytes_text
from kvprof.records.plan import BitPlan
from kvprof.records.runs import OUTPUTS, output_folder
from kvprof.records.scores import SCALAR_METRICS, Scores

KINDS: dict[str, type[Scores] | type[BitPlan] | type[Evaluation]] = {
    "scores": Scores,
    "plan": BitPlan,
    "evaluation": Evaluation,
}
"""The kinds of file by the word that `kvprof schema` takes."""


def load_any(path: str | Path) -> Scores | BitPlan | Evaluation:
    """Read and validate a file of whatever kind it says it is; raises InvalidFile."""
    value = read_json(path)
    schema = schema_of(value, str(path))
    for kind in KINDS.values():
        if schema.rpartition("/")[0] == kind.kind.rpartition("/")[0]:
            return kind.from_json(value, str(path))
    known = [kind.kind for kind in KINDS.values()]
    raise InvalidFile(f"{path}: schema is {schema!r}, which is no file of kvprof's: {did_you_mean(schema, known)}")


def newest_scores(metric: str | None = None, outputs: Path = OUTPUTS) -> tuple[Path, Scores]:
    """Find the newest Scores file in the output folders, of those that have the metric where one is named; read it.

    A broken file is passed over where another serves. Raises InvalidFile, saying what to run or what is broken, where
    none does; UsageError for a metric that cannot be allocated by.
    """
    if metric is not None and metric not in SCALAR_METRICS:
        raise UsageError(f"unknown metric {metric!r}: {did_you_mean(metric, SCALAR_METRICS)}")
    files = [path for name in ("norms", "gradients", "divergence") for path in outputs.glob(f"*/{name}.json")]
    broken: InvalidFile | None = None
    for path in sorted(filter(Path.is_file, files), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            scores = Scores.load(path)
        except InvalidFile as error:
            broken = broken or error
            continue
        if scores.metrics and metric in (None, *scores.metrics):
            return path, scores
    if broken is not None:
        raise broken
    wanted = f"scores with {metric}" if metric else "scores"
    raise InvalidFile(
        f"no {wanted} in {outputs}/.\n  Run `kvprof norms` or `kvprof gradients` first, or name a file with --scores."
    )


def plan_path(plan: BitPlan, scores: Path, out: Path | None) -> Path:
    """Return where a plan goes: `out` where that is a .json file, else a file named after its budget in the folder.

    The folder is `out`, or that of the model in `outputs/`; of a model without an id, that of the scores' file name.
    Raises OutputError where it cannot be written.
    """
    if out is not None and out.suffix == ".json":
        return out
    return output_folder(plan.model.id or scores.stem, out) / plan_name(plan)


def plan_name(plan: BitPlan) -> str:
    """Return a plan's file name: plan-2.50.json, plan-2.50-stored.json, plan-1.50GiB.json, plan-kvmix.json."""
    words = ["plan"]
    if plan.solver is not None and plan.solver.method != "exact":
        words.append(plan.solver.method)
    if plan.budget is not None and plan.budget.requested is not None:
        amount = plan.budget.requested
        if plan.budget.unit == "bytes":
            words.append(bytes_text(amount).replace(" ", ""))
        else:
            words.append(f"{amount:.2f}" if float(f"{amount:.2f}") == amount else f"{amount:.15g}")
            words += ["stored"] if plan.budget.unit == "stored" else []
    elif plan.solver is not None and plan.solver.method == "uniform":
        keys, values = (mode(entry.tensor(tensor).bits for entry in plan.layers) for tensor in TENSORS)
        words.append(f"k{keys}v{values}")  # what most layers have: some may be pinned
    return "-".join(words) + ".json"
