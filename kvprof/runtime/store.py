"""Where one layer's keys, or values, lie: sinks and window in full precision, all else in packed codes.

Reads a tensor's entry of a plan, and the keys or values as they come. Knows when a token is quantized; does not know
attention, nor the other tensors of the cache. Every tensor held here is counted by `nbytes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvprof.errors import CacheError
from kvprof.records.plan import Quantizer, TensorPlan, Window, oldest_held, quantized_tokens
from kvprof.runtime.blocks import CodeTokens, FullTokens
from kvprof.runtime.history import PAGE_TOKENS, Addresses, CodeBlock, StoredTensor
from kvprof.runtime.kernels.dispatch import TORCH, Kernels
from kvprof.runtime.kernels.torch_kernels import restored
from kvprof.runtime.quantization.packing import packed_bytes


class TensorStore:
    """One layer's keys, or values: the sinks, the codes, and the window behind them.

    A token, or the group of tokens that shares its scale, is quantized once, from its full-precision numbers, when the
    window has left it behind: the rule of `records.plan.quantized_tokens`. Where queries see the last `span` tokens
    only, those before are let go by the rule of `records.plan.oldest_held`, and all positions count on.
    """

    def __init__(
        self,
        form: TensorPlan,
        window: Window,
        quantizer: Quantizer,
        heads: int,
        head_dim: int,
        kernels: Kernels = TORCH,
        span: int | None = None,
    ) -> None:
        self.form = form
        self.window = window
        self.span = span
        self.oldest = 0
        """Position of the first token held: how many were let go."""
        self.kernels = kernels
        self.sinks = FullTokens()
        self.codes = CodeTokens(form, quantizer, heads, head_dim, kernels)
        self.recent = FullTokens()
        self._addresses = Addresses()

    @property
    def held(self) -> int:
        """Tokens of one sequence that are held."""
        return self.sinks.tokens + self.codes.tokens + self.recent.tokens

    @property
    def tokens(self) -> int:
        """Tokens of one sequence that were added, those let go included."""
        return self.oldest + self.held

    @property
    def _sink_tokens(self) -> int:
        """How many of the first tokens are kept apart; of a tensor of 16 bits none are."""
        return 0 if self.form.is_full else self.window.sink_tokens

    @property
    def _behind_sinks(self) -> int:
        """Tokens behind the sinks that are codes or were let go: where, counted from the sinks, `recent` begins."""
        return max(0, self.tokens - self.recent.tokens - self._sink_tokens)

    def append(self, x_BHTD: Tensor) -> None:
        """Add tokens in full precision; nothing is quantized before `settle`."""
        sinks, recent = self._split(x_BHTD)
        self.sinks.append(sinks)
        self.recent.append(recent)

    def settle(self, tokens: int | None = None) -> None:
        """Let go what no query sees again, and quantize what the window has left behind.

        tokens: how many there would be, where fewer than were added are to count.
        """
        tokens = self.tokens if tokens is None else max(0, tokens)
        self._let_go(self._oldest_at(tokens))
        due = self._rule(tokens) - self._behind_sinks
        if due > 0:
            self.codes.append(self.recent.pop_front(due))

    def _let_go(self, oldest: int) -> None:
        """Forget the tokens before a position; not quantized first, if they were not yet."""
        if oldest <= self.oldest:
            return
        for part in (self.sinks, self.codes, self.recent):
            going = min(oldest - self.oldest, part.tokens)
            part.let_go(going)
            self.oldest += going

    def stored(self, new_BHTD: Tensor) -> StoredTensor:
        """Return what a query reads, in blocks: everything held, and the new tokens behind it."""
        sinks, recent = self._split(new_BHTD)
        tokens = self.held + new_BHTD.shape[2]
        return self._as_stored(self.sinks.blocks_with(sinks), self.recent.blocks_with(recent), tokens)

    def append_and_store(self, new_BHTD: Tensor) -> StoredTensor:
        """Add tokens, and return what their query reads: before `settle` rounds any of it."""
        self.append(new_BHTD)
        return self._as_stored(self.sinks.blocks, self.recent.blocks, self.held)

    def read(self, new_BHTD: Tensor) -> Tensor:
        """Return what queries read, unpacked: (B, H, tokens + new, D), of a span the first of them sees all.

        Of a span there are span - 1 tokens before the new ones at most, as transformers' masks have it.
        """
        blocks = [*self.recent.blocks, new_BHTD]  # not appended: nothing is copied, and a gradient passes
        stored = self._as_stored(self.sinks.blocks, blocks, self.held + new_BHTD.shape[2])
        tokens = restored(stored, self.kernels.unpack_tokens)
        if self.span is not None and self.held >= self.span:
            tokens = tokens[:, :, self.held - self.span + 1 :]
        return tokens

    def _split(self, x_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens that are sinks, and the others."""
        room = max(0, self._sink_tokens - self.tokens)
        return x_BHTD[:, :, :room], x_BHTD[:, :, room:]

    def _as_stored(self, sinks: list[Tensor], recent: list[Tensor], tokens: int) -> StoredTensor:
        B, H, _, D = (recent or sinks)[-1].shape
        return StoredTensor(
            self.form,
            self.codes.quantizer,
            tuple(sinks),
            tuple(self.codes.blocks),
            tuple(recent),
            (B, H, tokens, D),
            self._addresses,
        )

    def check_crop(self, tokens: int) -> None:
        """Raise CacheError where keeping only so many tokens would need numbers that were rounded away."""
        if tokens and self._oldest_at(tokens) < self.oldest:
            raise CacheError(
                f"the cache cannot go back from {self.tokens} to {tokens} tokens: a layer of a sliding window has let "
                "go what it held then.\n"
                "  Call cache.activate_past_recording() before the tokens that may be taken back; nothing was changed."
            )
        kept = min(self._behind_sinks, max(0, tokens - self._sink_tokens)) if self.codes.tokens else 0
        if kept > self._rule(tokens):
            raise CacheError(
                f"the cache cannot go back from {self.tokens} to {tokens} tokens: of those that stay, "
                f"{kept - self._rule(tokens)} would be in full precision again, and they are quantized.\n"
                "  Tokens can be taken back that came after cache.activate_past_recording() and after the last crop; "
                "nothing was changed."
            )

    def crop(self, tokens: int) -> None:
        """Keep the oldest tokens only, as a cache that never saw the others; `check_crop` says whether that can be."""
        if tokens == 0:
            self.clear()
            return
        left = tokens - self.oldest
        for part in (self.sinks, self.codes, self.recent):
            there = part.tokens
            part.truncate(max(0, min(left, there)))
            left -= there

    def clear(self) -> None:
        """Forget every token."""
        self.sinks.blocks, self.codes.blocks, self.recent.blocks = [], [], []
        self.oldest = 0

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

        How many tokens were let go, `oldest`, is for the caller to say.

        batch, dtype: sequences held, and the dtype of what is in full precision.
        """
        codes, heads, head_dim = self.codes, self.codes.heads, self.codes.head_dim
        for name, full in (("sinks", self.sinks), ("recent", self.recent)):
            full.blocks = [tensors.pop(f"{name}.{number}") for number in range(_count(tensors, name))]
            for block in full.blocks:
                _expect(name, block, (batch, heads, block.shape[2], head_dim), dtype)
            if any(block.shape[2] != PAGE_TOKENS for block in full.blocks[1:-1]):
                raise ValueError(f"a block of {name} between others is no page of {PAGE_TOKENS} tokens")
        codes.blocks = []
        for number in range(_count(tensors, "codes")):
            packed, scale = tensors.pop(f"codes.{number}"), tensors.pop(f"scale.{number}")
            zero = None if self.form.scheme == "rotated" else tensors.pop(f"zero.{number}")
            units = scale.shape[2]
            if not 0 < units <= codes.page_units:
                raise ValueError(f"a block of {units} units, where a page takes {codes.page_units}")
            tokens, bits = units * codes.unit_tokens, self.form.bits
            if self.form.fills_bytes(head_dim):
                _expect("codes", packed, (batch, heads, tokens, packed_bytes(head_dim, bits)), torch.uint8)
            else:
                run = packed_bytes(heads * tokens * head_dim, bits)
                _expect("codes", packed, (batch, 1, 1, run), torch.uint8)
            channels = head_dim if self.form.axis == "channel" else -(-head_dim // self.form.group_size)
            for name, tensor, stored in (
                ("scale", scale, codes.quantizer.scale_dtype),
                ("zero", zero, codes.quantizer.zero_dtype),
            ):
                if tensor is not None:
                    _expect(name, tensor, (batch, heads, units, channels), getattr(torch, stored))
            codes.blocks.append(CodeBlock(packed, scale, zero))
        whole = codes.blocks[:-1] if self.span is None else codes.blocks[1:-1]
        if any(block.units != codes.page_units for block in whole):
            raise ValueError("a page before the last is not full")
        if tensors:
            raise ValueError(f"{next(iter(tensors))} belongs to no cache of this form")

    def _oldest_at(self, tokens: int) -> int:
        return oldest_held(self.form, self.window, self.span, tokens, self.codes.head_dim)

    def _rule(self, tokens: int) -> int:
        return quantized_tokens(self.form, self.window, tokens, self.form.recent_fraction)


def _count(tensors: dict[str, Tensor], name: str) -> int:
    return sum(key.startswith(f"{name}.") for key in tensors)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype} of {tuple(tensor.shape)}, expected {dtype} of {shape}")
