"""How far do a decoding model's predictions move when one tensor of one layer is stored in this format? Measured.

Reads a model and calibration text; writes divergence.json, and a journal while it runs, so that a stopped run goes on.
Slow and direct, a forward for each number: what every faster score is held against. Does not know those scores.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvprof import __version__
from kvprof.calibration.self_generated import batches_of, fill
from kvprof.calibration.sequences import CalibrationSet
from kvprof.errors import KvprofError
from kvprof.metrics import LOGIT_ROUNDING_NATS, SOFTMAXES, token_kl
from kvprof.models.config import load_config
from kvprof.models.costs import Passes, estimate_run
from kvprof.models.identity import fingerprint_of, made_with
from kvprof.models.inventory import take_inventory
from kvprof.models.load import input_device, load_model, wider_dtype_advice
from kvprof.models.memory import memory_explained
from kvprof.models.source import ModelSource
from kvprof.profile.decoder import decoding_of, within_the_window
from kvprof.profile.probes import Probe, check_something_is_read, choose_probes
from kvprof.profile.reading import read_text
from kvprof.records.estimate import Estimate
from kvprof.records.formats import FULL_BITS, TENSORS, TensorName, usual_format
from kvprof.records.inventory import Inventory
from kvprof.records.plan import (
    BitPlan,
    Quantizer,
    SkippedLayer,
    TensorPlan,
    Window,
    covered_geometry,
    layer_plan,
)
from kvprof.records.requests.measure import DivergenceRequest
from kvprof.records.sampled import loss_scores
from kvprof.records.scores import MadeWith, Scores, layer_scores, suffix_start
from kvprof.runtime.attention.reference import decoding_reads
from kvprof.storage.journal import Journal

BYTES_A_NUMBER = 160
"""Of each number: the line of it in the journal, and what the result says of it."""


@dataclass(frozen=True)
class DivergenceRun:
    """A finished run: its scores, the file they are in, and what a reader of them should know."""

    scores: Scores
    path: Path
    remarks: tuple[str, ...]


def run_divergence(
    source: ModelSource,
    request: DivergenceRequest,
    folder: Path,
    restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    writing: Callable[[int, int], None] = lambda done, total: None,
    announce: Callable[[Estimate], None] = lambda estimate: None,
) -> DivergenceRun:
    """Load a model, measure the chosen tensors on calibration text and write divergence.json.

    folder: for the result, and for the journal of finished forwards meanwhile. progress: called with (forwards done,
    forwards in all); writing: with (tokens done, tokens in all) of text that the model writes itself first. Other
    --layers, --tensors and --formats may go on with a stopped run. announce: called before a weight is loaded; may
    raise, to stop.
    Raises KvprofError in its many kinds: the model, the text, a setting or the journal is not fit.
    """
    window = window_of(request)
    whole_config = load_config(source)
    inventory = take_inventory(whole_config, source.id)
    whole = inventory.geometry
    geometry = covered_geometry(whole, "all", window)
    inventory = inventory.model_copy(update={"geometry": geometry})
    probes = choose_probes(geometry, request.layers, request.tensors, request.formats)
    mix, tokenizer = read_text(source, whole_config, request)
    check_something_is_read(probes, window, max(mix.lengths))
    passes = Passes(forwards=1 + len(probes), softmaxes=SOFTMAXES * request.suffix_fraction * len(probes), held=2)
    written_bytes = BYTES_A_NUMBER * len(mix.lengths) * len(probes)
    how = (request.dtype, request.device, request.stream)
    announce(
        estimate_run(
            source, whole_config, mix.lengths, passes, *how, written_bytes=written_bytes, written=batches_of(mix)
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
        **window.model_dump(),
        "suffix_fraction": request.suffix_fraction,
    }
    with Journal(folder / "divergence.journal", identity, restart) as log:
        indices = range(len(text.sequences))
        total = len(indices) * len(probes)
        todo = {index: [probe for probe in probes if probe.key(index) not in log.done] for index in indices}
        resumed = done = total - sum(map(len, todo.values()))
        log.check_numbers()
        progress(done, total)
        for index, left in todo.items():
            for probe, kl_nats in divergences(
                model, inventory, left, text.sequences[index], window, request.suffix_fraction
            ):
                log.add(probe.key(index), kl_nats)
                done += 1
                progress(done, total)
        measured = {probe: [float(log.done[probe.key(index)]) for index in indices] for probe in probes}
        scores = _scores(measured, inventory, text, request, made_with(model))
        path = folder / "divergence.json"
        scores = scores.calibrated_as(path)
        scores.save(path)
        log.remove()
    return DivergenceRun(scores, path, tuple(_remarks(scores, text, probes, request, str(model.dtype), resumed)))


def window_of(request: DivergenceRequest) -> Window:
    """Return the tokens that stay in full precision."""
    return Window(sink_tokens=request.sink_tokens, recent_tokens=request.recent_tokens)


def divergences(
    model: PreTrainedModel,
    inventory: Inventory,
    probes: Sequence[Probe],
    ids: Sequence[int],
    window: Window,
    suffix_fraction: float,
) -> Iterator[tuple[Probe, float]]:
    """Measure, one after another, the mean KL divergence from full precision over the last share of a sequence.

    Each query reads what it would in decoding: sinks and window in full precision, of the one tensor all else as the
    format gives it back. Yields each probe with nats a token.
    Raises UnsupportedAttention for a model whose attention cannot be replaced.
    """
    first = suffix_start(len(ids), suffix_fraction)
    reference = None
    for probe in probes:
        if reference is None:
            # By the same route as what it is compared with, so that both round alike below the quantized layer.
            reference = _suffix_logits(model, _plan(inventory, window, None), ids, first)
        kl = token_kl(reference, _suffix_logits(model, _plan(inventory, window, probe), ids, first))
        mean = math.fsum(kl.tolist()) / len(kl)
        if not math.isfinite(mean):
            dtype = str(model.dtype).removeprefix("torch.")
            advice = wider_dtype_advice(model, "the weights are damaged, or the text drives the model out of range")
            raise KvprofError(f"the logits are not finite in {dtype}.\n  {advice}")
        yield probe, mean


def _plan(inventory: Inventory, window: Window, probe: Probe | None) -> BitPlan:
    """Return the plan that quantizes this tensor alone, or nothing."""
    full = TensorPlan(**usual_format("key", FULL_BITS, 1).model_dump())
    layers = []
    for shape in inventory.geometry.planned:
        forms = dict.fromkeys(TENSORS, full)
        if probe is not None and probe.layer == shape.layer:
            forms[probe.tensor] = TensorPlan(**probe.form.model_dump())
        layers.append(layer_plan(shape.layer, forms["key"], forms["value"], shape.is_latent))
    return BitPlan(
        model=inventory.model,
        quantizer=Quantizer(),
        window=window,
        geometry=inventory.geometry,
        layers=tuple(layers),
        skipped=tuple(
            SkippedLayer(layer=shape.layer, reason=shape.skipped)
            for shape in inventory.geometry.layers
            if shape.skipped is not None
        ),
    )


def _suffix_logits(model: PreTrainedModel, plan: BitPlan, ids: Sequence[int], first: int) -> Tensor:
    """Return the logits after each token from position `first` on, as a decoder with that plan has them."""
    device = input_device(model)
    kept = len(ids) - first
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = kept
    explained = memory_explained(
        f"out of memory on {device} with a sequence of {len(ids)} tokens.\n"
        "  Lower --sequence-length, or try --dtype float16; what is measured so far is kept."
    )
    with explained, torch.no_grad(), decoding_reads(model, plan):
        logits: Tensor = model(input_ids=torch.tensor([list(ids)], device=device), **options).logits
    return logits[0, -kept:]


def _scores(
    measured: Mapping[Probe, list[float]],
    inventory: Inventory,
    text: CalibrationSet,
    request: DivergenceRequest,
    made: MadeWith,
) -> Scores:
    """Return what was measured as Scores; tensors and formats that were not are absent."""
    found: dict[tuple[int, TensorName], dict[str, list[float]]] = {}
    for probe, samples in measured.items():
        found.setdefault((probe.layer, probe.tensor), {})[probe.form.name] = samples
    return Scores(
        source="divergence",
        kvprof_version=__version__,
        model=inventory.model,
        calibration=text.info,
        geometry=inventory.geometry,
        made_with=made,
        decoding=decoding_of(text, window_of(request), request.suffix_fraction),
        layers=tuple(
            layer_scores(
                shape.layer,
                loss_scores(found.get((shape.layer, "key"), {}), text.info),
                loss_scores(found.get((shape.layer, "value"), {}), text.info),
                shape.is_latent,
            )
            for shape in inventory.geometry.scored
        ),
    )


def _remarks(
    scores: Scores,
    text: CalibrationSet,
    probes: Sequence[Probe],
    request: DivergenceRequest,
    dtype: str,
    resumed: int,
) -> Iterator[str]:
    if resumed:
        total = len(probes) * len(text.sequences)
        yield f"went on with a stopped run: {resumed} of {total} forwards were done before"
    yield from text.remarks(request.sequences)
    lengths = [len(ids) for ids in text.sequences]
    if short := within_the_window({probe.form for probe in probes}, window_of(request), lengths):
        yield short
    noise = LOGIT_ROUNDING_NATS.get(dtype.removeprefix("torch."), 0.0)
    numbers = [
        loss
        for entry in scores.layers
        for tensor in TENSORS
        for name, loss in (entry.tensor(tensor).loss_increase or {}).items()
        if name != "full"
    ]
    lost = sum(loss < 10 * noise for loss in numbers)
    if lost:
        yield (
            f"{lost} of {len(numbers)} numbers are below 10 times {noise:g} nats, which rounding logits to "
            f"{dtype.removeprefix('torch.')} can make: try --dtype float32"
        )
