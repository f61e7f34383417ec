"""Tokens in blocks: in full precision, or in packed codes.

Both grow at the end by at most a block's copy, so that what a token costs does not grow with the context, and every
tensor is as large as what it holds. Knows formats and shapes; does not know windows, nor when a token is quantized.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprof.records.plan import Quantizer, TensorPlan
from kvprof.runtime.packing import pack, unpack
from kvprof.runtime.quantizer import Encoded, decode, encode, unit_tokens

BLOCK_TOKENS = 512
"""Appending copies the last block, and a block takes no more tokens once it has so many."""

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


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
