"""Signed first-order effects on the loss of storing one tensor of one layer in a format.

Reads a model and a batch of token ids; returns series of effects in nats, sequence by sequence. One forward, a
backward to the positions that count, and what each format changes of its layer (format_effects.py). Does not know
text, files, budgets, nor what the effects add up to (records/long_run.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvprof.calibration.sequences import Batch
from kvprof.errors import NonFiniteGradient
from kvprof.models.load import input_device, wider_dtype_advice
from kvprof.profile.decoder import Formats
from kvprof.profile.format_changes import LayerFormats
from kvprof.profile.format_effects import format_effects
from kvprof.profile.lm_head import Head
from kvprof.profile.output_effects import output_effects
from kvprof.profile.suffix_gradients import attend_with_suffix, suffix_gradients
from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.plan import Quantizer, TensorPlan, Window
from kvprof.records.scores import suffix_start
from kvprof.runtime.attention.logits import logits_of
from kvprof.runtime.attention.patch import AttentionCall, attention_through

Effects = dict[tuple[int, TensorName, str], list[Tensor]]
"""(layer, tensor, format name) to the effects of each sequence's positions that count: (N,), float64, on the CPU."""


@dataclass(frozen=True)
class Suffix:
    """The queries that count: of each sequence those from `starts` on, up to its length.

    starts, lengths: one number a sequence.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def first(self) -> int:
        """The first position that counts in any sequence."""
        return min(self.starts)

    def mask(self, tokens: int) -> Tensor:
        """Return which positions from `first` on count: (B, tokens - first), bool."""
        positions = torch.arange(self.first, tokens)
        starts, lengths = torch.tensor(self.starts)[:, None], torch.tensor(self.lengths)[:, None]
        return (positions >= starts) & (positions < lengths)

    def parts(self, numbers: Tensor) -> list[Tensor]:
        """Return the numbers of the positions that count, of each sequence. numbers: (B, T - first)."""
        return [
            row[start - self.first : length - self.first]
            for row, start, length in zip(numbers, self.starts, self.lengths, strict=True)
        ]


def loss_effects(
    model: PreTrainedModel,
    batch: Batch,
    formats: Formats,
    window: Window,
    quantizer: Quantizer,
    suffix_fraction: float,
    seed: int,
) -> Effects:
    """Return the signed effect of each format on the loss, position by position, for each sequence of a batch.

    Let g be the gradient of the suffix's summed loss with respect to a layer's attention output at one position, its
    labels drawn from the model's own distribution, and d what storing the tensor in a format changes of that output, as
    the position's query would read it in decoding: sinks and window exact, all else quantized, through the softmax. An
    effect is g . d. Half the expected square of the sum of all effects is the divergence of the text, to second order.

    batch: padded on the right. suffix_fraction: the share of each sequence, at its end, that counts. seed: with a
    sequence's index it decides the labels. model: no parameter asks for a gradient, so that only activations get one;
    left as it was found.
    Raises UnsupportedAttention, NonFiniteGradient.
    """
    suffix = suffix_of(batch, suffix_fraction)
    layers = sorted({layer for layer, _ in formats})
    probe = _Probe(formats, window, quantizer, suffix)
    counted = suffix.mask(batch.input_ids.shape[1])  # (B, T - first)
    generators = [_generator(seed, index) for index in batch.indices]
    ids, mask = (tensor.to(input_device(model)) for tensor in (batch.input_ids, batch.attention_mask))
    rows, tokens = ids.shape
    with attention_through(model, layers, probe.attend), suffix_gradients(model, rows, tokens, suffix.first):
        head = Head(model, input_ids=ids, attention_mask=mask, use_cache=False)
        for start, stop in head.chunks(suffix.first, tokens):
            here = counted[:, start - suffix.first : stop - suffix.first]
            logits = head.run(start, stop, input_ids=ids[:, start:stop], use_cache=False).logits[here.to(ids.device)]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (positions, V)
            labels = _sampled_labels(wide.detach(), here.sum(1).tolist(), generators)
            torch.nn.functional.cross_entropy(wide, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
        head.backward()
    for (layer, tensor, name), dots in probe.dots.items():
        if not dots.square().sum() <= torch.finfo(torch.float32).max:  # NaN too; a file has float32
            raise NonFiniteGradient(
                f"the predicted loss of the {tensor} of layer {layer} in {name} is not finite in "
                f"{str(model.dtype).removeprefix('torch.')}.\n  "
                + wider_dtype_advice(model, "the weights are damaged, or the text drives the model out of range")
            )
    return {key: suffix.parts(dots) for key, dots in probe.dots.items()}


def suffix_of(batch: Batch, fraction: float) -> Suffix:
    """Return the last share of each sequence of a batch that is padded on the right."""
    lengths = tuple(int(length) for length in batch.attention_mask.sum(1))
    return Suffix(tuple(suffix_start(length, fraction) for length in lengths), lengths)


@dataclass
class _Probe:
    """Stands in for the attention of each layer, and asks on the way back what each format would have cost.

    dots: (layer, tensor, format name) to g . d of each position that counts, (B, T - first), float64, on the CPU.
    """

    formats: Formats
    window: Window
    quantizer: Quantizer
    suffix: Suffix
    dots: dict[tuple[int, TensorName, str], Tensor] = field(default_factory=dict)

    def attend(self, call: AttentionCall) -> Tensor:
        """Attend as the model does, and wait for the gradient of the output."""
        before, output = attend_with_suffix(call, self.suffix.first)
        if not torch.is_grad_enabled():  # a block whose forward will be repeated on the way back, and in the same parts
            return output if before is None else torch.cat([before, output], dim=1)
        leaf = not output.requires_grad  # the first layer's: nothing before it asks for a gradient
        if leaf:
            output.requires_grad_(True)
        kept = call.detached()

        def arrived(gradient: Tensor) -> None:
            with torch.no_grad():
                self._ask(kept, gradient)

        output.register_hook(arrived)  # type: ignore[no-untyped-call]
        if before is not None:
            return torch.cat([before, output], dim=1)
        return output.clone() if leaf else output  # a copy may be changed in place, a leaf not

    def _ask(self, call: AttentionCall, gradient: Tensor) -> None:
        """Add up g . d of every format of this layer's keys and values. gradient: (B, T - first, heads, D)."""
        # In half precision an output is rounded by more than 6 or 8 bits change it: d is computed in a wider dtype.
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        wide = call if dtype == call.query.dtype else call.promoted(dtype)
        asked = LayerFormats(
            [
                (tensor, form.name, TensorPlan(**form.model_dump()))
                for tensor in TENSORS
                for form in self.formats.get((call.layer, tensor), ())
            ],
            self.window,
            self.quantizer,
            self.suffix.first,
        )
        logits = logits_of(wide, min(self.suffix.lengths) - 1)
        if logits is None:
            found = output_effects(call, wide, gradient.to(dtype), asked)
        else:
            found = format_effects(call, wide, logits, gradient.to(dtype), asked)
        mask = self.suffix.mask(call.key.shape[2])
        for (tensor, name), dots in found.items():
            dots = dots.cpu().double().masked_fill_(~mask, 0.0)
            key = (call.layer, tensor, name)
            # A layer that shares these keys adds to what the same position feels.
            self.dots[key] = self.dots[key] + dots if key in self.dots else dots


def _generator(seed: int, index: int) -> torch.Generator:
    """Return the random numbers of one sequence: of the seed and its index alone, not of the batch that it is in."""
    drawn_by = hashlib.sha256(f"{seed} {index}".encode()).digest()  # torch's generator heeds 32 bits of a seed
    return torch.Generator().manual_seed(int.from_bytes(drawn_by[:4], "big"))


def _sampled_labels(logits: Tensor, counts: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Draw a label for each position from the model's own distribution: (positions,), int64.

    logits: (positions, V), float32 or wider, sequence after sequence. counts: positions of each, whose generator goes
    on where it was: the draws of a sequence are the same however its positions are parted.
    Exponential clocks race, a label's own at the rate of its probability: another label wins about as often as rounding
    moves the distribution, so that half precision draws nearly the same labels.
    """
    labels = []
    for rows, generator in zip(torch.split(logits, list(counts)), generators, strict=True):
        for row in rows:
            # The very numbers of torch's exponential_, which takes three times as long.
            clocks = torch.rand(len(row), dtype=torch.float64, generator=generator).neg_().log1p_().neg_().float()
            labels.append((row - clocks.log_().to(row.device)).argmax())
    return torch.stack(labels)
