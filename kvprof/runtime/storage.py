"""Where one layer's keys, or values, lie: sinks and window in full precision, all else in packed codes.

Reads a tensor's entry of a plan, and the keys or values as they come. Knows when a token is quantized and how blocks
grow; does not know attention, nor the other tensors of the cache. Every tensor held here is counted by `nbytes`, and is
as large as what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvprof.errors import CacheError
from kvprof.records.plan import Quantizer, TensorPlan, Window, quantized_tokens
from kvprof.runtime.packing import pack, packed_bytes, unpack
from kvprof.runtime.quantizer import Encoded, decode, encode, unit_tokens

BLOCK_TOKENS = 512
"""Appending copies the last block, never more: what a token costs does not grow with the context."""

ENCODED_TOKENS = 2048
"""Tokens that are encoded at once, so that a long prompt's temporaries stay small beside the prompt."""


class FullTokens:
    """Tokens in full precision, oldest first, in blocks of (B, H, at most BLOCK_TOKENS, D)."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []

    @property
    def tokens(self) -> int:
        """Tokens of one sequence."""
        return sum(block.shape[2] for block in self.blocks)

    def append(self, x_BHTD: Tensor) -> None:
        """Add tokens at the end; copies them, so that no larger tensor is kept alive."""
        if x_BHTD.shape[2] == 0:
            return
        if self.blocks and self.blocks[-1].shape[2] + x_BHTD.shape[2] <= BLOCK_TOKENS:
            self.blocks[-1] = torch.cat([self.blocks[-1], x_BHTD], dim=2)
        else:
            self.blocks += [_copy(block) for block in torch.split(x_BHTD, BLOCK_TOKENS, dim=2)]

    def pop_front(self, tokens: int) -> Tensor:
        """Take the oldest tokens out: (B, H, tokens, D), of at least one."""
        taken = []
        while tokens > 0:
            block = self.blocks[0]
            if block.shape[2] <= tokens:
                taken.append(self.blocks.pop(0))
            else:
                taken.append(block[:, :, :tokens])
                self.blocks[0] = _copy(block[:, :, tokens:])
            tokens -= taken[-1].shape[2]
        return torch.cat(taken, dim=2) if len(taken) > 1 else taken[0]

    def truncate(self, tokens: int) -> None:
        """Keep the oldest tokens only."""
        kept: list[Tensor] = []
        for block in self.blocks:
            if tokens > 0:
                kept.append(block if block.shape[2] <= tokens else _copy(block[:, :, :tokens]))
                tokens -= kept[-1].shape[2]
        self.blocks = kept


@dataclass
class CodeBlock:
    """Quantized units that follow each other.

    codes: uint8, (B, units, bytes a unit) while the block still grows; (B, 1, bytes of all units) when it is full,
    which unpacks faster, or where a unit's codes fill no whole bytes.
    scale, zero: (B, units, H, S) as in `Encoded`, units in front.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    @property
    def units(self) -> int:
        """Groups of tokens (axis `channel`), or tokens, of one sequence."""
        return int(self.scale.shape[1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that the block holds."""
        return (self.codes, self.scale) if self.zero is None else (self.codes, self.scale, self.zero)


class CodeTokens:
    """Tokens in codes, oldest first; only ever added to or cut off at the end."""

    def __init__(self, form: TensorPlan, quantizer: Quantizer, heads: int, head_dim: int) -> None:
        self.form = form
        self.quantizer = quantizer
        self.heads = heads
        self.head_dim = head_dim
        self.unit_tokens = unit_tokens(form)
        self.unit_codes = heads * self.unit_tokens * head_dim
        self.fills_bytes = self.unit_codes * form.bits % 8 == 0
        self.blocks: list[CodeBlock] = []

    @property
    def tokens(self) -> int:
        """Tokens of one sequence."""
        return sum(block.units for block in self.blocks) * self.unit_tokens

    def append(self, x_BHTD: Tensor) -> None:
        """Quantize tokens, whole units of them, and add them at the end."""
        at_once = max(1, ENCODED_TOKENS // self.unit_tokens) * self.unit_tokens
        for piece in torch.split(x_BHTD, at_once, dim=2):
            encoded = encode(piece, self.form, self.quantizer)
            codes = encoded.codes.transpose(1, 2).flatten(2)  # (B, units, H * tokens a unit * D)
            zero = None if encoded.zero is None else _copy(encoded.zero.transpose(1, 2))
            self._add(codes, _copy(encoded.scale.transpose(1, 2)), zero)

    def truncate(self, tokens: int) -> None:
        """Keep the oldest tokens, whole units of them, only."""
        left, blocks, self.blocks = tokens // self.unit_tokens, self.blocks, []
        for block in blocks:
            if block.units <= left:
                self.blocks.append(block)
            elif left > 0:
                zero = None if block.zero is None else _copy(block.zero[:, :left])
                kept = self._unpacked(block)[:, :left]
                self.blocks.append(CodeBlock(self._packed(kept), _copy(block.scale[:, :left]), zero))
            left -= min(left, block.units)

    def write(self, out_BHTD: Tensor) -> None:
        """Write what the codes stand for into (B, H, tokens, D)."""
        first = 0
        for block in self.blocks:
            last = first + block.units * self.unit_tokens
            encoded = Encoded(
                self._unpacked(block)
                .view(-1, block.units, self.heads, self.unit_tokens, self.head_dim)
                .transpose(1, 2),  # (B, H, units, tokens a unit, D)
                block.scale.transpose(1, 2),
                None if block.zero is None else block.zero.transpose(1, 2),
            )
            decode(encoded, self.form, self.quantizer, out_BHTD[:, :, first:last])
            first = last

    def _add(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        last = self.blocks[-1] if self.blocks else None
        if last is None or self._is_full(last):
            self.blocks.append(CodeBlock(self._packed(codes), scale, zero))
            return
        grown = CodeBlock(
            last.codes,
            torch.cat([last.scale, scale], dim=1),
            None if last.zero is None or zero is None else torch.cat([last.zero, zero], dim=1),
        )
        if self.in_one_run(grown.units):
            grown.codes = self._packed(torch.cat([self._unpacked(last), codes], dim=1))
        else:
            grown.codes = torch.cat([last.codes, self._packed(codes)], dim=1)
        self.blocks[-1] = grown

    def _is_full(self, block: CodeBlock) -> bool:
        """Whether a block takes no more units: it is large, and ends with a byte."""
        return block.units * self.unit_tokens >= BLOCK_TOKENS and (self.fills_bytes or block.units % 8 == 0)

    def in_one_run(self, units: int) -> bool:
        """Whether the codes of a block of so many units are packed together, not unit by unit."""
        return not self.fills_bytes or units * self.unit_tokens >= BLOCK_TOKENS

    def _packed(self, codes: Tensor) -> Tensor:
        """Pack (B, units, codes a unit)."""
        one_run = self.in_one_run(codes.shape[1])
        return pack(codes.flatten(1).unsqueeze(1) if one_run else codes, self.form.bits)

    def _unpacked(self, block: CodeBlock) -> Tensor:
        """Return a block's codes: (B, units, codes a unit)."""
        runs = block.codes.shape[1]
        codes = unpack(block.codes, self.form.bits, block.units // runs * self.unit_codes)
        return codes.view(-1, block.units, self.unit_codes)


class TensorStore:
    """One layer's keys, or values: the sinks, the codes, and the window behind them.

    A token, or the group of tokens that shares its scale, is quantized once, from its full-precision numbers, when the
    window has left it behind: the rule of `records.plan.quantized_tokens`.
    """

    def __init__(self, form: TensorPlan, window: Window, quantizer: Quantizer, heads: int, head_dim: int) -> None:
        self.form = form
        self.window = window
        self.sinks = FullTokens()
        self.codes = CodeTokens(form, quantizer, heads, head_dim)
        self.recent = FullTokens()

    @property
    def tokens(self) -> int:
        """Tokens of one sequence."""
        return self.sinks.tokens + self.codes.tokens + self.recent.tokens

    def append(self, x_BHTD: Tensor) -> None:
        """Add tokens in full precision; nothing is quantized before `settle`."""
        room = 0 if self.form.is_full else max(0, self.window.sink_tokens - self.sinks.tokens)
        self.sinks.append(x_BHTD[:, :, :room])
        self.recent.append(x_BHTD[:, :, room:])

    def settle(self, tokens: int | None = None) -> None:
        """Quantize what the window has left behind, or what it would have of fewer tokens than are held."""
        due = self._rule(self.tokens if tokens is None else max(0, tokens)) - self.codes.tokens
        if due > 0:
            self.codes.append(self.recent.pop_front(due))

    def read(self, new_BHTD: Tensor) -> Tensor:
        """Return what a query reads: everything held, and the new tokens behind it, (B, H, tokens + new, D)."""
        sinks, coded = self.sinks.tokens, self.codes.tokens
        if coded == 0:
            full = [*self.sinks.blocks, *self.recent.blocks, new_BHTD]
            return torch.cat(full, dim=2) if len(full) > 1 else new_BHTD
        B, H, T, D = new_BHTD.shape
        out_BHTD = torch.empty(B, H, self.tokens + T, D, dtype=new_BHTD.dtype, device=new_BHTD.device)
        self.codes.write(out_BHTD[:, :, sinks : sinks + coded])
        for first, blocks in ((0, self.sinks.blocks), (sinks + coded, [*self.recent.blocks, new_BHTD])):
            for block in blocks:
                out_BHTD[:, :, first : first + block.shape[2]] = block
                first += block.shape[2]
        return out_BHTD

    def check_crop(self, tokens: int) -> None:
        """Raise CacheError where keeping only so many tokens would need numbers that were rounded away."""
        kept = min(self.codes.tokens, max(0, tokens - self.sinks.tokens))
        if kept > self._rule(tokens):
            raise CacheError(
                f"the cache cannot go back from {self.tokens} to {tokens} tokens: of those that stay, "
                f"{kept - self._rule(tokens)} would be in full precision again, and they are quantized.\n"
                "  Tokens can be taken back that came after cache.activate_past_recording() and after the last crop; "
                "nothing was changed."
            )

    def crop(self, tokens: int) -> None:
        """Keep the oldest tokens only, as a cache that never saw the others; `check_crop` says whether that can be."""
        sinks, coded = self.sinks.tokens, self.codes.tokens
        self.sinks.truncate(tokens)
        self.codes.truncate(max(0, min(coded, tokens - sinks)))
        self.recent.truncate(max(0, tokens - sinks - coded))

    def clear(self) -> None:
        """Forget every token."""
        self.sinks.blocks, self.codes.blocks, self.recent.blocks = [], [], []

    def change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch, dimension 0, to every tensor."""
        for full in (self.sinks, self.recent):
            full.blocks = [change(block) for block in full.blocks]
        self.codes.blocks = [
            CodeBlock(change(block.codes), change(block.scale), None if block.zero is None else change(block.zero))
            for block in self.codes.blocks
        ]

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor held, by name."""
        for name, full in (("sinks", self.sinks), ("recent", self.recent)):
            for number, block in enumerate(full.blocks):
                yield f"{name}.{number}", block
        for number, coded in enumerate(self.codes.blocks):
            for name, tensor in zip(("codes", "scale", "zero"), coded.tensors, strict=False):
                yield f"{name}.{number}", tensor

    def restore(self, tensors: dict[str, Tensor], batch: int, dtype: torch.dtype) -> None:
        """Take over what `named_tensors` gave; raises KeyError or ValueError where that is not a cache of this form.

        batch, dtype: sequences held, and the dtype of what is in full precision.
        """
        codes, heads, head_dim = self.codes, self.codes.heads, self.codes.head_dim
        for name, full in (("sinks", self.sinks), ("recent", self.recent)):
            full.blocks = [tensors.pop(f"{name}.{number}") for number in range(_count(tensors, name))]
            for block in full.blocks:
                _expect(name, block, (batch, heads, block.shape[2], head_dim), dtype)
        codes.blocks = []
        for number in range(_count(tensors, "codes")):
            packed, scale = tensors.pop(f"codes.{number}"), tensors.pop(f"scale.{number}")
            zero = None if self.form.scheme == "rotated" else tensors.pop(f"zero.{number}")
            units = scale.shape[1]
            channels = head_dim if self.form.axis == "channel" else -(-head_dim // self.form.group_size)
            runs = 1 if codes.in_one_run(units) else units
            count = units // runs * codes.unit_codes
            _expect("codes", packed, (batch, runs, packed_bytes(count, self.form.bits)), torch.uint8)
            for name, tensor, stored in (
                ("scale", scale, codes.quantizer.scale_dtype),
                ("zero", zero, codes.quantizer.zero_dtype),
            ):
                if tensor is not None:
                    _expect(name, tensor, (batch, units, heads, channels), getattr(torch, stored))
            codes.blocks.append(CodeBlock(packed, scale, zero))
        if tensors:
            raise ValueError(f"{next(iter(tensors))} belongs to no cache of this form")

    def _rule(self, tokens: int) -> int:
        return quantized_tokens(self.form, self.window, tokens, self.form.recent_fraction)


def _count(tensors: dict[str, Tensor], name: str) -> int:
    return sum(key.startswith(f"{name}.") for key in tensors)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype} of {tuple(tensor.shape)}, expected {dtype} of {shape}")


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
