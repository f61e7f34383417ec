"""What `allocate` and `frontier` are asked for. A plan keeps its request, so that it can be made again."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from typing_extensions import Self

from kvprof.records.document import Integer, Number, Positive, Text
from kvprof.records.formats import known_bits
from kvprof.records.requests.option import BASELINES, BUDGET, DEVICE, FORMATS, WINDOW, Option
from kvprof.records.requests.request import (
    RECENT_TOKENS,
    SINK_TOKENS,
    Flag,
    Formats,
    PathText,
    Request,
    SlidingLayers,
    WindowTokens,
    Word,
    as_option,
    one_or_several,
    refusing,
)

NARROWING = ("pin", "min_key_bits", "formats", "bits", "group_size", "tie")
"""What leaves a plan less to choose from than was scored."""

Rule = Literal["exact", "norm-greedy", "kvmix", "uniform"]
RULES: tuple[Rule, ...] = get_args(Rule)
UNIT = "What {} counts: `stored` bits (codes and scales) or `nominal` bits (codes alone)."
WINDOW_DEFAULT = "as the scores were measured; else {}"


def _widths(value: object) -> object:
    """Read widths that are given by themselves or between commas: ["2,3", 4]."""
    several = value if isinstance(value, list | tuple) else [value]
    return known_bits(word.strip() for part in several for word in str(part).split(","))


def _bytes(value: object) -> object:
    """Read a whole number as so many bytes."""
    return f"{value}B" if isinstance(value, int) and not isinstance(value, bool) else value


BitUnit = Literal["stored", "nominal"]
GroupSize = Annotated[Integer, Field(ge=1, le=2**31)]
Pins = Annotated[tuple[Text, ...], BeforeValidator(one_or_several)]
MinKeyBits = Annotated[
    Annotated[Integer, Field(ge=1, le=16)] | None,
    Option("Least code width of a key.", FORMATS, default="none", shows_range=True),
]
ScoresFile = Annotated[
    PathText | None, Option("Scores file.", default="the newest in outputs/ that has the metric", is_path=True)
]


class Choice(Request):
    """What a plan may choose from. Null restricts nothing."""

    bits: Annotated[
        Annotated[tuple[Integer, ...], BeforeValidator(refusing(_widths))] | None,
        Option(
            "Code widths to choose from, such as 2,3,4,8; of 1,2,3,4,5,6,8,16.",
            FORMATS,
            default="all scored; for a norm 1,2,3,4,6,8",
            commas=True,
        ),
    ] = None
    formats: Annotated[
        Formats | None,
        Option(
            "Scored formats to choose from: int3g64,rot2 or key:int2g64c,value:rot2; `full` is 16 bits.",
            FORMATS,
            default="all scored",
        ),
    ] = None
    group_size: Annotated[
        GroupSize | None,
        Option(
            "Elements that share a scale: tokens for keys, channels for values. Rotated formats have no groups.",
            FORMATS,
            default="all scored; for a norm 32",
        ),
    ] = None
    pin: Annotated[
        Pins | None,
        Option("Fix the bits or format of a tensor: key:0=8, value:3-5=rot2, key:*=int4g64. Can be repeated.", FORMATS),
    ] = None

    @property
    def narrowing(self) -> tuple[str, ...]:
        """The options given, as a command line has them, that leave less to choose from than was scored."""
        return tuple(as_option(name) for name in NARROWING if getattr(self, name, None))


class WindowedChoice(Choice):
    """What a plan of kvprof's own cache may choose from, and its window."""

    tie: Annotated[
        Literal["key-value"] | None,
        Option("`key-value`: codes of equal width for the keys and values of a layer.", FORMATS, default="none"),
    ] = None
    min_key_bits: MinKeyBits = None
    layers: SlidingLayers = None
    recent_tokens: Annotated[WindowTokens | None, Option(RECENT_TOKENS, WINDOW, default=WINDOW_DEFAULT.format(128))] = (
        None
    )
    sink_tokens: Annotated[WindowTokens | None, Option(SINK_TOKENS, WINDOW, default=WINDOW_DEFAULT.format(4))] = None


class Limits(Request):
    """What a plan may cost, besides bits an element."""

    unit: Annotated[BitUnit | None, Option(UNIT.format("--budget"), BUDGET, default="stored; for a norm nominal")] = (
        None
    )
    memory: Annotated[
        Annotated[Text, BeforeValidator(_bytes)] | None,
        Option("Instead of --budget: bytes of the cache, window included, such as 1.5GiB. Needs --context.", BUDGET),
    ] = None
    context: Annotated[
        Integer | None, Option("Tokens per sequence at which --memory and --max-kl count bytes.", BUDGET)
    ] = None
    batch: Annotated[Integer | None, Option("Sequences at which they count bytes.", BUDGET, default="1")] = None


class Budget(Request):
    """Bits an element on average; a text as it was typed, so that none of its digits is lost."""

    budget: Annotated[Text | Number | None, Option("Average bits per element of the cache, such as 2.5.")] = None


class Rules(Request):
    """By which rule a plan is made, and for which loss."""

    max_kl: Annotated[
        Text | Number | None,
        Option(
            "Instead of a budget: the cheapest plan with at most this predicted KL, in nats per token, such as 0.01. "
            "Cheapest in stored bits; with --context in bytes."
        ),
    ] = None
    metric: Annotated[
        Word | None,
        Option(
            "Score to minimize: loss_increase, gradient_norm, spectral_norm or frobenius_norm.",
            FORMATS,
            default="the first of these that the scores have",
            words="metrics",
        ),
    ] = None
    rule: Annotated[
        Rule,
        Option("`exact` (the optimal plan), or a published baseline: `norm-greedy`, `kvmix`, `uniform`.", BASELINES),
    ] = "exact"
    as_published: Annotated[
        Flag,
        Option(
            "norm-greedy, kvmix: exactly as in their papers: no sinks; KVmix's 3-bit keys in groups of 11.", BASELINES
        ),
    ] = False
    top_fraction: Annotated[
        Text | Number | None, Option("kvmix: share of the layers that get more bits.", BASELINES, default="0.2")
    ] = None
    bits_key: Annotated[Integer | None, Option("uniform: bits of every key.", BASELINES)] = None
    bits_value: Annotated[Integer | None, Option("uniform: bits of every value.", BASELINES)] = None


class Plan(WindowedChoice, Rules, Limits):
    """What a recipe can ask `kvprof allocate` for, besides budgets."""

    @model_validator(mode="after")
    def _without_sinks_as_published(self) -> Self:
        if self.as_published and self.sink_tokens:
            raise ValueError(
                f"--as-published has no sinks, --sink-tokens asks for {self.sink_tokens}; leave out one of them."
            )
        return self


class AllocateRequest(Plan, Budget):
    """`kvprof allocate`."""

    target: Annotated[
        Word | None,
        Option(
            "Plan for another runtime, in its own formats and within its constraints; `kvprof targets` lists them.",
            default="kvprof's own cache",
            words="targets",
            also="--to",
        ),
    ] = None
    device: Annotated[
        Literal["cuda", "metal", "cpu"] | None,
        Option("With --target llama.cpp: only types that this device has flash attention for.", DEVICE, default="any"),
    ] = None
    scores: ScoresFile = None

    @model_serializer(mode="wrap")
    def _as_said(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if name in self.said()}


class Frontier(WindowedChoice):
    """What a recipe can ask `kvprof frontier` for."""

    low: Annotated[
        Text | Number | None, Option("Smallest budget, in bits per element.", default="the cheapest plan's")
    ] = Field(None, alias="from")
    high: Annotated[Text | Number | None, Option("Largest budget.", default="the most expensive plan's")] = Field(
        None, alias="to"
    )
    points: Annotated[
        Annotated[Integer, Field(ge=2, le=1000)] | None,
        Option("Number of budgets, evenly spaced.", default="round ones, at most about 200", shows_range=True),
    ] = None
    unit: Annotated[BitUnit, Option(UNIT.format("a budget"), BUDGET)] = "stored"
    context: Annotated[
        Positive | None,
        Option("Tokens per sequence at which to count each plan's bytes as well.", BUDGET, shows_range=True),
    ] = None
    batch: Annotated[
        Positive | None, Option("Sequences at which to count them.", BUDGET, default="1", shows_range=True)
    ] = None


class FrontierRequest(Frontier):
    """`kvprof frontier`."""

    scores: ScoresFile = None


class ImportRequest(Request):
    """`kvprof import`: what the other tool's file does not say. The defaults are those of KVTuner's KIVI presets."""

    group_size: Annotated[
        GroupSize, Option("Elements that share a scale: tokens for keys, channels for values.", FORMATS)
    ] = 32
    recent_tokens: Annotated[WindowTokens, Option(RECENT_TOKENS, WINDOW)] = 32
    sink_tokens: Annotated[WindowTokens, Option(SINK_TOKENS, WINDOW)] = 0
