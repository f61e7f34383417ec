"""How large are W_k and W_v? Spectral norm, Frobenius norm and stable rank, per layer and per KV head.

Reads the K and V projections as a stream, of the hub nothing else; never holds the model. Writes norms.json, and a
journal while it runs. Does not know any text, and so not what the cache holds: a norm after k_proj or a large bias
makes these numbers blind, which `kvprof inspect` flags.
Source: arXiv 2502.15075, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvprof import __version__
from kvprof.errors import NonFiniteWeight
from kvprof.models.checkpoint.files import Checkpoint
from kvprof.models.checkpoint.remote import Fetched, RemoteCheckpoint
from kvprof.models.checkpoint.weights import LayerReads, LayerWeights, Projections
from kvprof.models.config import load_config
from kvprof.models.decoder import text_config
from kvprof.models.identity import Fingerprint, layer_digest, made_with
from kvprof.models.inventory import take_inventory
from kvprof.models.memory import free_bytes
from kvprof.models.pinning import pin
from kvprof.models.quantized.checkpoint import as_stored
from kvprof.models.source import ModelSource
from kvprof.profile.matrix_norms import CHUNK_BYTES, matrix_norms
from kvprof.records.estimate import Estimate
from kvprof.records.inventory import Inventory
from kvprof.records.scores import AnyLayerScores, Scores, TensorScores, layer_scores, read_layer_scores
from kvprof.storage.journal import Journal

LIBRARY_BYTES = 20 * 2**20
"""What the libraries take once they compute, and headers."""
BYTES_A_HEAD = 100
"""Of a head's norms in norms.json, or in the journal."""


@dataclass(frozen=True)
class NormsRun:
    """A finished run: its scores and the file they are in, the inventory that was taken on the way, what to know.

    fetched: how much of the checkpoint came from the hub; None where it is local.
    """

    scores: Scores
    inventory: Inventory
    path: Path
    remarks: tuple[str, ...]
    fetched: Fetched | None


def run_norms(
    source: ModelSource,
    folder: Path,
    restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    announce: Callable[[Estimate], None] = lambda estimate: None,
) -> NormsRun:
    """Measure every layer's W_k and W_v of a model and write norms.json; go on where a stopped run was.

    folder: for the result, and for the journal of finished layers meanwhile. progress: called with (bytes done, bytes
    in all) of what is read of the checkpoint. announce: called once the headers are read; may raise, to stop.
    Raises KvprofError in its many kinds: the model, its weights or the journal is not fit.
    """
    subject = _open(source)
    announce(_estimate(subject))
    identity = {"model": source.id, "checkpoint": subject.identity, "kvprof version": __version__}
    with Journal(folder / "norms.journal", identity, restart) as log:
        resumed = len(log.done)
        with log.understood():
            heads = {str(reads.layer.layer): reads.layer.kv_heads for reads in subject.projections.layers}
            for layer, entry in log.done.items():
                _check_measured(layer, heads[layer], entry)
        try:
            scores = _measure(subject, progress, log.done, log.add)
        except NonFiniteWeight:
            log.remove()  # on these files no run gets further
            raise
        path = scores.save(folder / "norms.json")
        log.remove()
    remarks = [f"W_k and W_v are quantized: {kind}; measured as dequantized" for kind in subject.projections.kinds]
    if resumed:
        remarks.append(f"went on with a stopped run: {resumed} of {len(scores.layers)} layers were measured before")
    stored = as_stored(subject.checkpoint)
    fetched = stored.fetched if isinstance(stored, RemoteCheckpoint) else None
    return NormsRun(scores, subject.inventory, path, tuple(remarks), fetched)


def measure_norms(
    source: ModelSource, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Scores, Inventory]:
    """Measure every layer's W_k and W_v of a model, in whatever dtype its checkpoint has, and write nothing.

    progress: called with (bytes done, bytes in all) of what is read of the checkpoint.
    Returns Scores with spectral_norm, frobenius_norm, stable_rank and their per-head twins, bias_norm and k_norm gains
    where there are any, and the inventory that was taken on the way.
    Raises ModelError, UnknownLayout and NonFiniteWeight as `models.checkpoint.weights` does.
    """
    subject = _open(source)
    return _measure(subject, progress), subject.inventory


def layer_norms(weights: LayerWeights, gain_offset: float = 0.0) -> AnyLayerScores:
    """Measure one layer. gain_offset: what the norm after k_proj adds to its stored gains (1 in Gemma)."""
    layer = weights.layer
    gains = None if weights.key_gain is None else weights.key_gain.double() + gain_offset
    key = matrix_norms(weights.key, layer.kv_heads) | {
        "bias_norm": _length(weights.key_bias),
        "gain_rms": None if gains is None else float(gains.square().mean().sqrt()),
        "gain_max": None if gains is None else float(gains.abs().max()),
    }
    value = matrix_norms(weights.value, layer.kv_heads) | {"bias_norm": _length(weights.value_bias)}
    return layer_scores(layer.layer, TensorScores(**key), TensorScores(**value), layer.is_latent)


@dataclass(frozen=True)
class _Subject:
    """A model whose headers are read. identity: of its version. gain_offset: as `layer_norms` takes it."""

    inventory: Inventory
    identity: str
    checkpoint: Checkpoint
    projections: Projections
    gain_offset: float


def _open(source: ModelSource) -> _Subject:
    pinned = pin(source)
    whole_config = load_config(pinned.source)
    inventory = take_inventory(whole_config, source.id)
    checkpoint = pinned.open(text_config(whole_config))
    projections = Projections(checkpoint, inventory.geometry, whole_config)
    # llama.cpp stores whole gains
    gain_offset = 0.0 if pinned.is_gguf else inventory.key_norm_offset or 0.0
    return _Subject(inventory, pinned.identity, checkpoint, projections, gain_offset)


def _estimate(subject: _Subject) -> Estimate:
    """Return what measuring takes: the largest layer as it is read and cut, signs of K, and what its norms take."""
    projections, geometry = subject.projections, subject.inventory.geometry
    held = max(projections.held_bytes(reads) for reads in projections.layers)
    widest = max(max(shape.key_width, shape.value_width) for shape in geometry.scored)
    gram = 3 * 8 * widest**2
    return Estimate(
        memory_bytes=2 * held + 2 * min(CHUNK_BYTES, 2 * held) + gram + held // 4 + LIBRARY_BYTES,
        free_bytes=free_bytes(torch.device("cpu")),
        disk_bytes=2 * BYTES_A_HEAD * sum(2 * shape.kv_heads for shape in geometry.scored),
        read_bytes=sum(map(projections.stored_bytes, projections.layers)),
    )


def _measure(
    subject: _Subject,
    progress: Callable[[int, int], None],
    done: Mapping[str, Any] | None = None,
    finished: Callable[[str, object], None] = lambda layer, result: None,
) -> Scores:
    """Measure the layers that are not done. done, finished: results as JSON has them, by layer number."""
    results = dict(done or {})
    bytes_of = {str(reads.layer.layer): subject.projections.stored_bytes(reads) for reads in subject.projections.layers}
    progress(sum(bytes_of[layer] for layer in results), sum(bytes_of.values()))
    for reads in subject.projections.layers:
        if (layer := str(reads.layer.layer)) not in results:
            first = reads.layer.block_of
            if first is None:
                results[layer] = _measure_layer(subject, reads)
            else:
                measured = results[str(first)]
                results[layer] = measured | {"scores": measured["scores"] | {"layer": reads.layer.layer}}
            finished(layer, results[layer])
            progress(sum(bytes_of[layer] for layer in results), sum(bytes_of.values()))
    fingerprint = Fingerprint()
    for layer in bytes_of:
        fingerprint.add_digest(results[layer]["digest"])
    return Scores(
        source="norms",
        kvprof_version=__version__,
        model=subject.inventory.model.model_copy(update={"fingerprint": fingerprint.text}),
        geometry=subject.inventory.geometry,
        made_with=made_with(),
        layers=tuple(read_layer_scores(results[layer]["scores"]) for layer in bytes_of),
    )


def _measure_layer(subject: _Subject, reads: LayerReads) -> dict[str, Any]:
    weights = subject.projections.read(reads)
    scores = layer_norms(weights, subject.gain_offset)
    return {"digest": layer_digest(weights), "scores": scores.model_dump(mode="json")}


def _check_measured(layer: str, heads: int, entry: dict[str, Any]) -> None:
    """Raise ValueError, or whatever reading it raises, for what `_measure_layer` has not returned."""
    scores = read_layer_scores(entry["scores"])
    by_head = (scores.key.head_spectral_norm, scores.value.head_spectral_norm)
    if str(scores.layer) != layer or any(norms is None or len(norms) != heads for norms in by_head):
        raise ValueError(layer)
    Fingerprint().add_digest(entry["digest"])


def _length(bias: Tensor | None) -> float | None:
    return None if bias is None else float(bias.double().norm())
