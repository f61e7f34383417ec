"""How much does the loss feel each layer's W_k and W_v? The norm of its gradient, on calibration text.

Reads a model and a batch of token ids; returns norms, sequence by sequence. One forward and one backward serve all
layers, and give each sequence of a batch its own gradient. Does not know text, files, bits, nor rounding errors.
Source: arXiv 2506.08018, section 3 (KVmix: layers whose projections have the larger gradient get more bits).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvprof.calibration.sequences import IGNORED, Batch
from kvprof.errors import ModelError, NonFiniteGradient, UnknownLayout, UnsupportedAttention, first_line
from kvprof.models.checkpoint.weights import take_rows
from kvprof.models.decoder import decoder_modules, query_heads, text_config
from kvprof.models.layouts import Rows, choose_layout, cut_rows, find_projections
from kvprof.models.load import input_device, wider_dtype_advice
from kvprof.models.skeleton import key_norm_of
from kvprof.profile.lm_head import Head
from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.geometry import CacheGeometry

SequenceNorms = list[tuple[float, float]]
"""One sequence's gradient norms: (key, value) of each scored layer, ascending."""


def gradient_norms(model: PreTrainedModel, geometry: CacheGeometry, batch: Batch) -> dict[int, SequenceNorms]:
    """Return the gradient norms of each sequence of a batch, by index, from one forward and one backward.

    Only the outputs of the K and V projections ask autograd for a gradient. When the backward brings dLoss/dOutput of
    one, its product with the projection's input is each sequence's own dLoss/dW, of which only the norm is kept.
    """
    batch = padded_on_the_right(batch)
    device = input_device(model)
    ids, labels = batch.input_ids.to(device), batch.labels.to(device)
    options: dict[str, Any] = {"use_cache": False}
    if "output_router_logits" in inspect.signature(model.forward).parameters:
        options["output_router_logits"] = False  # else a mixture of experts may add its balancing loss
    with _weight_gradient_norms(model, geometry, len(batch.indices)) as norms:
        head = Head(model, input_ids=ids, attention_mask=batch.attention_mask.to(device), **options)
        for start, stop in head.chunks(0, ids.shape[1] - 1):
            # One position more than has a target here: the model shifts labels itself.
            positions = (slice(None), slice(start, stop + 1))
            counted = int((labels[:, start + 1 : stop + 1] != IGNORED).sum())
            if counted:
                try:
                    loss = head.run(start, stop + 1, input_ids=ids[positions], labels=labels[positions], **options).loss
                except ValueError as error:  # GIT counts the tokens of an image that is not there
                    raise ModelError(
                        f"{type(model).__name__} computes no loss of text alone: {first_line(error)}"
                    ) from None
                # The sum over the targets, not transformers' mean: that one's gradient vanishes in float16.
                (loss * counted).backward()
        head.backward()
    targets = (batch.labels[:, 1:] != IGNORED).sum(1).double()  # (B,)
    result: dict[int, SequenceNorms] = {index: [] for index in batch.indices}
    for layer in geometry.scored:
        keys, values = (norms[layer.layer, tensor].cpu() / targets for tensor in TENSORS)  # (B,)
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
            if not torch.is_grad_enabled():  # a block whose forward will be repeated on the way back
                return output
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

    modules = decoder_modules(model)
    projections = find_projections(modules, geometry)
    if again := repeated_module([modules[projections[layer.layer].key] for layer in geometry.scored]):
        raise UnsupportedAttention(
            f"layers {geometry.scored[again[0]].layer} and {geometry.scored[again[1]].layer} of {type(model).__name__} "
            "are the very same module, and nothing tells on the way back which of them a gradient came through."
        )
    heads = query_heads(text_config(model.config))
    try:
        for layer in geometry.scored:
            projection = projections[layer.layer]
            key, value = modules[projection.key], modules[projection.value]
            if projection.is_fused:
                layout = choose_layout(projection, tuple(key.get_parameter("weight").shape), layer, heads)
                rows: Rows = cut_rows(layout, layer, heads)
                both = capture(layer.layer, {"key": rows.key, "value": rows.value})
                handles.append(key.register_forward_hook(both))
            elif projection.key == projection.value:
                handles += _shared_projection_hooks(modules[projection.attention], key, layer.layer, norms, batch_size)
            else:
                handles.append(key.register_forward_hook(capture(layer.layer, {"key": None})))
                handles.append(value.register_forward_hook(capture(layer.layer, {"value": None})))
        yield norms
    finally:
        for handle in handles:
            handle.remove()


def _shared_projection_hooks(
    attention: nn.Module,
    projection: nn.Module,
    layer: int,
    norms: dict[tuple[int, TensorName], Tensor],
    batch_size: int,
) -> list[Any]:
    """Return the hooks on a layer whose keys and values are made of what one matrix puts out.

    What the loss feels of that matrix through the keys alone is told by the gradient before the norm of the keys, which
    no value passes; the rest of the gradient came through the values.
    """
    key_norm = key_norm_of(attention)
    if key_norm is None:
        raise UnknownLayout(
            f"layer {layer} makes its values of what k_proj puts out, and nothing tells the two apart on the way back."
        )
    through_keys: list[Tensor] = []

    def keys_apart(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = inputs[0]
        if not (torch.is_grad_enabled() and states.requires_grad):
            return inputs
        own = states.clone()
        own.register_hook(lambda gradient: through_keys.append(gradient.detach()))  # type: ignore[no-untyped-call]
        return (own, *inputs[1:])

    def forward_hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        source = inputs[0].detach()

        def backward_hook(gradient: Tensor) -> None:
            keys = through_keys.pop().reshape(gradient.shape)
            norms[layer, "key"] = _outer_norms(keys, source, batch_size)
            norms[layer, "value"] = _outer_norms(gradient - keys, source, batch_size)

        leaf = not output.requires_grad
        if leaf:
            output.requires_grad_(True)
        output.register_hook(backward_hook)  # type: ignore[no-untyped-call]
        return output.clone() if leaf else output

    return [projection.register_forward_hook(forward_hook), key_norm[1].register_forward_pre_hook(keys_apart)]


def repeated_module(modules: Sequence[nn.Module]) -> tuple[int, int] | None:
    """Return the places of the first two that are one module, or None."""
    first: dict[int, int] = {}
    for place, module in enumerate(modules):
        if id(module) in first:
            return first[id(module)], place
        first[id(module)] = place
    return None


def padded_on_the_right(batch: Batch) -> Batch:
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


def _overflow_advice(model: PreTrainedModel, layer: int) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    advice = wider_dtype_advice(model, "the model's own loss is not finite on this text, or its weights are damaged")
    return f"the gradient of layer {layer} is not finite in {dtype}.\n  {advice}"
