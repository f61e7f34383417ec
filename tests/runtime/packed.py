"""Histories of packed keys and values, and float64 attention to them: what the kernels are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from kvprof.records.formats import Format, format_named
from kvprof.records.plan import Quantizer, TensorPlan, Window
from kvprof.runtime.history import CodeBlock, History, StoredTensor
from kvprof.runtime.kernels.dispatch import TORCH, Kernels
from kvprof.runtime.kernels.torch_kernels import unpack_tokens
from kvprof.runtime.store import TensorStore

WINDOW = Window(sink_tokens=4, recent_tokens=10)
CODE_BITS = (1, 2, 3, 4, 5, 6, 8)


def form_of(name: str, axis: str, head_dim: int, recent_fraction: float = 0.0) -> TensorPlan:
    """The format of a name, along an axis."""
    form = format_named(name, "key" if axis == "channel" else "value", head_dim)
    return TensorPlan(**form.model_dump(), recent_fraction=recent_fraction)


def random_tokens(B: int, H: int, T: int, D: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    """Numbers as keys have them: channels of different sizes, and one that is far off."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, H, T, D, generator=generator) * (0.2 + torch.rand(D, generator=generator) * 1.5)
    x[..., D // 3] += 6.0
    return x.to(dtype).to(device)


def filled(
    form: TensorPlan,
    tokens_BHTD: Tensor,
    window: Window = WINDOW,
    quantizer: Quantizer | None = None,
    kernels: Kernels = TORCH,
) -> TensorStore:
    """A store that holds these tokens."""
    _, H, _, D = tokens_BHTD.shape
    store = TensorStore(form, window, quantizer or Quantizer(), H, D, kernels)
    store.append(tokens_BHTD)
    store.settle()
    return store


def history(
    key: TensorPlan,
    value: TensorPlan,
    B: int = 1,
    H: int = 1,
    T: int = 90,
    key_D: int = 64,
    value_D: int = 64,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    window: Window = WINDOW,
    quantizer: Quantizer | None = None,
    seed: int = 0,
) -> History:
    """What the query of token T reads."""
    stored = []
    for form, head_dim, number in ((key, key_D, 2 * seed), (value, value_D, 2 * seed + 1)):
        tokens = random_tokens(B, H, T + 1, head_dim, dtype, device, number)
        store = filled(form, tokens[:, :, :T], window, quantizer)
        stored.append(store.stored(tokens[:, :, T:]))
    return History(*stored)


def restored_64(stored: StoredTensor) -> Tensor:
    """All tokens held, (B, H, T, D), float64; what codes stand for as float32 has it."""
    B, H, T, D = stored.shape
    out = torch.empty(B, H, T, D, dtype=torch.float64, device=stored.like.device)
    first, behind = stored.sink_tokens, stored.sink_tokens + stored.coded_tokens
    codes = torch.empty(B, H, behind - first, D, device=stored.like.device)
    unpack_tokens(stored, codes)
    out[:, :, first:behind] = codes
    for start, blocks in ((0, stored.sinks), (behind, stored.recent)):
        for block in blocks:
            out[:, :, start : start + block.shape[2]] = block
            start += block.shape[2]
    return out


def attended_64(
    query: Tensor, read: History, scaling: float, mask: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """The output of attention, (B, query heads, 1, D), float64, written out."""
    keys, values = restored_64(read.key), restored_64(read.value)
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = query.double() @ keys.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(-1) @ values


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest error of a sequence and head, relative to the size of its output."""
    return float(((found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def same_block(a: CodeBlock, b: CodeBlock) -> bool:
    """Whether two blocks hold the same bits; none of a number says that it is one."""
    return len(a.tensors) == len(b.tensors) and all(
        x.dtype == y.dtype and x.shape == y.shape and bool(torch.equal(x.view(torch.uint8), y.view(torch.uint8)))
        for x, y in zip(a.tensors, b.tensors, strict=True)
    )


def every_form(head_dim: int) -> list[Format]:
    """Each width with each group size, axis and scheme that the kernels take."""
    forms = []
    for bits in CODE_BITS:
        for group in (32, 64, 128):
            clip = "mse" if group == 64 else "none"
            forms += [Format(bits=bits, group_size=group, axis=axis, clip=clip) for axis in ("channel", "token")]
        if head_dim & (head_dim - 1) == 0:
            forms.append(Format(scheme="rotated", bits=bits, group_size=head_dim, axis="token"))
    return forms
