"""The cache's three operations in plain torch: pack, unpack, attend. What the GPU's kernels are measured against.

Reads and writes packed blocks; runs on every device and takes every format. Does not know layers, nor when a token is
quantized.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvprof.records.formats import Format
from kvprof.records.plan import Quantizer
from kvprof.runtime.history import CodeBlock, History, StoredTensor
from kvprof.runtime.quantization.packing import pack, unpack
from kvprof.runtime.quantization.quantizer import Encoded, decode, encode

Unpack = Callable[[StoredTensor, Tensor], None]


def pack_tokens(x_BHTD: Tensor, form: Format, quantizer: Quantizer) -> CodeBlock:
    """Quantize tokens, (B, H, T, D), T a multiple of the tokens in a unit, and pack their codes."""
    encoded = encode(x_BHTD, form, quantizer)
    zero = None if encoded.zero is None else _contiguous(encoded.zero)
    return CodeBlock(packed_rows(encoded.codes.flatten(2, 3), form), _contiguous(encoded.scale), zero)


def packed_rows(codes_BHTD: Tensor, form: Format) -> Tensor:
    """Pack codes token by token and head by head; where these fill no whole bytes, each sequence in one run."""
    if form.fills_bytes(codes_BHTD.shape[3]):
        return pack(codes_BHTD, form.bits)
    return pack(codes_BHTD.flatten(1), form.bits)[:, None, None]


def unpacked_rows(block: CodeBlock, form: Format, heads: int, head_dim: int) -> Tensor:
    """Return a block's codes, (B, H, T, D), uint8."""
    tokens = block.units * form.unit_tokens
    if form.fills_bytes(head_dim):
        return unpack(block.codes, form.bits, head_dim)
    codes = unpack(block.codes.flatten(1), form.bits, heads * tokens * head_dim)
    return codes.view(-1, heads, tokens, head_dim)


def unpack_tokens(stored: StoredTensor, out_BHTD: Tensor) -> None:
    """Write what all codes stand for into (B, H, T, D), T the tokens in codes."""
    first = 0
    _, heads, _, head_dim = out_BHTD.shape
    for block in stored.coded:
        last = first + block.units * stored.unit_tokens
        codes = unpacked_rows(block, stored.form, heads, head_dim)
        units = torch.unflatten(codes, 2, (block.units, stored.unit_tokens))
        encoded = Encoded(units, block.scale, block.zero)
        decode(encoded, stored.form, stored.quantizer, out_BHTD[:, :, first:last])
        first = last


def attend(
    query_BHqD: Tensor,
    history: History,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend with the last token's query to all that is held, unpacked for the length of the call.

    query: (B, query heads, 1, D). scaling: of the scores. mask: (B or 1, 1, 1, tokens), True where a key is read, or
    numbers to add to the scores. softcap: `c * tanh(score / c)`, taken before the mask (Gemma 2).
    Returns (B, query heads, 1, D of the values), in the query's dtype.
    """
    keys, values = (restored(stored, unpack_tokens) for stored in (history.key, history.value))
    if softcap is None:
        return scaled_dot_product_attention(query_BHqD, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True)
    groups = query_BHqD.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    scores = torch.tanh((query_BHqD @ keys.transpose(2, 3)).float() * (scaling / softcap)) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).to(values.dtype) @ values


def why_not(query_BHqD: Tensor, history: History, mask: Tensor | None) -> None:
    """Return None: it takes every query."""


def restored(stored: StoredTensor, unpack_into: Unpack) -> Tensor:
    """Return the tokens held, (B, H, T, D), those in codes as these stand for them."""
    if not stored.coded:
        full = [*stored.sinks, *stored.recent]
        return torch.cat(full, dim=2) if len(full) > 1 else full[0]
    like = stored.like
    out_BHTD = torch.empty(stored.shape, dtype=like.dtype, device=like.device)
    first = stored.sink_tokens
    behind = first + stored.coded_tokens
    unpack_into(stored, out_BHTD[:, :, first:behind])
    for start, blocks in ((0, stored.sinks), (behind, stored.recent)):
        for block in blocks:
            out_BHTD[:, :, start : start + block.shape[2]] = block
            start += block.shape[2]
    return out_BHTD


def say_once(message: str) -> None:
    """Log, once in a process, why plain torch runs where something faster could."""
    if message not in _said:
        _said.add(message)
        logging.getLogger("kvprof").warning(message)


_said: set[str] = set()


def _contiguous(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
