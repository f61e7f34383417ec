"""What is held of one layer, as kernels are given it: full-precision tokens and packed codes, in blocks.

Names tensors and their shapes; computes nothing. Does not know layers, nor when a token is quantized.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvprof.records.plan import Quantizer, TensorPlan

PAGE_TOKENS = 512
"""A block of tokens takes no more once it has so many: then it is a page, and stays where it is."""


@dataclass(frozen=True)
class CodeBlock:
    """Quantized units that follow each other. A unit is what is quantized at once: a group of tokens, else a token.

    codes: uint8, (B, H, tokens, bytes a row), where the D codes of a token and head fill whole bytes; else (B, 1, 1,
    bytes), all of a sequence in one run.
    scale, zero: (B, H, units, S): S is D for axis `channel`, the groups a head for axis `token`; `rotated` has no zero.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    @property
    def units(self) -> int:
        """Groups of tokens (axis `channel`), or tokens, of one sequence."""
        return int(self.scale.shape[2])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that the block holds."""
        return (self.codes, self.scale) if self.zero is None else (self.codes, self.scale, self.zero)


class Addresses:
    """Where pages lie in a device's memory: told to a kernel once, for all steps until there is another page."""

    def __init__(self) -> None:
        self._last: weakref.ref[Tensor] | None = None
        self._table = torch.empty(0, 3, dtype=torch.int64)

    def of(self, blocks: Sequence[Tensor | CodeBlock], pages: int, device: torch.device) -> Tensor:
        """Return the addresses of the tensors of the first blocks, 0 for one that is not there: (pages, 3), int64.

        blocks: those of the last call and more at the end; or, where the last page is another one, any others.
        """
        last = _tensors_of(blocks[pages - 1])[0] if pages else None
        known = None if self._last is None else self._last()
        if last is not known or pages != len(self._table) or self._table.device != device:
            tensors = [_tensors_of(block) for block in blocks[:pages]]
            rows = [[tensor.data_ptr() for tensor in page] + [0] * (3 - len(page)) for page in tensors]
            self._table = torch.tensor(rows, dtype=torch.int64).view(-1, 3).to(device)
            self._last = None if last is None else weakref.ref(last)
        return self._table

    def __deepcopy__(self, memo: dict[int, Any]) -> Addresses:
        return Addresses()  # a copy's pages lie elsewhere

    def __reduce__(self) -> tuple[Any, ...]:
        return Addresses, ()


def _tensors_of(block: Tensor | CodeBlock) -> tuple[Tensor, ...]:
    return (block,) if isinstance(block, Tensor) else block.tensors


def tokens_in(blocks: Sequence[Tensor]) -> int:
    """Return the tokens in blocks of (B, H, tokens, D), of which all but the first and the last are pages."""
    inner = max(0, len(blocks) - 2)
    return inner * PAGE_TOKENS + sum(block.shape[2] for block in (*blocks[:1], *blocks[max(1, len(blocks) - 1) :]))


def units_in(blocks: Sequence[CodeBlock]) -> int:
    """Return the units in blocks of codes, of which all but the first and the last are pages of as many each."""
    inner = (len(blocks) - 2) * blocks[1].units if len(blocks) > 2 else 0
    return inner + sum(block.units for block in (*blocks[:1], *blocks[max(1, len(blocks) - 1) :]))


@dataclass(frozen=True)
class StoredTensor:
    """One layer's keys, or values, as a lone query reads them, its own at the end in full precision.

    sinks, recent: blocks of (B, H, tokens, D), before and behind the codes; of a tensor of 16 bits `recent` holds all.
    coded: pages of as many tokens each, and the rest.
    shape: (B, H, tokens in all, D).
    """

    form: TensorPlan
    quantizer: Quantizer
    sinks: tuple[Tensor, ...]
    coded: tuple[CodeBlock, ...]
    recent: tuple[Tensor, ...]
    shape: tuple[int, int, int, int]
    addresses: Addresses

    @property
    def like(self) -> Tensor:
        """Some tokens in full precision: of the dtype and on the device that all is of."""
        return (self.recent or self.sinks)[-1]

    @property
    def unit_tokens(self) -> int:
        """Tokens that are quantized at once."""
        return self.form.unit_tokens

    @property
    def sink_tokens(self) -> int:
        """Tokens before the codes."""
        return tokens_in(self.sinks)

    @property
    def coded_tokens(self) -> int:
        """Tokens in codes."""
        return units_in(self.coded) * self.unit_tokens


@dataclass(frozen=True)
class History:
    """One layer's keys and values as a lone query reads them."""

    key: StoredTensor
    value: StoredTensor
