"""evaluate as a function: what a plan costs in quality, beside baselines that store no more.

Reads a plan, a model and text; returns an Evaluation. Writes files only where a folder is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprof.api.given import (
    LARGEST_SEED,
    Progress,
    borrowed,
    check_around,
    check_counts,
    check_flags,
    check_range,
    check_whole,
    check_words,
    logger,
    plan_given,
    remark,
    results_in,
    several,
    silent,
    word,
)
from kvprof.errors import NotBetter, UsageError
from kvprof.records.evaluation import Evaluation
from kvprof.records.plan import BitPlan
from kvprof.records.scores import Scores
from kvprof.workspace.names import short_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvprof.evaluate.evaluation import Baseline
    from kvprof.models.load import ModelSource
    from kvprof.records.requests.measure import GradientsRequest

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
    check_words(split=split, column=column, config=config)
    check_flags(check=check, rivals=rivals, exact=exact, pack=pack, stream=stream, restart=restart)
    check_flags(trust_remote_code=trust_remote_code)
    check_around(out, progress)
    check_whole(sequence_length=sequence_length)
    check_counts(sequences=sequences, measure_from=measure_from, seed=seed)
    (name, found), *further = _named(plan, against)
    if check and not rivals and not further:
        raise UsageError("check has nothing to compare with.\n  Leave out rivals=False, or name plans with against.")
    check_range("measure_from", measure_from, 0, 2**31)
    check_range("seed", seed, 0, LARGEST_SEED)
    dtype, device = word(dtype), word(device)
    from kvprof.calibration.text import BUILTIN
    from kvprof.evaluate.evaluation import EvaluationSettings, check_request, run_evaluation
    from kvprof.records.requests.measure import GradientsRequest

    settings = EvaluationSettings(
        (BUILTIN,) if data is None else several(data),
        split,
        sequences,
        sequence_length,
        measure_from,
        seed,
        pack,
        dtype,
        device,
        exact,
        stream,
        column,
        config,
    )
    with (
        borrowed(found.model.id if model is None else model, tokenizer, trust_remote_code) as source,
        results_in(out, source.id) as folder,
    ):
        published: list[Baseline] = []
        if rivals or check:
            check_request(source, [(name, found), *further], settings, compares=check)
        if rivals:
            measuring = GradientsRequest(dtype=dtype, device=device, stream=stream)
            path = Path(plan) if isinstance(plan, str | Path) else None
            published = published_baselines(found, path, source, folder, measuring, restart)
        run = run_evaluation(source, found, settings, folder, published, further, name, restart, progress or silent)
    remark(run.remarks)
    if check:
        require_better(run.evaluation)
    return run.evaluation


def require_better(evaluation: Evaluation) -> None:
    """Raise NotBetter where the plan does not beat all that store no more bits, by mean KL."""
    if evaluation.unbeaten:
        better = ", ".join(result.name for result in evaluation.unbeaten)
        raise NotBetter(
            f"{evaluation.plan.name} is no better than {better}, at no more stored bits.\n"
            "  Allocate by another score, or with other formats; or take the better plan."
        )


def published_baselines(
    plan: BitPlan,
    path: Path | None,
    source: ModelSource,
    folder: Path,
    measuring: GradientsRequest,
    restart: bool,
    bar: Callable[[str, str], AbstractContextManager[Progress]] = lambda title, unit: nullcontext(silent),
) -> list[Baseline]:
    """Return the published rules' plans at the plan's stored bits, from scores that are there, else measured now.

    plan: known to be the model's. path: its file, where it has one. folder: for what is measured now. restart: measure
    gradients anew too, where a run of theirs was stopped. bar: makes what is told of each measurement's progress, of
    its title and its unit.
    """
    from kvprof.profile.norms import run_norms
    from kvprof.profile.sensitivity import run_sensitivity

    found = find_baseline_scores(plan, path, source, folder)
    norms, gradients = found.norms, found.gradients
    if norms is None:
        with bar("norms", "bytes") as advance:
            norms = run_norms(source, folder, restart, advance).scores
    if gradients is None:
        with bar("gradients", "sequences") as advance:
            gradients = run_sensitivity(source, measuring, folder, restart, advance).scores
    return found.plans(norms, gradients)


@dataclass(frozen=True)
class BaselineScores:
    """The scores that a plan's baselines are made from; None for those that are to be measured."""

    plan: BitPlan
    norms: Scores | None
    gradients: Scores | None

    def plans(self, norms: Scores, gradients: Scores) -> list[Baseline]:
        """Return the baselines that these scores make."""
        from kvprof.allocate.baselines import baseline_plans
        from kvprof.evaluate.evaluation import Baseline

        return [Baseline(name, candidates) for name, candidates in baseline_plans(self.plan, norms, gradients)]


def find_baseline_scores(plan: BitPlan, path: Path | None, source: ModelSource, folder: Path) -> BaselineScores:
    """Find the scores that a plan's baselines need, and say which files they are in; the arguments as above.

    They are looked for in the folder, beside the plan, and where a model's results go by default. The gradients that
    the plan was made from come before others.
    """
    from kvprof.models.identity import checkpoint_fingerprint
    from kvprof.models.inventory import take_inventory
    from kvprof.models.load import load_config
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

    return BaselineScores(
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
