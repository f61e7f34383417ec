"""Pack and unpack through Triton's kernels; what they do not take is left to `torch_kernels`.

Reads and writes packed blocks on a GPU, or under Triton's interpreter on the CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvprof.records.formats import Format
from kvprof.records.plan import Quantizer
from kvprof.runtime.history import CodeBlock, StoredTensor
from kvprof.runtime.kernels import torch_kernels
from kvprof.runtime.kernels.triton_kernels import packing_kernels
from kvprof.runtime.kernels.triton_kernels.forms import (
    Pages,
    ceil_div,
    next_power,
    on_device_of,
    page_tokens,
    refusal,
    rotated_tables,
    scheme_of,
)
from kvprof.runtime.quantization.packing import packed_bytes
from kvprof.runtime.quantization.quantizer import CLIP_FRACTIONS, largest_scale


def pack_tokens(x_BHTD: Tensor, form: Format, quantizer: Quantizer) -> CodeBlock:
    """Quantize tokens, (B, H, T, D), T a multiple of the tokens in a unit, and pack their codes."""
    B, H, T, D = x_BHTD.shape
    if refusal(form, D, x_BHTD.dtype):
        return torch_kernels.pack_tokens(x_BHTD, form, quantizer)
    x_BHTD = x_BHTD if x_BHTD.stride(3) == 1 else x_BHTD.contiguous()

    def empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(B, H, rows, columns, dtype=dtype, device=x_BHTD.device)

    scale_dtype, zero_dtype = (getattr(torch, name) for name in (quantizer.scale_dtype, quantizer.zero_dtype))
    codes = empty(T, packed_bytes(D, form.bits), torch.uint8)
    shape = (T, H, *x_BHTD.stride()[:3])
    with on_device_of(x_BHTD):
        if form.scheme == "rotated":
            scale, zero, rows = empty(T, 1, scale_dtype), None, max(1, 512 // D)
            signs, edges, _ = rotated_tables(form.bits, D, quantizer.rotation_seed, x_BHTD.device)
            packing_kernels.pack_rotated[B * H, ceil_div(T, rows)](
                x_BHTD,
                signs,
                edges,
                codes,
                scale,
                *shape,
                ROOT_D=math.sqrt(D),
                LOG_D=D.bit_length() - 1,
                BITS=form.bits,
                SCALE_MAX=largest_scale(form, quantizer.scale_dtype),
                ROWS=rows,
                enable_fp_fusion=False,
            )
            return CodeBlock(codes, scale, zero)
        group, by_channel = form.group_size, form.axis == "channel"
        if by_channel:
            units, channels, rows, columns = T // group, D, next_power(group), min(32, next_power(D))
            grid = (B * H, units)
        else:
            group = min(group, D)
            units, channels, rows, columns = T, ceil_div(D, group), 16, next_power(group)
            grid = (B * H, ceil_div(T, rows))
        scale, zero = empty(units, channels, scale_dtype), empty(units, channels, zero_dtype)
        packing_kernels.pack_groups[grid](
            x_BHTD,
            codes,
            scale,
            zero,
            *shape,
            D=D,
            ALL=next_power(D),
            GROUP=group,
            BY_CHANNEL=by_channel,
            BITS=form.bits,
            FRACTIONS=CLIP_FRACTIONS[1:] if form.clip == "mse" else (),
            SCALE_MAX=largest_scale(form, quantizer.scale_dtype),
            ZERO_MAX=torch.finfo(zero_dtype).max,
            ROWS=rows,
            COLUMNS=columns,
            enable_fp_fusion=False,
        )
    return CodeBlock(codes, scale, zero)


def unpack_tokens(stored: StoredTensor, out_BHTD: Tensor) -> None:
    """Write what all codes stand for into (B, H, T, D), T the tokens in codes."""
    B, H, T, D = out_BHTD.shape
    if refusal(stored.form, D, out_BHTD.dtype) or out_BHTD.stride(3) != 1:
        torch_kernels.unpack_tokens(stored, out_BHTD)
        return
    form, page = stored.form, page_tokens(stored.form)
    rows = 32
    rotated = form.scheme == "rotated"
    signs, _, levels = rotated_tables(form.bits, D, stored.quantizer.rotation_seed, out_BHTD.device, rotated)
    wide = D if rotated or form.axis == "channel" else min(form.group_size, D)
    with on_device_of(out_BHTD):
        pages = Pages(stored, out_BHTD.device)
        full, rest = divmod(T, page)
        packing_kernels.unpack_rows[B * H, full * ceil_div(page, rows) + ceil_div(rest, rows)](
            *pages.arguments,
            signs,
            levels,
            out_BHTD,
            H,
            *out_BHTD.stride()[:3],
            SCHEME=scheme_of(form),
            BITS=form.bits,
            GROUP=form.group_size,
            D=D,
            LOG_D=D.bit_length() - 1,
            ROOT_D=math.sqrt(D),
            PAGE=page,
            N=rows,
            WIDE=wide,
            PADDED=next_power(wide),
            OUT_MAX=torch.finfo(out_BHTD.dtype).max,
            enable_fp_fusion=False,
        )
