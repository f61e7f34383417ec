"""Recipe: a model, its text, what to measure, budgets, rivals, runtimes and a report, in one TOML file. Typed.

A table is a command, and a key in it an option of that command in the option's own words (`sequence_length` for
`--sequence-length`; several values are a list). A table that is there, if only empty, asks for its command; an option
that is left out is the command's own default. The text that is measured on is `[text]`, which each measurement's own
keys go before; `[evaluate]` reads held-out text and names its own.

A path in a recipe (a text file, a model's folder, `out`) is relative to the folder of the recipe, whichever folder the
command runs in; `~` is the user's home. Reads TOML; does not know how a recipe is carried out, nor which rules and
runtimes there are.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from typing_extensions import Self

from kvprof.errors import InvalidFile, did_you_mean
from kvprof.records.document import Number, Record, Text, explain_invalid, read_at_most
from kvprof.records.requests import measure as requests
from kvprof.records.requests import plan as requests_plan
from kvprof.records.requests.check import Benchmark, Calibrate, Evaluate
from kvprof.records.requests.measure import BatchSize, Divergence, Reading, Spectra
from kvprof.records.requests.plan import Choice, Limits, MinKeyBits
from kvprof.records.requests.request import Flag, Word, one_or_several
from kvprof.records.requests.share import PlotRequest
from kvprof.records.scores import METRICS
from kvprof.storage.folders import RESERVED_ON_WINDOWS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LARGEST_RECIPE_BYTES = 2**17
"""A recipe for every runtime, each with ten budgets, has 10 kB."""
LONGEST_LIST = 100
_LONG_KEY = re.compile(r"""(?:\.[ \t]*[\w'"-]+[ \t]*){17}""")
PICTURES = ("norms", "spectra", "gradients", "losses", "plan", "frontier", "positions", "audit", "benchmark")
"""What `kvprof plot` can be told to draw."""

T = TypeVar("T")


def _known_metric(metric: str) -> str:
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}: {did_you_mean(metric, METRICS)}")
    return metric


def _known_picture(picture: str) -> str:
    if picture not in PICTURES:
        raise ValueError(f"no picture is called {picture!r}: {did_you_mean(picture, PICTURES)}")
    return picture


def _usable_name(name: str) -> str:
    if RESERVED_ON_WINDOWS.match(name):
        raise ValueError(f"{name!r} is a device on Windows, not a file: name the plan otherwise")
    return name


Several = Annotated[tuple[T, ...], BeforeValidator(one_or_several), Field(min_length=1, max_length=LONGEST_LIST)]
Metric = Annotated[Word, AfterValidator(_known_metric)]
Picture = Annotated[Word, AfterValidator(_known_picture)]
Share = Annotated[Number, Field(gt=0, le=1)]


class Norms(Record):
    """`kvprof norms`: it has no options of its own."""


class Gradients(requests.Gradients):
    """`kvprof gradients`."""

    stable_at: Several[Number] | None = None
    batch_size: BatchSize = 1


class Frontier(requests_plan.Frontier):
    """`kvprof frontier`, of the gradients' scores."""

    low: Number | None = Field(None, alias="from")
    high: Number | None = Field(None, alias="to")
    pin: Several[Word] | None = None

    @model_validator(mode="after")
    def _goes_up(self) -> Self:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"from {self.low:g} to {self.high:g} runs backwards; exchange them")
        return self


class Plans(requests_plan.Plan):
    """`kvprof allocate`: a plan for each budget, or the one plan of a rule or limit that takes none.

    name: what the file is called instead of plan-...; of several budgets, what stands before them.
    budgets: bits an element. scores: which measurement it spends by; by default what the metric, or the rule, needs.
    """

    name: Annotated[Word, Field(pattern=r"^[\w.+-]+$", max_length=100), AfterValidator(_usable_name)] | None = None
    budgets: Several[Number] | None = None
    scores: Literal["norms", "gradients", "divergence"] | None = None
    metric: Metric | None = None
    max_kl: Number | None = None
    pin: Several[Word] | None = None
    top_fraction: Share | None = None


class Target(Choice, Limits):
    """Another runtime: its own formats scored, a plan within what it can be told, and the artefact for it."""

    runtime: Word
    """`kvprof targets` lists them."""
    budgets: Several[Number] | None = None
    pin: Several[Word] | None = None
    min_key_bits: MinKeyBits = None


class Audit(Record):
    """`kvprof audit`: it has no options of its own. Needs [divergence]."""


class Plot(PlotRequest):
    """`kvprof plot`: what was measured as pictures, in the folder plots/ beside it."""

    pictures: Several[Picture] | None = None
    """Some of them by name; all, unless some are named."""


class Report(Record):
    """`kvprof report`: all that was measured on one page, the first plan on it."""


class Recipe(Record):
    """A recipe's tables, in the order in which they are carried out but that measurements may be left out."""

    description: Annotated[Text, Field(max_length=200)] = ""
    """One line, for `kvprof run --list`."""
    model: Word = "demo"
    """A hub id, a folder, a .gguf file, or `demo`."""
    out: Word | None = None
    """Folder for the results, within the recipe's own or the one that the command runs in; by default outputs/<model>
    in the latter."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    device: Word | None = None
    stream: Flag | None = None
    text: Reading = Reading()
    norms: Norms | None = None
    spectra: Spectra | None = None
    gradients: Gradients | None = None
    divergence: Divergence | None = None
    calibrate: Calibrate | None = None
    frontier: Frontier | None = None
    plans: Several[Plans] = ()
    rivals: Several[Plans] = ()
    evaluate: Evaluate | None = None
    audit: Audit | None = None
    benchmark: Benchmark | None = None
    targets: Several[Target] = ()
    plot: Plot | None = None
    report: Report | None = None

    @model_validator(mode="before")
    @classmethod
    def _lists_have_an_end(cls, tables: Any) -> Any:
        for name, table in tables.items() if isinstance(tables, dict) else ():
            for key, value in table.items() if isinstance(table, dict) else ():
                if isinstance(value, list) and len(value) > LONGEST_LIST:
                    raise ValueError(f"{name}.{key}: a list of {len(value)} is too long; at most {LONGEST_LIST}")
        return tables

    @model_validator(mode="after")
    def _each_table_has_what_it_reads(self) -> Self:
        for name in ("evaluate", "benchmark"):
            if getattr(self, name) is not None and not self.plans:
                raise ValueError(f"[{name}] has no plan to look at: add a table [[plans]], say with budgets = [2.5]")
        if self.rivals and self.evaluate is None:
            raise ValueError("nobody measures [[rivals]]: add a table [evaluate], or leave them out")
        if self.evaluate is not None:
            length, first = self.evaluate.sequence_length, self.evaluate.measure_from or 0
            if length is not None and first > length - 2:
                raise ValueError(f"evaluate.measure_from: {first} is behind the last target of {length} tokens")
            if self.evaluate.check and self.evaluate.rivals is False and len(self.plans) + len(self.rivals) < 2:
                raise ValueError("[evaluate] check has nothing to compare with: leave out rivals = false")
        if self.audit is not None and self.divergence is None:
            raise ValueError("[audit] has nothing measured to look at: add a table [divergence]")
        if not self.model_fields_set - {"description", "model", "out", "dtype", "device", "stream", "text"}:
            raise ValueError("the recipe asks for nothing: add a table such as [norms], [gradients] or [[plans]]")
        return self


def read_recipe(path: Path) -> Recipe:
    """Read and validate a recipe.

    Raises InvalidFile, in one message, when the file cannot be read, is not TOML, is too large or nested too deeply, or
    holds an unknown key or a wrong value.
    """
    try:
        raw = read_at_most(path, LARGEST_RECIPE_BYTES)
        if raw is None:
            raise InvalidFile(f"{path}: no recipe has more than {LARGEST_RECIPE_BYTES} bytes.")
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
        if _LONG_KEY.search(text):  # the parser takes a time that grows with the square of their number
            raise InvalidFile(f"{path}: a key of so many parts is no recipe's.")
        value: dict[str, Any] = tomllib.loads(text)
    except FileNotFoundError:
        raise InvalidFile(f"{path}: no such file.") from None
    except OSError as error:
        raise InvalidFile(f"{path}: cannot be read: {error.strerror}.") from None
    except RecursionError:
        raise InvalidFile(f"{path}: nested too deeply to be a recipe.") from None
    except ValueError as error:  # not UTF-8, not TOML, or an integer of thousands of digits
        raise InvalidFile(f"{path}: not valid TOML: {error}.") from None
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise InvalidFile(explain_invalid(error, str(path), Recipe)) from None
