"""Integer codes <-> bytes: b bits cost b bits, for every b in 1, 2, 3, 4, 5, 6, 8.

A width that does not divide a byte is cut into planes that do: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2. In a plane the codes
stand in order, the first in the lowest bits of the first byte, so that whoever reads some of a row's bytes, a GPU's
threads too, has codes that are neighbours. Knows neither scales nor shapes: it packs the last dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLANES: dict[int, tuple[tuple[int, int], ...]] = {
    1: ((1, 0),),
    2: ((2, 0),),
    3: ((2, 0), (1, 2)),
    4: ((4, 0),),
    5: ((4, 0), (1, 4)),
    6: ((4, 0), (2, 4)),
    8: ((8, 0),),
}
"""For each width of codes, its planes: (bits of the plane, place of its lowest bit in the code)."""

_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}
"""For each width of a plane below a byte, the integer with a byte for every code that one byte holds."""


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes that so many codes take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes (..., N), uint8 and below 2^bits, as bytes: (..., packed_bytes(N, bits)), uint8."""
    whole = codes.shape[-1] // 8 * 8  # of these, every plane fills whole bytes
    if whole == 0:
        return _pack_stream(codes, bits)
    pieces = []
    for width, place in PLANES[bits]:
        part = codes[..., :whole]
        if width < bits:
            part = (part >> place).bitwise_and_(2**width - 1)
        pieces.append(part if width == 8 else _gathered(part, width))
    if whole < codes.shape[-1]:
        pieces.append(_pack_stream(codes[..., whole:], bits))
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes (..., count), uint8, of bytes that `pack` made."""
    whole = count // 8 * 8
    if whole == 0:
        return _unpack_stream(packed, bits, count)
    codes = torch.empty(0)  # every width has a plane
    first = 0
    for width, place in PLANES[bits]:
        last = first + whole * width // 8
        plane = packed[..., first:last]
        if width < 8:
            plane = _spread(plane, width)
        codes = plane if place == 0 else codes.bitwise_or_(plane.bitwise_left_shift_(place))
        first = last
    if whole == count:
        return codes
    return torch.cat([codes, _unpack_stream(packed[..., first:], bits, count - whole)], dim=-1)


def _gathered(codes: Tensor, width: int) -> Tensor:
    """Move the codes of each word, a byte apart, together into its lowest byte; return these."""
    word = codes.clone(memory_format=torch.contiguous_format).view(_WORDS[width])
    together = 1
    while together < 8 // width:
        word.bitwise_or_(word >> together * (8 - width))
        together *= 2
        word.bitwise_and_(_mask(width, together))
    return word.to(torch.uint8)


def _spread(plane: Tensor, width: int) -> Tensor:
    """Move the codes of each byte apart, to a byte each: `_gathered` the other way."""
    word = plane.to(_WORDS[width], memory_format=torch.contiguous_format)
    together = 8 // width
    while together > 1:
        together //= 2
        word.bitwise_or_(word << together * (8 - width)).bitwise_and_(_mask(width, together))
    return word.view(torch.uint8)


def _mask(width: int, together: int) -> int:
    """Return the bits of a word in which so many codes stand together at the start of every so many bytes."""
    runs = 8 // width // together
    return sum((2 ** (width * together) - 1) << 8 * together * run for run in range(runs))


def _pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Pack fewer than eight codes one bit after the other, the lowest first; the last byte may have bits to spare."""
    stream = (codes.unsqueeze(-1) >> _range(bits, codes)).bitwise_and_(1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8))
    octets = stream.reshape(*stream.shape[:-1], -1, 8)
    return (octets << _range(8, codes)).sum(-1, dtype=torch.uint8)


def _unpack_stream(packed: Tensor, bits: int, count: int) -> Tensor:
    stream = (packed.unsqueeze(-1) >> _range(8, packed)).bitwise_and_(1).flatten(-2)[..., : count * bits]
    octets = stream.reshape(*stream.shape[:-1], count, bits)
    return (octets << _range(bits, packed)).sum(-1, dtype=torch.uint8)


def _range(stop: int, like: Tensor) -> Tensor:
    return torch.arange(stop, dtype=torch.uint8, device=like.device)
