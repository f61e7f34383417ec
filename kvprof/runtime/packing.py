"""Integer codes <-> bytes: b bits cost b bits, for every b in 1, 2, 3, 4, 5, 6, 8.

A width that does not divide a byte is cut into planes that do: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2. In a plane of n bytes,
byte j holds the codes j, j + n, j + 2n ..., so that both ways run along whole rows and nothing is shuffled. Knows
neither scales nor shapes: it packs the last dimension.
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


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes that so many codes take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes (..., N), uint8 and below 2^bits, as bytes: (..., packed_bytes(N, bits)), uint8."""
    whole = codes.shape[-1] // 8 * 8  # of these, every plane fills whole bytes
    pieces = []
    for width, place in PLANES[bits]:
        part = codes[..., :whole]
        if width < bits:
            part = (part >> place).bitwise_and_(2**width - 1)
        slots = part.reshape(*part.shape[:-1], 8 // width, whole * width // 8)
        # The slots share no bit, so their sum is their union.
        pieces.append(slots[..., 0, :] if width == 8 else (slots << _shifts(width, codes)).sum(-2, dtype=torch.uint8))
    if whole < codes.shape[-1]:
        pieces.append(_pack_stream(codes[..., whole:], bits))
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes (..., count), uint8, of bytes that `pack` made."""
    whole = count // 8 * 8
    codes = torch.empty(0)  # every width has a plane
    first = 0
    for width, place in PLANES[bits]:
        last = first + whole * width // 8
        plane = packed[..., first:last]
        if width < 8:
            plane = (plane.unsqueeze(-2) >> _shifts(width, packed)).bitwise_and_(2**width - 1).flatten(-2)
        codes = plane if place == 0 else codes.bitwise_or_(plane << place)
        first = last
    if whole == count:
        return codes
    return torch.cat([codes, _unpack_stream(packed[..., first:], bits, count - whole)], dim=-1)


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


def _shifts(width: int, like: Tensor) -> Tensor:
    """Return where each slot of a plane begins in its byte, (8 / width, 1)."""
    return _range(8 // width, like).mul_(width).unsqueeze(-1)


def _range(stop: int, like: Tensor) -> Tensor:
    return torch.arange(stop, dtype=torch.uint8, device=like.device)
