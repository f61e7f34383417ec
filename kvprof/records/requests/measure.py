"""What the commands that read text are asked for: which text, which model, what to measure on it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from typing_extensions import Self

from kvprof.errors import did_you_mean
from kvprof.records.document import Number, Positive, Text
from kvprof.records.formats import TENSOR_WORDS, TENSORS, tensor_named
from kvprof.records.requests.option import DEVICE, FORMATS, MEASUREMENT, TEXT, WINDOW, Option
from kvprof.records.requests.request import (
    RECENT_TOKENS,
    SINK_TOKENS,
    Flag,
    Formats,
    ListedLayers,
    Request,
    Seed,
    Several,
    SlidingLayers,
    WindowTokens,
    Word,
)

USUAL_SEQUENCES = 8
SEQUENCES_UNTIL_STABLE = 32
"""The most, where a run stops as soon as its plans are stable."""

DATA = (
    "Text: `builtin`, `self` (written by the model), a file (.txt, .jsonl, .parquet, .csv, ..., .gz), a folder or "
    "pattern of files, or a hub dataset. NAME:2 takes twice as much of it. Can be repeated."
)
SPLITS = "`calibration` or `held-out` (3 in 4 rows and 1 in 4, by hash), `all`, or a split of the hub dataset."
SEQUENCES = "Calibration sequences; time is proportional."
LENGTH = "Largest length of a sequence, in tokens."


def torch_word(given: object) -> str:
    """Return what a dtype or a device is called, of torch's own too."""
    return str(given).removeprefix("torch.")


def known_tensors(tensors: str) -> str:
    """Return `key`, `value` or both as they are written; raises ValueError for another word."""
    for word in (part.strip() for part in tensors.split(",")):
        if tensor_named(word) is None:
            raise ValueError(f"--tensors: no tensor is called {word!r}: {did_you_mean(word, TENSOR_WORDS)}")
    return tensors


Length = Annotated[Positive, Field(ge=2)]
Tensors = Annotated[Word, AfterValidator(known_tensors)]
DtypeWord = Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(torch_word)]
DeviceWord = Annotated[Word, BeforeValidator(torch_word)]
Dtype = Annotated[DtypeWord, Option("auto (the checkpoint's), float32, bfloat16 or float16.", DEVICE)]
Device = Annotated[
    DeviceWord, Option("cpu, cuda:1, or auto: the GPU, all GPUs if one is too small, or the CPU.", DEVICE)
]
BatchSize = Annotated[Positive, Option("Sequences per forward; changes speed and memory, no score.", MEASUREMENT)]
SuffixFraction = Annotated[
    Number,
    Field(ge=0.01, le=1),
    Option("Share of each sequence, at its end, whose predictions are measured.", MEASUREMENT, shows_range=True),
]


class Reading(Request):
    """Which text is read, and how much of it. Null is what depends: on the command, the text or the model."""

    data: Annotated[Several[Word] | None, Option(DATA, default="builtin and self")] = None
    sequences: Annotated[Positive | None, Option(SEQUENCES)] = None
    split: Annotated[Word | None, Option(SPLITS, TEXT, default="calibration; all of a file; train of a dataset")] = None
    column: Annotated[
        Word | None,
        Option(
            "Column to read, of text or of messages; or a template such as '{question}\\n{answer}'.",
            TEXT,
            default="found by name",
        ),
    ] = None
    config: Annotated[
        Word | None,
        Option("Configuration of the hub dataset; org/name/CONFIG names it too.", TEXT, default="the only one"),
    ] = None
    sequence_length: Annotated[Length | None, Option(LENGTH, TEXT, default="1024, or the model's limit")] = None
    seed: Annotated[Seed, Option("Seed of the choice and order of the rows.", TEXT)] = 0
    pack: Annotated[Flag, Option("Join rows and cut sequences of the full length.", TEXT)] = False

    @property
    def most_sequences(self) -> int:
        """How many sequences are read at most."""
        return self.sequences or USUAL_SEQUENCES


class Loading(Request):
    """How a model is loaded."""

    dtype: Dtype = "auto"
    device: Device = "auto"
    stream: Annotated[
        Flag, Option("Load one block at a time from the checkpoint, for models larger than the memory.", DEVICE)
    ] = False


class Measuring(Reading, Loading):
    """What every measurement on calibration text has in common."""


class Spectra(Reading):
    """What a recipe can ask `kvprof spectra` for."""

    sequences: Annotated[Positive, Option(SEQUENCES)] = USUAL_SEQUENCES


class SpectraRequest(Spectra, Measuring):
    """`kvprof spectra`."""


class Gradients(Reading):
    """What a recipe can ask `kvprof gradients` for."""

    sequences: Annotated[Positive | None, Option(SEQUENCES, default="8; 32 with --until-stable")] = None
    formats: Annotated[
        Formats | None,
        Option(
            "Formats whose loss to predict: int3g64,rot2 or key:int2g64c,value:rot2; or `none`.",
            FORMATS,
            default="15 for keys, 10 for values",
        ),
    ] = None
    layers: SlidingLayers = None
    recent_tokens: Annotated[WindowTokens | None, Option(RECENT_TOKENS, WINDOW, default="128, or the target's")] = None
    sink_tokens: Annotated[WindowTokens | None, Option(SINK_TOKENS, WINDOW, default="4, or the target's")] = None
    suffix_fraction: SuffixFraction = 0.5
    until_stable: Annotated[
        Flag, Option("Stop before --sequences once more sequences would change no plan.", MEASUREMENT)
    ] = False
    stable_at: Annotated[
        Several[Text | Number] | None,
        Option(
            "Budget, in stored bits, of a plan that --until-stable watches. Can be repeated.",
            MEASUREMENT,
            default="2.5, 3, 3.5",
        ),
    ] = None

    @property
    def most_sequences(self) -> int:
        """How many sequences are read at most."""
        return self.sequences or (SEQUENCES_UNTIL_STABLE if self.until_stable else USUAL_SEQUENCES)


class GradientsRequest(Gradients, Measuring):
    """`kvprof gradients`."""

    target: Annotated[
        Word | None,
        Option(
            "Predict the losses of another runtime's formats; `kvprof targets` lists the runtimes.",
            default="kvprof's own cache",
            words="targets",
        ),
    ] = None
    shard: Annotated[
        Word | None,
        Option("Measure one part of the sequences, such as 2/8; `kvprof merge` adds the parts up.", MEASUREMENT),
    ] = None
    batch_size: BatchSize = 1

    @model_validator(mode="after")
    def _stable_where_it_stops(self) -> Self:
        if self.stable_at is not None and not self.until_stable:
            raise ValueError(
                "--stable-at says what --until-stable looks at, which is not there.\n  Add --until-stable."
            )
        return self


class Probes(Request):
    """Which tensors are measured one at a time, and in which formats."""

    formats: Annotated[
        Formats,
        Option("Formats to measure: int2g64 or key:int3g64c,value:rot2; time is proportional."),
    ] = "int2g64"
    layers: Annotated[
        ListedLayers | None, Option("Layers to measure, such as 0-3,7.", default="all that a plan covers")
    ] = None
    tensors: Annotated[Tensors, Option("Tensors to measure: `key`, `value` or both.", MEASUREMENT)] = ",".join(TENSORS)


class Divergence(Reading, Probes):
    """What a recipe can ask `kvprof divergence` for."""

    sequences: Annotated[Positive, Option(SEQUENCES, TEXT)] = 2
    recent_tokens: Annotated[WindowTokens, Option(RECENT_TOKENS, WINDOW)] = 128
    sink_tokens: Annotated[WindowTokens, Option(SINK_TOKENS, WINDOW)] = 4
    suffix_fraction: SuffixFraction = 0.5


class DivergenceRequest(Divergence, Measuring):
    """`kvprof divergence`."""
