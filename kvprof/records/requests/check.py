"""What the commands that run a plan are asked for: evaluate, calibrate, benchmark, generate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo

from kvprof.records.document import Integer, Number, Positive
from kvprof.records.requests.measure import (
    DATA,
    LENGTH,
    SPLITS,
    Device,
    DeviceWord,
    Dtype,
    DtypeWord,
    Length,
    Measuring,
    Reading,
)
from kvprof.records.requests.option import BASELINES, DEVICE, MEASUREMENT, TEXT, Option
from kvprof.records.requests.request import Flag, MemoryWord, Request, Seed, Several, Word, as_option

LARGEST_NUMBER = 2**31
OneDevice = Annotated[DeviceWord, Option("cpu, cuda:1, or auto: the GPU, else the CPU.", DEVICE)]


class Evaluate(Reading):
    """What a recipe can ask `kvprof evaluate` for."""

    data: Annotated[Several[Word] | None, Option(DATA, default="builtin")] = None
    sequences: Annotated[Positive, Option("Sequences of text; time is proportional, and the error shrinks.")] = 12
    split: Annotated[Word | None, Option(SPLITS, TEXT, default="held-out; all of a file; train of a dataset")] = None
    sequence_length: Annotated[Length | None, Option(LENGTH, TEXT, default="512, or the model's limit")] = None
    rivals: Annotated[Flag, Option("Compare with published baselines that store no more bits.", BASELINES)] = True
    check: Annotated[
        Flag, Option("Exit with 5 unless the plan's mean KL is the lowest of all that store no more bits.", BASELINES)
    ] = False
    measure_from: Annotated[
        Integer,
        Field(ge=0),
        Option("First position that is measured; earlier ones are only read.", MEASUREMENT, shows_range=True),
    ] = 0
    exact: Annotated[
        Flag, Option("Decode token by token with the packed cache: the same numbers, far slower.", MEASUREMENT)
    ] = False


class EvaluateRequest(Evaluate, Measuring):
    """`kvprof evaluate`."""


class Calibrate(Request):
    """What a recipe can ask `kvprof calibrate` for."""

    sequences: Annotated[Positive, Option("Sequences to measure on, out of those that were scored.")] = 4


class CalibrateRequest(Calibrate):
    """`kvprof calibrate`."""

    dtype: Dtype = "auto"
    device: Device = "auto"


class GenerateRequest(Request):
    """`kvprof generate`."""

    max_new_tokens: Annotated[Positive, Option("Largest number of tokens to generate.")] = 64
    temperature: Annotated[Number, Option("Sampling temperature; 0 takes the most likely token.")] = 0.0
    chat: Annotated[Flag, Option("Put the prompt into the model's chat template.")] = False
    seed: Annotated[Seed, Option("Seed of the sampling, the same for both texts.", MEASUREMENT)] = 0
    dtype: Dtype = "auto"
    device: OneDevice = "auto"


def whole_numbers(value: object, info: ValidationInfo) -> list[int]:
    """Return whole numbers, each once, given by themselves or between commas: ["64,128", 256]; raises ValueError."""
    numbers = []
    for part in value if isinstance(value, list | tuple) else [value]:
        for word in str(part).split(","):
            if not word.strip().isdecimal() or not 1 <= int(word) <= LARGEST_NUMBER:
                option = f"{as_option(str(info.field_name))} {word.strip() or 'with nothing'}"
                raise ValueError(f"{option}: write whole numbers of at least 1: 1024,4096.")
            numbers.append(int(word))
    return list(dict.fromkeys(numbers))


Numbers = Annotated[tuple[int, ...], BeforeValidator(whole_numbers), Field(min_length=1)]


class RandomWeights(Request):
    """A model of which only the shape is known."""

    shape: Annotated[
        Word | None,
        Option("Instead of MODEL: random weights of a published shape, such as llama-2-7b, llama-3-8b, qwen3-8b."),
    ] = None
    layers: Annotated[Positive | None, Option("Keep only the first layers of --shape.", DEVICE, default="all")] = None


class Benchmark(Request):
    """What a recipe can ask `kvprof benchmark` for."""

    context: Annotated[
        Numbers | None,
        Option(
            "Tokens in the cache, such as 4096,32768. Can be repeated.",
            default="4096,32768,131072 on a GPU; else 1024,4096; no more than the model's limit",
            commas=True,
        ),
    ] = None
    batch: Annotated[
        Numbers | None,
        Option("Sequences in a batch, such as 1,8. Can be repeated.", default="1,8 on a GPU; else 1", commas=True),
    ] = None
    memory: Annotated[
        MemoryWord | None,
        Option(
            "Bytes for weights and cache, such as 24GiB: find and time the largest batch of the longest context that "
            "fits.",
            default="all of the GPU's; on a CPU none, and no batch is sought",
        ),
    ] = None
    repeats: Annotated[Positive, Option("Number of timings of attention.", MEASUREMENT)] = 30
    tokens: Annotated[Positive, Option("Number of decoding steps of the whole model to time.", MEASUREMENT)] = 16
    attention_only: Annotated[Flag, Option("Time attention alone; no weights are needed.", MEASUREMENT)] = False
    kernels: Annotated[
        Literal["auto", "triton", "torch"],
        Option("`triton` reads codes in place, on a GPU; `torch` dequantizes them first; `auto` chooses.", MEASUREMENT),
    ] = "auto"
    seed: Annotated[Seed, Option("Seed of random keys, values and weights.", MEASUREMENT)] = 0

    @property
    def steps(self) -> int | None:
        """Decoding steps of the whole model to time; None to leave it out."""
        return None if self.attention_only else self.tokens


class BenchmarkRequest(Benchmark, RandomWeights):
    """`kvprof benchmark`."""

    dtype: Annotated[
        DtypeWord,
        Option(
            "float32, bfloat16, float16, or auto: the checkpoint's; for --shape bfloat16 on a GPU, else float32.",
            DEVICE,
        ),
    ] = "auto"
    device: OneDevice = "auto"
