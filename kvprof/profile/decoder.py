"""Of which decoder are losses predicted? The formats to try, what it keeps in full precision, which queries count.

Reads options and a geometry; does not know models, nor how a loss is predicted or measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvprof.calibration.sequences import CalibrationSet
from kvprof.errors import UsageError
from kvprof.records.formats import TENSOR_WORDS, TENSORS, Format, TensorName, parse_formats
from kvprof.records.geometry import CacheGeometry, KVLayer
from kvprof.records.inventory import Inventory
from kvprof.records.plan import (
    USUAL_WINDOW,
    Quantizer,
    Window,
    covered_geometry,
    format_of,
    head_dim_of,
    stored_like,
    tensor_word,
    tokens_read_as_codes,
)
from kvprof.records.requests.request import LayerChoice
from kvprof.records.scores import DecodingSetup, suffix_start

Formats = Mapping[tuple[int, TensorName], Sequence[Format]]
"""The formats to try of each layer's keys and values."""


USUAL_FORMATS: dict[TensorName, tuple[str, ...]] = {
    "key": (
        *("int2g64c", "int2g64", "int3g64", "int4g64", "int6g64", "int8g64"),
        *("int2g128c", "int2g128", "int3g128", "int4g128", "int6g128", "int8g128"),
        *("rot2", "rot3", "rot4"),
    ),
    "value": (
        *("rot1", "rot2", "rot3", "rot4"),
        *("int2g64", "int3g64", "int4g64", "int5g64", "int6g64", "int8g64"),
    ),
}
"""What is tried where no formats are named: what the best plans of the models seen so far are made of."""


MORE_TOKENS = "Raise --sequence-length, join rows with --pack, or lower --recent-tokens."
"""What to do where a text stays within the window."""


@dataclass(frozen=True)
class Decoder:
    """Of what decoder the losses are predicted.

    formats: names by tensor; None: those of `usual_formats`; none at all: no losses are predicted. passes_over: whether
    a format that heads cannot have is left out of these, instead of refused.
    suffix_fraction: the share of each sequence, at its end, whose loss counts. layers: whether layers that slide are
    asked too. check: raises for a model that the decoder cannot serve. formats_for: which `formats` a model has, of its
    geometry and architecture; None where they are the same for all.
    """

    formats: Mapping[TensorName, Sequence[str]] | None = None
    window: Window = USUAL_WINDOW
    suffix_fraction: float = 0.5
    quantizer: Quantizer = field(default_factory=Quantizer)
    passes_over: bool = False
    layers: LayerChoice = "all"
    check: Callable[[CacheGeometry], None] = lambda geometry: None
    formats_for: Callable[[CacheGeometry, str | None], Mapping[TensorName, Sequence[str]] | None] | None = None

    def for_model(self, inventory: Inventory) -> Decoder:
        """Return the decoder with the formats of one model."""
        if self.formats_for is None:
            return self
        return replace(self, formats=self.formats_for(inventory.geometry, inventory.model.architecture))

    def covers(self, geometry: CacheGeometry) -> CacheGeometry:
        """Return the geometry of plans for this decoder: what its window holds of sliding layers is left alone."""
        return covered_geometry(geometry, self.layers, self.window)

    def counted(self, text: CalibrationSet) -> list[int]:
        """Return how many positions of each sequence count."""
        return [len(ids) - suffix_start(len(ids), self.suffix_fraction) for ids in text.sequences]


USUAL_DECODER = Decoder()


def read_formats(text: str | None) -> dict[TensorName, tuple[str, ...]] | None:
    """Read the option: format names by tensor, `none` for no formats at all; None where nothing is said."""
    if text is None:
        return None
    return {"key": (), "value": ()} if text.strip() == "none" else parse_formats(text)


def formats_of(geometry: CacheGeometry, decoder: Decoder) -> Formats:
    """Return the formats to try of each tensor that a plan gives bits to; raise UsageError for one it cannot have."""
    found: dict[tuple[int, TensorName], tuple[Format, ...]] = {}
    for layer in geometry.planned:
        for tensor in TENSORS:
            if decoder.formats is None:
                found[layer.layer, tensor] = usual_formats(layer, tensor)
            elif names := decoder.formats[tensor]:
                found[layer.layer, tensor] = _named(names, layer, tensor, decoder.passes_over)
    return found


def _named(names: Sequence[str], layer: KVLayer, tensor: TensorName, passes_over: bool) -> tuple[Format, ...]:
    """Return formats by name, each once."""
    forms: dict[str, Format] = {}
    for name in names:
        try:
            form = format_of(layer, tensor, name)
        except UsageError:
            if not passes_over:
                raise
        else:
            forms.setdefault(form.name, form)
    if not forms:
        channels = head_dim_of(layer, tensor)
        raise UsageError(f"{tensor} heads of {channels} channels can have none of {', '.join(names)}.")
    return tuple(forms.values())


def usual_formats(layer: KVLayer, tensor: TensorName) -> tuple[Format, ...]:
    """Return the formats to try where none are named, those left out that heads of this dimension cannot have."""
    return _named(USUAL_FORMATS[stored_like(layer, tensor)], layer, tensor, passes_over=True)


def readable(formats: Formats, geometry: CacheGeometry, decoder: Decoder, longest: int) -> tuple[Formats, str | None]:
    """Return the formats that a sequence of so many tokens reads at all, and what to say of the others.

    What is never read costs nothing there; to score it 0 would be a lie about longer texts.
    """
    found = {
        key: tuple(form for form in forms if form.is_full or reads_codes(form, decoder.window, longest))
        for key, forms in formats.items()
    }
    found = {key: forms for key, forms in found.items() if forms}
    words = {key: tensor_word(geometry.layers[key[0]], key[1]) for key in formats}
    left = []
    for word in TENSOR_WORDS:
        names = [
            {form.name: form.group_size for key, forms in some.items() if words[key] == word for form in forms}
            for some in (formats, found)
        ]
        if missing := sorted(set(names[0]) - set(names[1]), key=lambda name: (names[0][name], name)):
            left.append(f"{word}s in {', '.join(missing)}")
    if not left:
        return found, None
    window = f"{decoder.window.sink_tokens} + {decoder.window.recent_tokens}"
    return (
        found,
        f"not predicted: {'; '.join(left)}: no group of {longest} tokens leaves the window of {window}. {MORE_TOKENS}",
    )


def within_the_window(forms: Iterable[Format], window: Window, lengths: Sequence[int]) -> str | None:
    """Return what to say of sequences that end before one of the formats quantizes anything, or None."""
    forms = [form for form in forms if not form.is_full]
    short = sum(not all(reads_codes(form, window, length) for form in forms) for length in lengths)
    if not short:
        return None
    return (
        f"{short} of {len(lengths)} sequences end before anything is quantized in some format, and count as 0 there: "
        "try --pack"
    )


def reads_codes(form: Format, window: Window, tokens: int) -> bool:
    """Whether any query of a sequence of so many tokens reads anything in this format."""
    return tokens_read_as_codes(form, window, tokens - 1) > 0


def decoding_of(text: CalibrationSet, window: Window, suffix_fraction: float) -> DecodingSetup:
    """Return what decoder numbers measured on a text speak of, and the tokens that counted."""
    counted = sum(len(ids) - suffix_start(len(ids), suffix_fraction) for ids in text.sequences)
    return DecodingSetup(window=window, suffix_fraction=suffix_fraction, tokens=counted)
