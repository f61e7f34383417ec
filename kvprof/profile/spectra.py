"""How large are the singular values of each layer's cached keys and values, on calibration text? In one resumable run.

Reads a model and calibration text; writes spectra.json, and a journal while it runs, so that a stopped run goes on.
Does not know how a sequence is measured (singular_values.py), nor what the spectra say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvprof import __version__
from kvprof.calibration.self_generated import batches_of, fill
from kvprof.calibration.sequences import CalibrationSet
from kvprof.models.config import load_config
from kvprof.models.costs import Passes, estimate_run
from kvprof.models.identity import fingerprint_of, made_with
from kvprof.models.inventory import take_inventory
from kvprof.models.layouts import check_projects
from kvprof.models.load import load_model
from kvprof.models.source import ModelSource
from kvprof.profile.reading import read_text
from kvprof.profile.singular_values import SingularValues, cached_singular_values
from kvprof.records.estimate import Estimate
from kvprof.records.formats import TENSORS
from kvprof.records.geometry import CacheGeometry
from kvprof.records.inventory import Inventory
from kvprof.records.plan import head_dim_of
from kvprof.records.requests.measure import SpectraRequest
from kvprof.records.spectra import LayerSpectra, Spectra, Spectrum
from kvprof.storage.journal import Journal

BYTES_A_NUMBER = 20
"""Of each singular value of each sequence, in the journal."""


@dataclass(frozen=True)
class SpectraRun:
    """A finished run: its spectra, the file they are in, and what a reader of them should know."""

    spectra: Spectra
    path: Path
    remarks: tuple[str, ...]


def run_spectra(
    source: ModelSource,
    request: SpectraRequest,
    folder: Path,
    restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    writing: Callable[[int, int], None] = lambda done, total: None,
    announce: Callable[[Estimate], None] = lambda estimate: None,
) -> SpectraRun:
    """Load a model, measure its cached keys and values on calibration text and write spectra.json.

    folder: for the result, and for the journal of finished sequences meanwhile. progress: called with (sequences done,
    sequences in all); writing: with (tokens done, tokens in all) of text that the model writes itself first. announce:
    called before a weight is loaded; may raise, to stop.
    Raises KvprofError in its many kinds: the model, the text, a setting or the journal is not fit.
    """
    whole_config = load_config(source)
    inventory = take_inventory(whole_config, source.id)
    geometry = inventory.geometry
    check_projects(geometry)
    mix, tokenizer = read_text(source, whole_config, request)
    numbers = sum(
        layer.kv_heads * min(tokens, head_dim_of(layer, tensor))
        for tokens in mix.lengths
        for layer in geometry.scored
        for tensor in TENSORS
    )
    how = (request.dtype, request.device, request.stream)
    passes = Passes(forwards=1)
    announce(
        estimate_run(
            source,
            whole_config,
            mix.lengths,
            passes,
            *how,
            written_bytes=BYTES_A_NUMBER * numbers,
            written=batches_of(mix),
        ).about(mix.about_text())
    )
    model = load_model(source, *how)
    fingerprint = fingerprint_of(model, geometry, source)
    inventory = inventory.model_copy(update={"model": inventory.model.model_copy(update={"fingerprint": fingerprint})})
    text = fill(mix, model, tokenizer, fingerprint, writing)
    identity = {
        "model": source.id,
        "model fingerprint": fingerprint,
        "dtype": str(model.dtype),
        "kvprof version": __version__,
        **text.identity,
    }
    with Journal(folder / "spectra.journal", identity, restart) as log:
        measured = _read_journal(log, geometry, text)
        resumed = len(measured)
        progress(resumed, len(text.sequences))
        for index, ids in enumerate(text.sequences):
            if index not in measured:
                found = cached_singular_values(model, geometry, ids)
                log.add(str(index), [values.tolist() for values in found.values()])
                measured[index] = found
                progress(len(measured), len(text.sequences))
        spectra = Spectra(
            kvprof_version=__version__,
            model=inventory.model,
            calibration=text.info,
            geometry=geometry,
            made_with=made_with(model),
            layers=summed_up([measured[index] for index in range(len(text.sequences))]),
        )
        path = spectra.save(folder / "spectra.json")
        log.remove()
    return SpectraRun(spectra, path, tuple(_remarks(text, inventory, request, resumed)))


def summed_up(sequences: Sequence[SingularValues]) -> tuple[LayerSpectra, ...]:
    """Return the spectra of every layer: means over sequences, with the band over heads.

    sequences: what `cached_singular_values` found of each. One of fewer tokens than a head has dimensions has zeros for
    the values that it lacks.
    """
    layers = dict.fromkeys(layer for layer, _ in sequences[0])
    return tuple(
        LayerSpectra(
            layer=layer,
            key=_spectrum([found[layer, "key"] for found in sequences]),
            value=_spectrum([found[layer, "value"] for found in sequences]),
        )
        for layer in sorted(layers)
    )


def _spectrum(sequences: Sequence[NDArray[np.float64]]) -> Spectrum:
    """Return one tensor's spectrum from its singular values in each sequence, (H, min(T, D))."""
    count = max(values.shape[1] for values in sequences)
    values_SHN = np.stack([np.pad(values, ((0, 0), (0, count - values.shape[1]))) for values in sequences])
    _, exponent = np.frexp(values_SHN.max())
    values_SHN = np.ldexp(values_SHN, -exponent)  # to 1, exactly, so that no sum or square leaves float64
    heads_HN = values_SHN.mean(axis=0)
    mean_N = heads_HN.mean(axis=0)
    frobenius_norm = np.sqrt(np.square(values_SHN).sum(axis=2)).mean()

    def unscaled(numbers: NDArray[np.float64]) -> tuple[float, ...]:
        return tuple(np.ldexp(numbers, exponent).tolist())

    return Spectrum(
        heads=heads_HN.shape[0],
        mean=unscaled(mean_N),
        low=unscaled(heads_HN.min(axis=0)),
        high=unscaled(heads_HN.max(axis=0)),
        spectral_norm=float(np.ldexp(mean_N[0], exponent)),
        frobenius_norm=float(np.ldexp(frobenius_norm, exponent)),
    )


def _read_journal(log: Journal, geometry: CacheGeometry, text: CalibrationSet) -> dict[int, SingularValues]:
    """Return what was measured of each sequence before; raises InvalidFile for what no run has written."""
    found = {}
    with log.understood():
        for key, lists in log.done.items():
            index = int(key)
            if not 0 <= index < len(text.sequences):
                raise ValueError(key)
            found[index] = _as_measured(lists, geometry, len(text.sequences[index]))
    return found


def _as_measured(lists: Sequence[object], geometry: CacheGeometry, tokens: int) -> SingularValues:
    """Return one line of the journal as it was measured; raises ValueError or TypeError where it was not."""
    shapes = {
        (layer.layer, tensor): (layer.kv_heads, min(tokens, head_dim_of(layer, tensor)))
        for layer in geometry.scored
        for tensor in TENSORS
    }
    found = {}
    for (key, shape), values in zip(shapes.items(), lists, strict=True):
        found[key] = np.array(values, dtype=np.float64)
        if found[key].shape != shape or not np.isfinite(found[key]).all() or found[key].min() < 0:
            raise ValueError(key)
    return found


def _remarks(text: CalibrationSet, inventory: Inventory, request: SpectraRequest, resumed: int) -> Iterator[str]:
    total = len(text.sequences)
    if resumed:
        yield f"went on with a stopped run: {resumed} of {total} sequences were measured before"
    yield from text.remarks(request.sequences)
    widest = max(head_dim_of(layer, tensor) for layer in inventory.geometry.scored for tensor in TENSORS)
    if short := sum(len(ids) < widest for ids in text.sequences):
        yield (
            f"{short} of {total} sequences have fewer tokens than a head has dimensions ({widest}), and count as 0 for "
            "the singular values that they lack: try --pack"
        )
