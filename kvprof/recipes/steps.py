"""A recipe as a list of commands: what each is called with, what it reads and what it writes.

Reads a Recipe. Runs nothing; does not know what was done before.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvprof.errors import InvalidFile
from kvprof.recipes.checks import check_recipe
from kvprof.recipes.words import Words, amount, as_words, place_of, plan_name, text_file
from kvprof.records.document import Record
from kvprof.records.recipe import Plans, Recipe, Target
from kvprof.records.requests.measure import Reading
from kvprof.targets.registry import TARGETS
from kvprof.workspace.text_files import files_below

MEASUREMENTS = ("norms", "spectra", "gradients", "divergence")
"""What measures the model, each in a file of its name."""
OTHER_FILES = (*MEASUREMENTS, "frontier", "evaluation", "audit", "benchmark", "history")
"""What files in the folder are called that are no plans."""

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
_READING = ("spectra", "gradients", "divergence", "calibrate", "evaluate")
"""Which commands read text."""
_DECODING = ("formats", "sink_tokens", "recent_tokens")
"""What a runtime that plans are made for has its own of."""


@dataclass(frozen=True)
class Step:
    """One command.

    words: behind `kvprof`. reads: files whose content it depends on. writes: files that are there once it is done, the
    first of which it is known by; one may hold a *. of_model: whether it reads the model itself.
    """

    words: Words
    writes: tuple[Path, ...]
    reads: tuple[Path, ...] = ()
    of_model: bool = False

    def trusting(self) -> Step:
        """Return the step with the user's word that code of the model's may run, where it reads the model."""
        return replace(self, words=(*self.words, "--trust-remote-code")) if self.of_model else self

    def reading_with(self, tokenizer: str) -> Step:
        """Return the step with another tokenizer than the model's own, where it reads text."""
        return replace(self, words=(*self.words, "--tokenizer", tokenizer)) if self.command in _READING else self

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
    relative to. Raises InvalidFile, naming the key, for what does not exist or go together, and for two plans of one
    name.
    """
    return _Compiler(recipe, model, folder, home).steps()


class _Compiler:
    """Makes the steps of one recipe; remembers the plans that it has named."""

    def __init__(self, recipe: Recipe, model: str | Path, folder: Path, home: Path) -> None:
        self._recipe, self._model, self._folder, self._home = recipe, model, folder, home
        self._scores = {name: folder / f"{name}.json" for name in MEASUREMENTS}
        self._plans: list[Path] = []

    def steps(self) -> list[Step]:
        """Return all steps, each behind those that it reads from."""
        recipe = self._recipe
        reading = {name: getattr(recipe, name) for name in ("text", *MEASUREMENTS, "evaluate")}
        texts = {name: self._texts(table) for name, table in reading.items() if isinstance(table, Reading)}
        check_recipe(recipe, texts)
        behind = [step for table in ("plans", "rivals") for step in self._allocations(table)]
        behind += [self._evaluate()] if recipe.evaluate is not None else []
        behind += [self._audit()] if recipe.audit is not None else []
        behind += [self._benchmark()] if recipe.benchmark is not None else []
        behind += [step for target in recipe.targets for step in self._target(target)]
        needed = {path for step in behind for path in step.reads}
        if recipe.calibrate is not None or recipe.frontier is not None:
            needed.add(self._scores["gradients"])
        wanted = [name for name in MEASUREMENTS if getattr(recipe, name) is not None or self._scores[name] in needed]
        steps = [self._measurement(name) for name in wanted]
        steps += [self._calibrate()] if recipe.calibrate is not None else []
        steps += [self._frontier()] if recipe.frontier is not None else []
        steps += behind
        steps += [self._plot(steps)] if recipe.plot is not None else []
        return [*steps, self._report(steps)] if recipe.report is not None else steps

    def _measurement(self, name: str) -> Step:
        table = getattr(self._recipe, name) or Record()
        words, texts = self._options(table, Record() if name == "norms" else self._recipe.text)
        words = (name, self._model, *words, *self._loading(name), "--out", self._folder)
        return Step(words, (self._scores[name],), texts, of_model=True)

    def _calibrate(self) -> Step:
        """Return the step that adds to the scores that it reads, on the texts that they were measured on."""
        scores = self._scores["gradients"]
        words, _ = self._options(self._recipe.calibrate)
        _, texts = self._options(self._recipe.gradients, self._recipe.text)
        words = ("calibrate", "--scores", scores, "--model", self._model, *words, *self._loading("calibrate"))
        return Step(words, (scores,), (scores, *texts), of_model=True)

    def _frontier(self) -> Step:
        scores, out = self._scores["gradients"], self._folder / "frontier.json"
        words, _ = self._options(self._recipe.frontier)
        return Step(("frontier", *words, "--scores", scores, "--out", out), (out,), (scores,))

    def _allocations(self, table: str) -> Iterable[Step]:
        """Yield a step for each budget of each table of plans, or rivals."""
        for number, plans in enumerate(getattr(self._recipe, table)):
            scores = self._scores[plans.scores or self._needed(plans)]
            words, _ = self._options(plans, leave_out=("name", "scores", "budgets"))
            for budget in plans.budgets or (None,):
                out = self._folder / f"{plan_name(plans, budget)}.json"
                if out.stem in OTHER_FILES:
                    raise InvalidFile(
                        f"{table}[{number}].name: {out.name} is the name of another file of kvprof's; choose another."
                    )
                if out in self._plans:
                    raise InvalidFile(
                        f"{table}[{number}]: {out.name} would be written twice; give one of the two another `name`."
                    )
                self._plans.append(out)
                yield Step(("allocate", *_limit(budget), *words, "--scores", scores, "--out", out), (out,), (scores,))

    def _needed(self, plans: Plans) -> str:
        """Return the measurement that plans are made from where the recipe does not say."""
        metric, rule = plans.metric, plans.rule
        if metric in ("spectral_norm", "frobenius_norm") or (metric is None and rule == "norm-greedy"):
            return "norms"
        only_norms = self._recipe.gradients is None and self._recipe.norms is not None
        knows_no_format = metric is None and plans.max_kl is None and (plans.formats is None or rule == "uniform")
        return "norms" if only_norms and knows_no_format and rule != "kvmix" else "gradients"

    def _evaluate(self) -> Step:
        assert self._recipe.evaluate is not None
        words, texts = self._options(self._recipe.evaluate, leave_out=("rivals",))
        has_rivals = self._recipe.evaluate.rivals is not False
        against: Words = tuple(word for plan in self._plans[1:] for word in ("--against", plan))
        rivals = () if has_rivals else ("--no-rivals",)
        main = ("evaluate", self._plans[0], *against, "--model", self._model, *rivals)
        return Step(
            (*main, *words, *self._loading("evaluate"), "--out", self._folder),
            (self._folder / "evaluation.json",),
            (*self._plans, *((self._scores["norms"], self._scores["gradients"]) if has_rivals else ()), *texts),
            of_model=True,
        )

    def _audit(self) -> Step:
        against = (self._scores["gradients"], self._scores["norms"])
        options: Words = tuple(word for scores in against for word in ("--scores", scores))
        beside = (self._folder / "evaluation.json",) if self._recipe.evaluate is not None else ()
        return Step(
            ("audit", self._scores["divergence"], *options, "--out", self._folder),
            (self._folder / "audit.json",),
            (self._scores["divergence"], *against, *self._plans, *beside),
        )

    def _benchmark(self) -> Step:
        plan = self._plans[0]
        words, _ = self._options(self._recipe.benchmark)
        words = ("benchmark", plan, self._model, *words, *self._loading("benchmark"), "--out", self._folder)
        return Step(words, (self._folder / "benchmark.json",), (plan,), of_model=True)

    def _target(self, asked: Target) -> Iterable[Step]:
        """Yield what makes plans for a runtime, in a folder of its own: scores of its formats, plans, artefacts."""
        name = asked.runtime
        folder = self._folder / name
        scores = self._scores["gradients"]
        if TARGETS[name].to_score is not None:
            scores = folder / "gradients.json"
            words, texts = self._options(self._recipe.gradients, self._recipe.text, leave_out=_DECODING)
            words = ("gradients", self._model, "--target", name, *words, *self._loading("gradients"), "--out", folder)
            yield Step(words, (scores,), texts, of_model=True)
        words, _ = self._options(asked, leave_out=("runtime", "budgets"))
        for budget in asked.budgets or (None,):
            plan = folder / f"{plan_name(asked, budget)}.json"
            limit = _limit(budget)
            yield Step(
                ("allocate", "--target", name, *limit, *words, "--scores", scores, "--out", plan), (plan,), (scores,)
            )
            written = folder / f"{plan.stem.removesuffix(f'-{name}')}.{name}.*"  # what it ends in, the runtime decides
            yield Step(("export", plan, "--to", name, "--out", folder), (written,), (plan,))

    def _plot(self, steps: Sequence[Step]) -> Step:
        assert self._recipe.plot is not None
        words, _ = self._options(self._recipe.plot, leave_out=("pictures",))
        pictures = self._recipe.plot.pictures or ()
        drawn = self._folder / "plots" / f"*.{self._recipe.plot.kind or 'png'}"
        return Step(("plot", *pictures, "--model", self._folder, *words), (drawn,), _results(steps))

    def _report(self, steps: Sequence[Step]) -> Step:
        shown: Words = ("--plan", self._plans[0]) if self._plans else ()  # else it takes the newest, maybe a rival
        writes = (self._folder / "report.html", self._folder / "report.md")
        return Step(("report", self._folder, *shown), writes, _results(steps))

    def _loading(self, command: str) -> Words:
        """Return the recipe's words on how a model is loaded, of those that a command takes."""
        return as_words({name: getattr(self._recipe, name) for name in _TAKEN.get(command, ())})

    def _options(
        self, table: Record | None, text: Record | None = None, leave_out: Sequence[str] = ()
    ) -> tuple[Words, tuple[Path, ...]]:
        """Return a table's keys as options, those of [text] where it has none of its own, and the files among them."""
        options: dict[str, Any] = {}
        for record in (text, table):
            options |= {} if record is None else record.model_dump(exclude_unset=True, exclude_none=True, by_alias=True)
        texts = self._texts(Reading(data=options.get("data")))
        if texts:
            options["data"] = [self._as_place(name, file) for name, file in texts.items()]
        words = as_words({name: value for name, value in options.items() if name not in leave_out})
        return words, tuple(file for place in texts.values() if place is not None for file in files_below(place))

    def _texts(self, table: Reading) -> dict[str, Path | None]:
        """Return the texts that a table names, and the file that each is, if it is one."""
        files = {name: text_file(name, self._home)[0] for name in table.data or ()}
        return {name: None if file is None else place_of(file, self._home) for name, file in files.items()}

    def _as_place(self, name: str, file: Path | None) -> str | Path:
        """Return a text as it is seen from here, with its weight."""
        return name if file is None else Path(f"{file}{text_file(name, self._home)[1]}")


def _limit(budget: float | None) -> Words:
    return () if budget is None else ("--budget", amount(budget))


def _results(steps: Iterable[Step]) -> tuple[Path, ...]:
    """Return the JSON files that steps write, each once."""
    return tuple(dict.fromkeys(path for step in steps for path in step.writes if path.suffix == ".json"))
