"""evaluate as a function: what a plan costs in quality, beside baselines that store no more.

Reads a plan, a model and text; returns an Evaluation. Writes files only where a folder is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprof.api.job import Job, Progress, kind_of, logger, remark
from kvprof.errors import NotBetter, UsageError
from kvprof.records.evaluation import Evaluation
from kvprof.records.plan import BitPlan
from kvprof.records.requests.check import CalibrateRequest, EvaluateRequest, GenerateRequest
from kvprof.records.requests.measure import GradientsRequest
from kvprof.records.scores import Scores
from kvprof.workspace.names import short_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvprof.evaluate.evaluation import Baseline, EvaluationRun
    from kvprof.evaluate.kl_factor import CalibrateRun
    from kvprof.models.source import ModelSource
    from kvprof.records.replies import Continuations

Plan = BitPlan | str | Path


def evaluate(
    plan: Plan,
    model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: Any = None,
    against: Mapping[str, Plan] | Plan | Sequence[Plan] = (),
    check: bool = False,
    rivals: bool = True,
    exact: bool = False,
    data: str | Path | Sequence[str | Path] | None = None,
    split: str | None = None,
    column: str | None = None,
    config: str | None = None,
    sequences: int = 12,
    sequence_length: int | None = None,
    measure_from: int = 0,
    seed: int = 0,
    pack: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    stream: bool = False,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure how far a plan's cache moves the model's predictions on held-out text, as `kvprof evaluate` does.

    plan: a BitPlan, or its file. model: as `norms` takes it, by default the plan's own. tokenizer: as `gradients` takes
    it. against: further plans, by name or as files. rivals: compare with published rules that store no more bits; they
    need norms and gradients, read from `out`, from beside the plan's file or from the model's folder in `outputs` where
    they are there and fit, else measured first. check: raise NotBetter unless the plan beats all that store no more
    bits. exact: token by token through the packed cache. sequence_length: tokens; 512 by default. measure_from: the
    first position that counts. The rest is named as the command's options are. out: a folder for evaluation.json and
    its journal, and for what the baselines need; without it nothing is written. progress: called with (forwards done,
    forwards in all) of the evaluation itself.
    Returns an Evaluation: of each plan KL divergence in nats a token with its standard error, top-1 agreement,
    perplexity, stored bits; every number against the same model with its cache in full precision.
    Raises Mismatch for another model's plan, UsageError for options that do not go together, CalibrationError for text
    that cannot be read, ModelError for a model that cannot be used.
    """
    given = locals()
    request = EvaluateRequest.of(given, of_function=True)
    run = evaluation_as_asked(request, plan, against, Job.of(given))
    remark(run.remarks)
    if request.check:
        require_better(run.evaluation)
    return run.evaluation


def evaluation_as_asked(
    request: EvaluateRequest, plan: Plan, against: Mapping[str, Plan] | Plan | Sequence[Plan], job: Job
) -> EvaluationRun:
    """Evaluate a plan for the command and the function, which ask whether it is better; raises as `evaluate` does."""
    if request.check and not request.rivals and not against:
        raise UsageError("--check has nothing to compare with.\n  Leave out --no-rivals, or name plans with --against.")
    (name, found), *further = _named(plan, against)
    from kvprof.evaluate.evaluation import check_request, run_evaluation

    path = Path(plan) if isinstance(plan, str | Path) else None
    with job.of_model(found.model.id).opened() as (source, folder):
        published: list[Baseline] = []
        if request.rivals or request.check:  # run_evaluation checks the same, but after the baselines are measured
            check_request(source, [(name, found), *further], request, compares=request.check)
        if request.rivals:
            published = published_baselines(request, found, path, source, folder, job)
        return run_evaluation(
            source,
            found,
            request,
            folder,
            published,
            further,
            name,
            job.restart,
            job.progress,
            job.writing,
            job.announce,
        )


def require_better(evaluation: Evaluation) -> None:
    """Raise NotBetter where the plan does not beat all that store no more bits, by mean KL."""
    if evaluation.unbeaten:
        better = ", ".join(result.name for result in evaluation.unbeaten)
        raise NotBetter(
            f"{evaluation.plan.name} is no better than {better}, at no more stored bits.\n"
            "  Allocate by another score, or with other formats; or take the better plan."
        )


def published_baselines(
    request: EvaluateRequest, plan: BitPlan, path: Path | None, source: ModelSource, folder: Path, job: Job
) -> list[Baseline]:
    """Return the published rules' plans at the plan's stored bits, from scores that are there, else measured now.

    plan: known to be the model's. path: its file, where it has one. folder: for what is measured now.
    """
    from kvprof.allocate.baselines import baseline_plans
    from kvprof.evaluate.evaluation import Baseline
    from kvprof.profile.norms import run_norms
    from kvprof.profile.sensitivity import run_sensitivity

    plan, norms, gradients = find_baseline_scores(plan, path, source, folder)
    if job.dry_run and (norms is None or gradients is None):
        logger.info("baselines are not counted: their scores are measured first, then nine forwards a sequence more")
        return []
    if norms is None:
        norms = run_norms(source, folder, job.restart, job.beside("norms", "bytes")).scores
    if gradients is None:
        measuring = GradientsRequest(dtype=request.dtype, device=request.device, stream=request.stream)
        advance = job.beside("gradients", "sequences")
        gradients = run_sensitivity(source, measuring, folder, job.restart, advance).scores
    return [Baseline(name, candidates) for name, candidates in baseline_plans(plan, norms, gradients)]


def find_baseline_scores(
    plan: BitPlan, path: Path | None, source: ModelSource, folder: Path
) -> tuple[BitPlan, Scores | None, Scores | None]:
    """Return a plan with its geometry, the norms and the gradients of its baselines; None for what is not there.

    They are looked for in the folder, beside the plan, and where a model's results go by default. The gradients that
    the plan was made from come before others.
    """
    from kvprof.models.config import load_config
    from kvprof.models.identity import checkpoint_fingerprint
    from kvprof.models.inventory import take_inventory
    from kvprof.storage.folders import OUTPUTS, slug
    from kvprof.workspace.scores_of_plans import find_fitting

    geometry = take_inventory(load_config(source), source.id).geometry
    fingerprint = plan.model.fingerprint or checkpoint_fingerprint(source, geometry)
    ids = dict.fromkeys(name for name in (source.id, plan.model.id) if name is not None)
    folders = [folder, *([] if path is None else [path.parent]), *(OUTPUTS / slug(name) for name in ids)]

    def find(name: str, *metrics: str) -> Scores | None:
        found, why = find_fitting(f"{name}.json", metrics, plan, folders, geometry, fingerprint)
        if found is None:
            logger.info("%s: the baselines need %s, measured now", why or f"there is no {folder / name}.json", name)
            return None
        logger.info("the baselines take their %s from %s", name, found[0])
        return found[1]

    return (
        plan if plan.geometry is not None else plan.model_copy(update={"geometry": geometry}),
        find("norms", "spectral_norm", "frobenius_norm"),
        find("gradients", "gradient_norm"),
    )


def _named(plan: Plan, against: Mapping[str, Plan] | Plan | Sequence[Plan]) -> list[tuple[str, BitPlan]]:
    """Return all plans with their names: those given, of a file its own, else `plan` and numbers."""
    others: Sequence[Plan]
    if isinstance(against, Mapping):
        others = list(against.values())
    else:
        others = [against] if isinstance(against, BitPlan | str | Path) else against
        if not isinstance(others, Sequence):
            raise UsageError(f"against={against!r}: plans, their files, or both by name are needed.")
    given = [plan, *others]
    plans = [plan_given(each) for each in given]
    files = [
        Path(each) if isinstance(each, str | Path) else Path("plan" if place == 1 else f"plan {place}")
        for place, each in enumerate(given, 1)
    ]
    names = short_names(files)
    if isinstance(against, Mapping):
        names[1:] = against
    return list(zip(names, plans, strict=True))


def plan_given(plan: Plan) -> BitPlan:
    """Return a plan, read where a file is named. Raises InvalidFile as `BitPlan.load` does, UsageError for neither."""
    if isinstance(plan, BitPlan):
        return plan
    if not isinstance(plan, str | Path):
        raise UsageError(f"{kind_of(plan)} is no plan.\n  Give what kvprof.allocate returns, or its file.")
    return BitPlan.load(plan)


def calibration_as_asked(
    request: CalibrateRequest, plans: Sequence[Path], scores: Path | None, job: Job
) -> CalibrateRun:
    """Measure the ratio of plans' KL to its prediction, and keep it with the scores.

    plans: their files; by default the best ones at a few budgets. scores: the file that predicts them; by default what
    the plans were made from. Raises Mismatch for plans or scores of another model, and as `evaluate` does.
    """
    from kvprof.analysis.calibration_plans import predict_plans, usual_plans
    from kvprof.workspace.scores_of_plans import scores_of_plans

    read = {path: BitPlan.load(path) for path in plans}
    path, found = scores_of_plans(read) if scores is None else (scores, Scores.load(scores))
    named = dict(zip(short_names(read), read.values(), strict=True)) if read else usual_plans(found)
    predicted = predict_plans(found, named)
    from kvprof.evaluate.kl_factor import run_calibrate

    job = replace(job.of_model(predicted[0].plan.model.id), out=path.parent)
    with job.opened() as (source, folder):
        return run_calibrate(source, found, path, predicted, request, folder, job.restart, job.progress, job.writing)


def generation_as_asked(request: GenerateRequest, prompt: str, plan: BitPlan, job: Job) -> Continuations:
    """Continue a prompt in full precision and with a plan; raises Mismatch for another model's plan."""
    from kvprof.evaluate.generation import compare_continuations

    with job.of_model(plan.model.id).source() as source:
        return compare_continuations(source, plan, prompt, request, job.progress)
