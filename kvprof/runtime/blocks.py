"""Tokens in blocks: in full precision, or in packed codes.

Both grow at the end by at most a block's copy, so that what a token costs does not grow with the context, and every
tensor is as large as what it holds. Knows formats and shapes; does not know windows, nor when a token is quantized.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvprof.records.plan import Quantizer, TensorPlan
from kvprof.runtime.history import PAGE_TOKENS, CodeBlock, tokens_in, units_in
from kvprof.runtime.kernels.dispatch import TORCH, Kernels
from kvprof.runtime.kernels.torch_kernels import packed_rows, unpacked_rows


class FullTokens:
    """Tokens in full precision, oldest first, in blocks of (B, H, at most PAGE_TOKENS, D).

    Where none was ever taken from the front, all blocks but the last are pages of exactly so many.
    """

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []

    @property
    def tokens(self) -> int:
        """Tokens of one sequence."""
        return tokens_in(self.blocks)

    def append(self, x_BHTD: Tensor) -> None:
        """Add tokens at the end; copies them, so that no larger tensor is kept alive."""
        self.blocks = self.blocks_with(x_BHTD)

    def blocks_with(self, x_BHTD: Tensor) -> list[Tensor]:
        """Return what the blocks would be with more tokens at the end."""
        if x_BHTD.shape[2] == 0:
            return self.blocks
        blocks = list(self.blocks)
        room = min(x_BHTD.shape[2], PAGE_TOKENS - blocks[-1].shape[2]) if blocks else 0
        if room > 0:
            blocks[-1] = torch.cat([blocks[-1], x_BHTD[:, :, :room]], dim=2)
        if room < x_BHTD.shape[2]:
            blocks += [_copy(block) for block in torch.split(x_BHTD[:, :, room:], PAGE_TOKENS, dim=2)]
        return blocks

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

    def let_go(self, tokens: int) -> None:
        """Forget the oldest tokens, of which there are so many; nothing of them stays in memory."""
        while tokens > 0 and self.blocks:
            block = self.blocks.pop(0)
            if tokens < block.shape[2]:
                self.blocks.insert(0, _copy(block[:, :, tokens:]))
            tokens -= min(tokens, block.shape[2])

    def truncate(self, tokens: int) -> None:
        """Keep the oldest tokens only."""
        kept: list[Tensor] = []
        for block in self.blocks:
            if tokens > 0:
                kept.append(block if block.shape[2] <= tokens else _copy(block[:, :, :tokens]))
                tokens -= kept[-1].shape[2]
        self.blocks = kept


class CodeTokens:
    """Tokens in codes, oldest first; added to at the end, let go at the front, cut off at the end.

    blocks: pages of as many units each, which nothing changes any more, and the rest, which grows. Of the first, units
    may have been let go.
    """

    def __init__(
        self, form: TensorPlan, quantizer: Quantizer, heads: int, head_dim: int, kernels: Kernels = TORCH
    ) -> None:
        self.form = form
        self.quantizer = quantizer
        self.heads = heads
        self.head_dim = head_dim
        self.kernels = kernels
        self.unit_tokens = form.unit_tokens
        self.page_units = -(-PAGE_TOKENS // self.unit_tokens)
        if not form.fills_bytes(head_dim):
            self.page_units = -(-self.page_units // 8) * 8  # so that a page ends with a byte
        self.blocks: list[CodeBlock] = []

    @property
    def tokens(self) -> int:
        """Tokens of one sequence."""
        return units_in(self.blocks) * self.unit_tokens

    def append(self, x_BHTD: Tensor) -> None:
        """Quantize tokens, whole units of them, and add them at the end."""
        while x_BHTD.shape[2] > 0:
            rest = self.blocks[-1] if self.blocks and self.blocks[-1].units < self.page_units else None
            room = self.page_units - (0 if rest is None else rest.units)
            piece, x_BHTD = x_BHTD[:, :, : room * self.unit_tokens], x_BHTD[:, :, room * self.unit_tokens :]
            added = self.kernels.pack_tokens(piece, self.form, self.quantizer)
            if rest is None:
                self.blocks.append(added)
            else:
                self.blocks[-1] = self._joined(rest, added)

    def let_go(self, tokens: int) -> None:
        """Forget the oldest tokens, whole units of them, and in eights where only these fill whole bytes."""
        units = tokens // self.unit_tokens
        while units > 0 and self.blocks:
            block = self.blocks.pop(0)
            if units < block.units:
                self.blocks.insert(0, self._cut(block, units, block.units))
            units -= min(units, block.units)

    def truncate(self, tokens: int) -> None:
        """Keep the oldest tokens, whole units of them, only."""
        left, blocks, self.blocks = tokens // self.unit_tokens, self.blocks, []
        for block in blocks:
            if block.units <= left:
                self.blocks.append(block)
            elif left > 0:
                self.blocks.append(self._cut(block, 0, left))
            left -= min(left, block.units)

    def _joined(self, rest: CodeBlock, added: CodeBlock) -> CodeBlock:
        if self.form.fills_bytes(self.head_dim):
            codes = torch.cat([rest.codes, added.codes], dim=2)
        else:
            codes = packed_rows(torch.cat([self._codes(rest), self._codes(added)], dim=2), self.form)
        zero = None if rest.zero is None or added.zero is None else torch.cat([rest.zero, added.zero], dim=2)
        return CodeBlock(codes, torch.cat([rest.scale, added.scale], dim=2), zero)

    def _cut(self, block: CodeBlock, first: int, last: int) -> CodeBlock:
        """Keep some units of a block."""
        rows = slice(first * self.unit_tokens, last * self.unit_tokens)
        if self.form.fills_bytes(self.head_dim):
            codes = _copy(block.codes[:, :, rows])
        else:
            codes = packed_rows(self._codes(block)[:, :, rows], self.form)
        zero = None if block.zero is None else _copy(block.zero[:, :, first:last])
        return CodeBlock(codes, _copy(block.scale[:, :, first:last]), zero)

    def _codes(self, block: CodeBlock) -> Tensor:
        return unpacked_rows(block, self.form, self.heads, self.head_dim)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
