"""A recipe as a list of commands: what each is called with, what it reads and what it writes.

Reads a Recipe, and asks the disk only whether a name is a file. Runs nothing; does not know what was done before.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvprof.allocate import RULES, check_request
from kvprof.allocate.budget import parse_bits
from kvprof.allocate.targets import target_named
from kvprof.errors import InvalidFile, UsageError, did_you_mean
from kvprof.records.document import Record
from kvprof.records.recipe import Plans, Reading, Recipe, Target
from kvprof.records.scores import LOSS_INCREASE

TEXT_FILES = (".txt", ".jsonl", ".json", ".parquet", ".csv")
"""How the name of a text that is a file ends."""

Words = tuple["str | Path", ...]

MEASUREMENTS = ("norms", "spectra", "gradients", "divergence")
"""What measures the model, each in a file of its name."""

_LOADING = ("dtype", "device", "stream")
_TAKEN: dict[str, tuple[str, ...]] = {
    "spectra": _LOADING,
    "gradients": _LOADING,
    "divergence": _LOADING,
    "evaluate": _LOADING,
    "calibrate": ("dtype", "device"),
    "benchmark": ("dtype", "device"),
}
"""Which commands load a model, and what they can be told about that."""


@dataclass(frozen=True)
class Step:
    """One command.

    words: behind `kvprof`; a Path is a place, which may be written otherwise when the recipe is run from another
    folder. reads: files whose content it depends on. writes: files that are there once it is done, the first of which
    it is known by; one may hold a *. of_model: whether it reads the model itself.
    """

    words: Words
    writes: tuple[Path, ...]
    reads: tuple[Path, ...] = ()
    of_model: bool = False

    @property
    def command(self) -> str:
        """The name of the command."""
        return str(self.words[0])

    @property
    def journal(self) -> Path:
        """Where the command keeps what it has finished, while it runs, if it keeps any."""
        return self.writes[0].parent / f"{self.command}.journal"

    @property
    def arguments(self) -> list[str]:
        """The command line without `kvprof`."""
        return [str(word) for word in self.words]

    @property
    def line(self) -> str:
        """The command line as a user types it."""
        return shlex.join(["kvprof", *self.arguments])


def steps_of(recipe: Recipe, model: str | Path, folder: Path, home: Path) -> list[Step]:
    """Return the commands that carry out a recipe, in order.

    Scores that a table needs and that the recipe does not ask for are measured with their usual settings.
    model: a Path where it is on the disk. folder: for the results. home: the folder that paths in the recipe are
    relative to. Raises InvalidFile, naming the key, for a rule, runtime, width or amount of memory that there is not,
    and for two plans of one name.
    """
    return _Compiler(recipe, model, folder, home).steps()


class _Compiler:
    def __init__(self, recipe: Recipe, model: str | Path, folder: Path, home: Path) -> None:
        self._recipe, self._model, self._folder, self._home = recipe, model, folder, home
        self._scores = {name: folder / f"{name}.json" for name in MEASUREMENTS}
        self._plans: dict[Path, None] = {}

    def steps(self) -> list[Step]:
        recipe = self._recipe
        plans = [step for name in ("plans", "rivals") for step in self._allocations(name)]
        planned = list(self._plans)
        targets = [step for number, target in enumerate(recipe.targets) for step in self._target(target, number)]
        after: list[Step] = []
        if recipe.evaluate is not None:
            after.append(self._evaluate(planned))
        if recipe.audit is not None:
            after.append(self._audit(planned))
        if recipe.benchmark is not None:
            after.append(self._benchmark(planned[0]))
        needed = {path for step in (*plans, *after) for path in step.reads}
        for name in ("calibrate", "frontier"):
            needed |= {self._scores["gradients"]} if getattr(recipe, name) is not None else set()
        first = [self._measurement(name) for name, path in self._scores.items() if self._wants(name, path, needed)]
        if recipe.calibrate is not None:
            first.append(self._calibrate())
        if recipe.frontier is not None:
            first.append(self._frontier())
        steps = [*first, *plans, *after, *targets]
        if recipe.plot is not None:
            steps.append(self._plot(steps))
        if recipe.report is not None:
            steps.append(self._report(steps))
        return steps

    def _wants(self, name: str, path: Path, needed: set[Path]) -> bool:
        return getattr(self._recipe, name) is not None or path in needed

    def _measurement(self, name: str) -> Step:
        table = getattr(self._recipe, name) or Record()
        words, texts = self._options(table, () if name == "norms" else self._recipe.text)
        return Step(
            (name, self._model, *words, *self._loading(name), "--out", self._folder),
            (self._scores[name],),
            texts,
            of_model=True,
        )

    def _calibrate(self) -> Step:
        assert self._recipe.calibrate is not None
        scores = self._scores["gradients"]
        words, _ = self._options(self._recipe.calibrate)
        texts = self._options(self._recipe.gradients or Record(), self._recipe.text)[1]  # it reads them again
        return Step(
            ("calibrate", "--scores", scores, "--model", self._model, *words, *self._loading("calibrate")),
            (scores,),
            (scores, *texts),
            of_model=True,
        )

    def _frontier(self) -> Step:
        assert self._recipe.frontier is not None
        scores, out = self._scores["gradients"], self._folder / "frontier.json"
        words, _ = self._options(self._recipe.frontier)
        return Step(("frontier", *words, "--scores", scores, "--out", out), (out,), (scores,))

    def _allocations(self, table: str) -> Iterable[Step]:
        """Yield a step for each budget of each table of plans, or rivals."""
        for number, plans in enumerate(getattr(self._recipe, table)):
            place = f"{table}[{number}]"
            with _At(f"{place}.rule"):
                if plans.rule is not None and plans.rule not in RULES:
                    raise UsageError(f"unknown rule {plans.rule!r}: {did_you_mean(plans.rule, RULES)}")
            _check(plans, place)
            scores = self._scores[plans.scores or self._needed(plans)]
            words, _ = self._options(plans, leave_out=("name", "scores", "budgets"))
            for budget in plans.budgets or (None,):
                limit = () if budget is None else ("--budget", _amount(budget))
                out = self._folder / f"{_plan_name(plans, budget)}.json"
                if out in self._plans or out in self._scores.values():
                    raise InvalidFile(f"{place}: {out.name} is written twice; give one of the two another `name`.")
                self._plans[out] = None
                yield Step(("allocate", *limit, *words, "--scores", scores, "--out", out), (out,), (scores,))

    def _needed(self, plans: Plans) -> str:
        """Return the measurement that plans are made from where the recipe does not say."""
        if plans.metric in ("spectral_norm", "frobenius_norm") or (
            plans.metric is None and plans.rule == "norm-greedy"
        ):
            return "norms"
        knows_no_format = plans.metric is None and plans.max_kl is None and plans.formats is None
        if (
            knows_no_format
            and plans.rule != "kvmix"
            and self._recipe.gradients is None
            and self._recipe.norms is not None
        ):
            return "norms"
        return "gradients"

    def _evaluate(self, plans: Sequence[Path]) -> Step:
        assert self._recipe.evaluate is not None
        words, texts = self._options(self._recipe.evaluate, leave_out=("rivals",))
        has_rivals = self._recipe.evaluate.rivals is not False
        against = [word for plan in plans[1:] for word in ("--against", plan)]
        rivals = () if has_rivals else ("--no-rivals",)
        main = ("evaluate", plans[0], *against, "--model", self._model)
        reads = (self._scores["norms"], self._scores["gradients"]) if has_rivals else ()
        return Step(
            (*main, *rivals, *words, *self._loading("evaluate"), "--out", self._folder),
            (self._folder / "evaluation.json",),
            (*plans, *reads, *texts),
            of_model=True,
        )

    def _audit(self, plans: Sequence[Path]) -> Step:
        scores = self._scores
        reads = [scores["divergence"], scores["gradients"], scores["norms"], *plans]
        if self._recipe.evaluate is not None:
            reads.append(self._folder / "evaluation.json")
        words = ("audit", scores["divergence"], "--scores", scores["gradients"], "--scores", scores["norms"])
        return Step((*words, "--out", self._folder), (self._folder / "audit.json",), tuple(reads))

    def _benchmark(self, plan: Path) -> Step:
        assert self._recipe.benchmark is not None
        words, _ = self._options(self._recipe.benchmark)
        return Step(
            ("benchmark", plan, self._model, *words, *self._loading("benchmark"), "--out", self._folder),
            (self._folder / "benchmark.json",),
            (plan,),
            of_model=True,
        )

    def _target(self, asked: Target, number: int) -> Iterable[Step]:
        """Yield what makes plans for a runtime: scores of its formats in a folder of its own, plans, artefacts."""
        place = f"targets[{number}]"
        with _At(f"{place}.runtime"):
            target = target_named(asked.runtime)
        _check(asked, place)
        folder = self._folder / target.name
        if any(other.runtime == asked.runtime for other in self._recipe.targets[:number]):
            raise InvalidFile(f"{place}.runtime: {target.name} stands twice; list its budgets in one table.")
        scores = folder / "gradients.json"
        gradients = self._recipe.gradients or Record()
        words, texts = self._options(
            gradients, self._recipe.text, leave_out=("formats", "sink_tokens", "recent_tokens")
        )
        yield Step(
            ("gradients", self._model, "--target", target.name, *words, *self._loading("gradients"), "--out", folder),
            (scores,),
            texts,
            of_model=True,
        )
        words, _ = self._options(asked, leave_out=("runtime", "budgets"))
        for budget in asked.budgets or (None,):
            limit = () if budget is None else ("--budget", _amount(budget))
            plan = folder / f"{_plan_name(asked, budget)}.json"
            yield Step(
                ("allocate", "--target", target.name, *limit, *words, "--scores", scores, "--out", plan),
                (plan,),
                (scores,),
            )
            yield Step(
                ("export", plan, "--to", target.name, "--out", folder),
                (folder / f"{plan.stem}.{target.name}.*",),
                (plan,),
            )

    def _plot(self, steps: Sequence[Step]) -> Step:
        assert self._recipe.plot is not None
        words, _ = self._options(self._recipe.plot, leave_out=("pictures",))
        kind = self._recipe.plot.kind or "png"
        return Step(
            ("plot", *(self._recipe.plot.pictures or ()), "--model", self._folder, *words),
            (self._folder / "plots" / f"*.{kind}",),
            _results(steps),
        )

    def _report(self, steps: Sequence[Step]) -> Step:
        shown = ("--plan", next(iter(self._plans))) if self._plans else ()  # else it takes the newest, maybe a rival
        writes = (self._folder / "report.html", self._folder / "report.md")
        return Step(("report", self._folder, *shown), writes, _results(steps))

    def _loading(self, command: str) -> Words:
        """Return the recipe's words on how a model is loaded, of those that a command takes."""
        recipe = self._recipe
        return _words({name: getattr(recipe, name) for name in _TAKEN.get(command, ())})

    def _options(
        self, table: Record, text: Reading | tuple[()] = (), leave_out: Sequence[str] = ()
    ) -> tuple[Words, tuple[Path, ...]]:
        """Return a table's keys as options, the keys of [text] among them where it has none, and the files named."""
        options = {
            **(text.model_dump(exclude_none=True) if text else {}),
            **table.model_dump(exclude_none=True, by_alias=True),
        }
        texts = []
        data: list[str | Path] = []
        for name in options.get("data", ()):
            file, weight = _text_file(name)
            if file is None:
                data.append(name)
                continue
            path = place_of(file, self._home)
            texts.append(path)
            data.append(Path(f"{path}{weight}"))
        if data:
            options["data"] = data
        return _words({name: value for name, value in options.items() if name not in leave_out}), tuple(texts)


class _At:
    """Turns what the library says of a value into a sentence that names its place in the recipe."""

    def __init__(self, place: str) -> None:
        self._place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UsageError):
            raise InvalidFile(f"{self._place}: {error}") from None


def _results(steps: Iterable[Step]) -> tuple[Path, ...]:
    """Return the JSON files that steps write, each once."""
    return tuple(dict.fromkeys(path for step in steps for path in step.writes if path.suffix == ".json"))


def place_of(name: str, home: Path) -> Path:
    """Return where a path of a recipe is: as seen from here where that is shorter. home: the recipe's folder."""
    path = Path(os.path.abspath(home / os.path.expanduser(name)))
    try:
        relative = Path(os.path.relpath(path))
    except ValueError:  # on another drive
        return path
    return path if relative.parts[:1] == ("..",) else relative


def _text_file(name: str) -> tuple[str | None, str]:
    """Return the file that a value of `data` names, if any, and the weight that stands behind it, colon and all."""
    before, colon, weight = name.rpartition(":")
    try:
        float(weight)
    except ValueError:
        before = ""
    file, weight = (before, colon + weight) if before else (name, "")
    return (file, weight) if Path(file).suffix.lower() in TEXT_FILES else (None, "")


def _check(asked: Plans | Target, place: str) -> None:
    """Raise InvalidFile for what only a command would find out, after hours of measuring perhaps."""
    if isinstance(asked, Plans) and asked.as_published and asked.sink_tokens:
        raise InvalidFile(
            f"{place}: as_published has no sinks, sink_tokens asks for {asked.sink_tokens}; leave out one."
        )
    with _At(f"{place}.bits"):
        bits = None if asked.bits is None else parse_bits(asked.bits)
    options = asked.model_dump(exclude_none=True, exclude={"name", "scores", "budgets", "runtime", "bits"})
    if isinstance(asked, Target):
        options["target"] = asked.runtime
    for budget in asked.budgets or (None,):
        with _At(place):
            check_request(**options, bits=bits, budget=budget)


def _plan_name(asked: Plans | Target, budget: float | None) -> str:
    """Return what a plan's file is called, without .json: plan-2.50 or plan-kvmix, or by the name that it is given."""
    name = getattr(asked, "name", None)
    rule = getattr(asked, "rule", None)
    words = [name or "plan"]
    if name is None:
        words += [rule] if rule not in (None, "exact") else []
        words += [asked.metric] if isinstance(asked, Plans) and asked.metric not in (None, LOSS_INCREASE) else []
        words += [asked.runtime] if isinstance(asked, Target) else []
        if isinstance(asked, Plans):
            words += ["as-published"] if asked.as_published else []
            words += [f"kl-{_amount(asked.max_kl)}"] if asked.max_kl is not None else []
            words += [f"k{asked.bits_key}v{asked.bits_value}"] if asked.bits_key is not None else []
        words += [asked.memory.replace(" ", "")] if asked.memory is not None else []
    if budget is not None and (name is None or len(asked.budgets or ()) > 1):
        two = f"{budget:.2f}"
        words.append(two if float(two) == budget else _amount(budget))
        words += [asked.unit] if asked.unit is not None else []
    return "-".join(words)


def _amount(number: float) -> str:
    return f"{number:.15g}"


def _words(options: Mapping[str, Any]) -> Words:
    """Return options as words: a flag by itself, a value behind its option, several each behind one."""
    words: list[str | Path] = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, tuple | list) else (value,):
            if one is True:
                words.append(option)
            elif one is not None and one is not False:
                text = _amount(one) if isinstance(one, float) else str(one)
                words += [option, one if isinstance(one, Path) else text]
    return tuple(words)
