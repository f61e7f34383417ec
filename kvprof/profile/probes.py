"""Which tensors are measured one at a time, in which formats: a sample, chosen in words.

Reads what a user wrote and the model's shapes; returns probes. Does not measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvprof.errors import UsageError, did_you_mean
from kvprof.profile.decoder import MORE_TOKENS, reads_codes
from kvprof.records.formats import TENSOR_WORDS, TENSORS, Format, TensorName, parse_formats, tensor_named
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import Window, format_of
from kvprof.records.words import read_layers

USUAL_FORMATS = "int2g64"


class Probe(NamedTuple):
    """One number to measure: this tensor in this format, all else in full precision."""

    layer: int
    tensor: TensorName
    form: Format

    def key(self, sequence: int) -> str:
        """Name the piece of the journal that holds it for a sequence."""
        return f"{sequence} {self.layer} {self.tensor} {self.form.name}"


def choose_probes(geometry: CacheGeometry, layers: str | None, tensors: str, formats: str) -> list[Probe]:
    """Return what to measure, layer by layer, keys before values, each format once.

    layers: `0-3,7`, or None for all that a plan covers. tensors: `key`, `value` or both. formats: `int2g64,value:rot2`.
    A group of channels is capped at the head dimension, as plans have it.
    Raises UsageError for a layer that does not exist or that no plan covers, a format that its heads cannot have, and
    where nothing is left.
    """
    names = [_tensor_named(word.strip()) for word in tensors.split(",")]
    listed = parse_formats(formats)
    for name in names:
        if not listed[name]:
            raise UsageError(f"--formats {formats} names none for the {name}s.\n  Add {name}:{USUAL_FORMATS}.")
    chosen = {}
    for layer in _chosen_layers(geometry, layers):
        for tensor in (tensor for tensor in TENSORS if tensor in names):
            for word in listed[tensor]:
                form = format_of(geometry.layers[layer], tensor, word)
                chosen[layer, tensor, form.name] = Probe(layer, tensor, form)
    return list(chosen.values())


def _tensor_named(word: str) -> TensorName:
    found = tensor_named(word)
    if found is None:
        raise UsageError(f"--tensors: no tensor is called {word!r}: {did_you_mean(word, TENSOR_WORDS)}")
    return found


def _chosen_layers(geometry: CacheGeometry, text: str | None) -> list[int]:
    """Return the layers that a text such as "0-3,7" names, ascending; all that plans cover where there is none."""
    planned = [shape.layer for shape in geometry.planned]
    if not planned:
        raise UsageError(
            "every layer of this model is skipped, so there is nothing that a plan could quantize.\n"
            f"  {geometry.reasons}"
        )
    if text is None:
        return planned
    chosen = set()
    for run in read_layers(text, "--layers"):
        if run[-1] >= geometry.num_layers:
            raise UsageError(f"--layers {text!r}: there is no layer {run[-1]}; the last is {geometry.num_layers - 1}.")
        for layer in run:
            if layer not in planned:
                raise UsageError(
                    f"--layers {text!r}: no plan gives bits to layer {layer}: {geometry.layers[layer].skipped}.\n"
                    "  Leave it out."
                )
            chosen.add(layer)
    return sorted(chosen)


def check_something_is_read(probes: Sequence[Probe], window: Window, longest: int) -> None:
    """Raise UsageError where no query of the longest sequence would read anything in one of the formats."""
    for probe in probes:
        if not probe.form.is_full and not reads_codes(probe.form, window, longest):
            group = probe.form.group_size if probe.form.axis == "channel" else 1
            needed = window.sink_tokens + window.recent_tokens + group + 1
            raise UsageError(
                f"in {longest} tokens, no query reads a {probe.tensor} in {probe.form.name}: the sinks and the window "
                f"hold all but whole groups, so {needed} tokens are the least.\n  {MORE_TOKENS}"
            )
