"""How much does the loss feel each layer's W_k and W_v? The norm of its gradient, on calibration text.

Reads a model and calibration text; writes a journal while it runs, so that a stopped run goes on. One forward and one
backward serve all layers, and give each sequence of a batch its own gradient. Does not know bits, nor rounding errors.
Source: arXiv 2506.08018, section 3 (KVmix: layers whose projections have the larger gradient get more bits).
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvprof import __version__
from kvprof.calibration.sequences import IGNORED, Batch, CalibrationSet, batches, choose_length, tokenize
from kvprof.calibration.text import BUILTIN, open_text
from kvprof.errors import KvprofError, NonFiniteGradient, UsageError
from kvprof.models.identity import checkpoint_fingerprint, live_fingerprint
from kvprof.models.inventory import take_inventory
from kvprof.models.layouts import Rows, choose_layout, cut_rows, find_projections
from kvprof.models.load import ModelSource, load_config, load_model, load_tokenizer, wider_dtype_advice
from kvprof.models.weights import take_rows
from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.geometry import CacheGeometry
from kvprof.records.inventory import Inventory
from kvprof.records.runs import Journal
from kvprof.records.scores import LayerScores, Scores, TensorScores

SequenceNorms = list[tuple[float, float]]
"""One sequence's gradient norms: (key, value) of each scored layer, ascending."""


@dataclass(frozen=True)
class GradientSettings:
    """What to measure on, and how.

    sequence_length: None as `calibration.sequences.choose_length` has it.
    dtype, device: as `models.load.load_model` takes them. batch_size: sequences in one forward; changes no score.
    """

    data: str = BUILTIN
    split: str | None = None
    sequences: int = 16
    sequence_length: int | None = None
    batch_size: int = 1
    seed: int = 0
    pack: bool = False
    dtype: str = "auto"
    device: str = "auto"


@dataclass(frozen=True)
class GradientRun:
    """A finished run: its scores, the file they are in, and what a reader of them should know."""

    scores: Scores
    path: Path
    remarks: tuple[str, ...]


def run_gradients(
    source: ModelSource,
    settings: GradientSettings,
    folder: Path,
    restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GradientRun:
    """Load a model, measure its gradients on calibration text and write gradients.json; go on where a stopped run was.

    folder: for the result, and for the journal of finished sequences meanwhile.
    progress: called with (sequences done, sequences in all).
    Raises KvprofError in its many kinds: the model, the text, a setting or the journal is not fit.
    """
    if settings.batch_size < 1:
        raise UsageError(f"--batch-size {settings.batch_size}: at least 1 is needed.")
    whole_config = load_config(source)
    inventory = take_inventory(whole_config, source.id)
    config = whole_config.get_text_config(decoder=True)
    length = choose_length(settings.sequence_length, getattr(config, "max_position_embeddings", None))
    calibration = tokenize(
        open_text(settings.data, settings.split, settings.seed),
        load_tokenizer(source),
        settings.sequences,
        length,
        settings.seed,
        settings.pack,
    )
    calibration.check_vocabulary(config.vocab_size)
    model = load_model(source, settings.dtype, settings.device)
    geometry = inventory.geometry
    fingerprint = live_fingerprint(model, geometry) or checkpoint_fingerprint(source, geometry)
    inventory = inventory.model_copy(update={"model": inventory.model.model_copy(update={"fingerprint": fingerprint})})
    identity = {
        "model": source.id,
        "model fingerprint": fingerprint,
        "dtype": str(model.dtype),
        "kvprof version": __version__,
        **calibration.identity,
    }
    with Journal(folder / "gradients.journal", identity, restart) as log:
        done = {int(index): norms for index, norms in log.done.items()}
        progress(len(done), len(calibration.sequences))

        def finished(norms: Mapping[int, SequenceNorms]) -> None:
            for index, pairs in norms.items():
                log.add(str(index), pairs)
            progress(len(log.done), len(calibration.sequences))

        scores = measure_gradients(model, calibration, inventory, settings.batch_size, done, finished)
        path = scores.save(folder / "gradients.json")
        log.remove()
    return GradientRun(scores, path, tuple(_remarks(calibration, settings, len(done))))


def measure_gradients(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    inventory: Inventory,
    batch_size: int = 1,
    done: Mapping[int, SequenceNorms] | None = None,
    finished: Callable[[Mapping[int, SequenceNorms]], None] = lambda norms: None,
) -> Scores:
    """Measure the mean over sequences of the L2 norm of dLoss/dW_k and dLoss/dW_v of every layer.

    model: in eval mode, no parameter asking for a gradient; left as it was found. The loss of a sequence is its mean
    cross-entropy in nats over its own targets.
    done: norms of sequences measured before, by index. finished: called with each batch's norms.
    Returns Scores with gradient_norm and its standard error over sequences (0 for a single one).
    Raises NonFiniteGradient, with advice, where half precision overflows.
    """
    measured = dict(done or {})
    todo = [index for index in range(len(calibration.sequences)) if index not in measured]
    for batch in batches(calibration.sequences, batch_size, todo):
        norms = gradient_norms(model, inventory.geometry, batch)
        finished(norms)
        measured.update(norms)
    # In the order of the sequences, whatever the batches were: the same sum to the last bit.
    by_sequence = torch.tensor([measured[index] for index in sorted(measured)], dtype=torch.float64)
    mean = by_sequence.mean(0)
    stderr = by_sequence.std(0) / math.sqrt(len(measured)) if len(measured) > 1 else torch.zeros_like(mean)
    return Scores(
        source="gradients",
        kvprof_version=__version__,
        model=inventory.model,
        calibration=calibration.info,
        geometry=inventory.geometry,
        layers=tuple(
            LayerScores(
                layer=layer.layer,
                key=TensorScores(gradient_norm=float(mean[row, 0]), gradient_norm_stderr=float(stderr[row, 0])),
                value=TensorScores(gradient_norm=float(mean[row, 1]), gradient_norm_stderr=float(stderr[row, 1])),
            )
            for row, layer in enumerate(inventory.geometry.scored)
        ),
    )


def gradient_norms(model: PreTrainedModel, geometry: CacheGeometry, batch: Batch) -> dict[int, SequenceNorms]:
    """Return the gradient norms of each sequence of a batch, by index, from one forward and one backward.

    Only the outputs of the K and V projections ask autograd for a gradient. When the backward brings dLoss/dOutput of
    one, its product with the projection's input is each sequence's own dLoss/dW, of which only the norm is kept.
    """
    batch = _padded_on_the_right(batch)
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":  # offloaded: accelerate moves what comes in to where it computes
        device = torch.device("cpu")
    arguments: dict[str, Any] = {
        "input_ids": batch.input_ids.to(device),
        "attention_mask": batch.attention_mask.to(device),
        "labels": batch.labels.to(device),  # unshifted: the model shifts them itself
        "use_cache": False,
    }
    if "output_router_logits" in inspect.signature(model.forward).parameters:
        arguments["output_router_logits"] = False  # else a mixture of experts may add its balancing loss
    try:
        with _weight_gradient_norms(model, geometry, len(batch.indices)) as norms:
            model(**arguments).loss.backward()
    except torch.OutOfMemoryError:
        rows, tokens = batch.input_ids.shape
        raise KvprofError(
            f"out of memory on {device} with a batch of {rows} sequences of {tokens} tokens.\n"
            "  Lower --batch-size or --sequence-length; what is measured so far is kept."
        ) from None
    # transformers averages the loss over the targets of the whole batch; a sequence's own mean is over its own.
    targets = (batch.labels[:, 1:] != IGNORED).sum(1).double()
    shares = targets.sum() / targets  # (B,)
    result: dict[int, SequenceNorms] = {index: [] for index in batch.indices}
    for layer in geometry.scored:
        keys, values = (shares * norms[layer.layer, tensor].cpu() for tensor in TENSORS)  # (B,)
        if not (keys.isfinite().all() and values.isfinite().all()):
            raise NonFiniteGradient(_overflow_advice(model, layer.layer))
        for index, key, value in zip(batch.indices, keys.tolist(), values.tolist(), strict=True):
            result[index].append((key, value))
    return result


@contextlib.contextmanager
def _weight_gradient_norms(
    model: PreTrainedModel, geometry: CacheGeometry, batch_size: int
) -> Iterator[dict[tuple[int, TensorName], Tensor]]:
    """Yield a dict that a backward inside the `with` fills: (layer, tensor) to the norms of dLoss/dW, (B,)."""
    norms: dict[tuple[int, TensorName], Tensor] = {}
    handles = []

    def capture(layer: int, runs: Mapping[TensorName, tuple[tuple[int, int], ...] | None]) -> Callable[..., Tensor]:
        def forward_hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            source = inputs[0].detach()

            def backward_hook(gradient: Tensor) -> None:
                for tensor, rows in runs.items():
                    part = gradient if rows is None else take_rows(gradient, rows, dim=-1)
                    norms[layer, tensor] = _outer_norms(part, source, batch_size)

            if output.requires_grad:
                output.register_hook(backward_hook)  # type: ignore[no-untyped-call]
                return output
            # The first layer's: nothing before it asks for a gradient. The copy may be changed in place, a leaf not.
            output.requires_grad_(True).register_hook(backward_hook)  # type: ignore[no-untyped-call]
            return output.clone()

        return forward_hook

    modules = dict(model.named_modules())
    projections = find_projections(modules, geometry)
    query_heads = model.config.get_text_config(decoder=True).num_attention_heads
    try:
        for layer in geometry.scored:
            projection = projections[layer.layer]
            key, value = modules[projection.key], modules[projection.value]
            if projection.is_fused:
                layout = choose_layout(projection, tuple(key.get_parameter("weight").shape), layer, query_heads)
                rows: Rows = cut_rows(layout, layer, query_heads)
                both = capture(layer.layer, {"key": rows.key, "value": rows.value})
                handles.append(key.register_forward_hook(both))
            else:
                handles.append(key.register_forward_hook(capture(layer.layer, {"key": None})))
                handles.append(value.register_forward_hook(capture(layer.layer, {"value": None})))
        yield norms
    finally:
        for handle in handles:
            handle.remove()


def _padded_on_the_right(batch: Batch) -> Batch:
    """Move the padding of each sequence to its right, where it shifts no position and no token attends to it."""
    order = batch.attention_mask.argsort(dim=1, descending=True, stable=True)
    tensors = (batch.input_ids, batch.attention_mask, batch.labels)
    return Batch(batch.indices, *(tensor.gather(1, order) for tensor in tensors))


def _outer_norms(gradient: Tensor, source: Tensor, batch_size: int) -> Tensor:
    """Return the norm of each sequence's sum over tokens of gradient (B, T, out) times source (B, T, in): (B,)."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    gradient = gradient.reshape(batch_size, -1, gradient.shape[-1]).to(dtype)
    source = source.reshape(batch_size, -1, source.shape[-1]).to(dtype)
    widest = torch.float32 if gradient.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    return torch.stack([torch.linalg.vector_norm(g.T @ x, dtype=widest) for g, x in zip(gradient, source, strict=True)])


def _remarks(calibration: CalibrationSet, settings: GradientSettings, resumed: int) -> Iterator[str]:
    if resumed:
        found = len(calibration.sequences)
        yield f"went on with a stopped run: {resumed} of {found} sequences were measured before"
    yield from calibration.remarks(settings.sequences)


def _overflow_advice(model: PreTrainedModel, layer: int) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    advice = wider_dtype_advice(model, "the model's own loss is not finite on this text, or its weights are damaged")
    return f"the gradient of layer {layer} is not finite in {dtype}.\n  {advice}"
