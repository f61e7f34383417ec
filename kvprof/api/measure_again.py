"""Scores measured a second time, as their file says that they were, and how far apart the two are.

Reads a model and the text that scores name; writes nothing. Does not know plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvprof.calibration.again import read_again, recognise
from kvprof.calibration.self_generated import fill
from kvprof.errors import InvalidFile, KvprofError, Mismatch
from kvprof.models.config import load_config
from kvprof.models.decoder import text_config
from kvprof.models.identity import fingerprint_of
from kvprof.models.inventory import take_inventory
from kvprof.models.load import load_model, load_tokenizer
from kvprof.models.source import ModelSource
from kvprof.profile.decoder import Decoder, Formats, formats_of
from kvprof.profile.norms import measure_norms
from kvprof.profile.scoring import measure_sensitivity
from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.geometry import CacheGeometry
from kvprof.records.scores import Scores, TensorScores

NUMBERS = ("spectral_norm", "frobenius_norm", "gradient_norm")


def measure_again(scores: Scores, source: ModelSource, progress: Callable[[int, int], None]) -> Scores:
    """Measure norms, or gradients and losses, with the settings of a file.

    Text that the model wrote is found in the cache, or written again. progress: called with (sequences done, in all).
    Raises InvalidFile where the file does not say how it was measured,
    Mismatch for another model, and as the measurements do.
    """
    if scores.source == "norms":
        return measure_norms(source, progress)[0]
    if scores.source != "gradients" or scores.calibration is None:
        raise InvalidFile(f"scores by {scores.source or 'hand'} are not measured again here; give their own command")
    config = load_config(source)
    inventory = take_inventory(config, source.id)
    geometry = inventory.geometry
    tokenizer = load_tokenizer(source)
    try:
        readings = read_again(scores.calibration, tokenizer)
    except KvprofError as error:
        raise InvalidFile(str(error)) from None
    for reading in readings:
        reading.check_vocabulary(text_config(config).vocab_size)
    dtype = "auto" if scores.made_with is None or scores.made_with.dtype is None else scores.made_with.dtype
    model = load_model(source, dtype)
    fingerprint = fingerprint_of(model, geometry, source)
    if scores.model is not None and scores.model.fingerprint not in (None, fingerprint):
        raise Mismatch("the model is not the one that the scores were measured on.")
    text, _ = recognise(scores.calibration, readings, lambda reading: fill(reading, model, tokenizer, fingerprint))
    formats, decoder = _formats(scores, geometry)
    done: list[int] = []

    def finished(results: object) -> None:
        done.append(1)
        progress(len(done), len(text.sequences))

    progress(0, len(text.sequences))
    return measure_sensitivity(model, text, inventory, formats, decoder, finished=finished)


def largest_difference(before: Scores, after: Scores) -> tuple[float, str]:
    """Return the largest difference of a number from the same one measured again, and whose it is.

    A norm's is relative to the norm; a loss's to the tensor's largest loss, since small ones are sums that cancel.
    Infinite where one file has a number that the other lacks.
    """
    worst = (0.0, "")
    for entry in before.layers:
        again = after.entry(entry.layer)
        for name in TENSORS:
            other = TensorScores() if again is None else again.tensor(name)
            for what, difference in _differences(entry.tensor(name), other):
                if difference > worst[0]:
                    worst = (difference, f"{what} of the {name} of layer {entry.layer}")
    return worst


def _differences(before: TensorScores, after: TensorScores) -> Iterator[tuple[str, float]]:
    for name in NUMBERS:
        one, other = getattr(before, name), getattr(after, name)
        if one is not None:
            yield name, _relative(one, other, max(one, other or 0.0))
    losses, others = before.loss_increase or {}, after.loss_increase or {}
    most = max([*losses.values(), *others.values()], default=0.0)
    for form, loss in losses.items():
        yield f"loss_increase as {form}", _relative(loss, others.get(form), most)


def _relative(one: float, other: float | None, scale: float) -> float:
    if other is None:
        return float("inf")
    return abs(one - other) / scale if scale else 0.0


def _formats(scores: Scores, geometry: CacheGeometry) -> tuple[Formats, Decoder]:
    """Return the formats that scores have losses for, and the decoder that these are of."""
    if scores.decoding is None:
        return {}, Decoder(formats={})
    named: dict[TensorName, tuple[str, ...]] = {
        name: tuple(dict.fromkeys(form for entry in scores.layers for form in entry.tensor(name).loss_increase or ()))
        for name in TENSORS
    }
    decoder = Decoder(named, scores.decoding.window, scores.decoding.suffix_fraction, passes_over=True)
    scored = {
        (entry.layer, name): set(entry.tensor(name).loss_increase or ()) for entry in scores.layers for name in TENSORS
    }
    found = {
        key: tuple(form for form in forms if form.name in scored.get(key, ()))
        for key, forms in formats_of(geometry, decoder).items()
    }
    return {key: forms for key, forms in found.items() if forms}, decoder
