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
    count = codes.shape[-1]
    whole = count // 8 * 8  # of these, every plane fills whole bytes
    packed = torch.empty(*codes.shape[:-1], packed_bytes(count, bits), dtype=torch.uint8, device=codes.device)
    first = 0
    for width, place in PLANES[bits] if whole else ():
        slots = torch.unflatten(codes[..., :whole], -1, (8 // width, -1))
        last = first + slots.shape[-1]
        if width < bits:
            slots = (slots >> place).bitwise_and_(2**width - 1)
        slots, plane = _wide(slots, packed[..., first:last])
        plane.copy_(slots[..., 0, :])
        for slot in range(1, 8 // width):
            plane.bitwise_or_(slots[..., slot, :] << slot * width)
        first = last
    if whole < count:
        packed[..., first:] = _pack_stream(codes[..., whole:], bits)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes (..., count), uint8, of bytes that `pack` made."""
    whole = count // 8 * 8
    codes = torch.empty(*packed.shape[:-1], count, dtype=torch.uint8, device=packed.device)
    first = 0
    for width, place in PLANES[bits] if whole else ():
        last = first + whole * width // 8
        slots, plane = _wide(torch.unflatten(codes[..., :whole], -1, (8 // width, -1)), packed[..., first:last])
        mask = (2**width - 1) * (0x0101010101010101 if slots.dtype == torch.int64 else 1)
        for slot in range(8 // width):
            part = plane if width == 8 else (plane >> slot * width).bitwise_and_(mask)
            if place == 0:
                slots[..., slot, :] = part
            else:
                slots[..., slot, :] |= part << place
        first = last
    if whole < count:
        codes[..., whole:] = _unpack_stream(packed[..., first:], bits, count - whole)
    return codes


def _wide(slots: Tensor, plane: Tensor) -> tuple[Tensor, Tensor]:
    """View both as numbers of 64 bits, where they can be: then eight bytes are shifted at once."""
    fits = all(
        x.shape[-1] % 8 == 0 and x.stride(-1) == 1 and not any(n % 8 for n in (*x.stride()[:-1], x.storage_offset()))
        for x in (slots, plane)
    )
    return (slots.view(torch.int64), plane.view(torch.int64)) if fits else (slots, plane)


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
