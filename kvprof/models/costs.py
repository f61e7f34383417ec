"""What will a run of this model take? Memory, time and disk, reckoned from its config before a weight is loaded.

Reads a config's module tree and asks the device how fast it multiplies. Estimates: the end of a run says beside them
what it took.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PretrainedConfig

from kvprof.models.inventory import Skeleton, build_skeleton
from kvprof.models.layouts import block_stack
from kvprof.models.load import ModelSource, check_dtype, dtype_of, usable_device
from kvprof.models.memory import free_bytes
from kvprof.models.pinning import bytes_to_download
from kvprof.models.shelf import HELD_BYTES
from kvprof.records.estimate import Estimate

LIBRARY_BYTES = 150 * 2**20
"""What the tokenizer, the text and the allocator take beside the tensors."""
HEAD_BYTES = 100 * 2**20
"""What the logits that stand at a time take, with their gradients."""
EFFICIENCY = 0.6
"""Of the speed of one large product, what a whole model attains."""
ATTENTION_EFFICIENCY = 0.35
"""The same of attention, whose softmax costs more than its products."""
BYTES_A_SECOND = 1.5e9
"""At which weights come from a disk."""

_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")


@dataclass(frozen=True)
class Passes:
    """What a run does with each sequence.

    forwards, backwards: through the whole model. attentions: of a layer once more, over the queries that count, added
    up over layers.
    """

    forwards: float
    backwards: float = 0.0
    attentions: float = 0.0


@dataclass(frozen=True)
class Costs:
    """What a model's parts take, in elements.

    block: of the largest block. active: that a token is multiplied with. kept: that a block's backward needs of each
    token. attention: multiplications of one layer for each pair of tokens.
    """

    layers: int
    hidden: int
    weights: int
    block: int
    head: int
    active: int
    kept: int
    attention: int


def costs_of(config: PretrainedConfig) -> Costs:
    """Count a model's parts on its module tree, without any storage."""
    skeleton = build_skeleton(config)
    text = skeleton.config
    blocks = _blocks(skeleton)
    sizes = [_elements(block, 1.0) for block in blocks]
    share = _active_share(text)
    head = int(text.vocab_size) * int(text.hidden_size)
    heads = int(getattr(text, "num_attention_heads", None) or 0)  # a recurrent model has none
    # Asked of the layers first: some configs have a head dimension for each, and none to give away.
    head_dims = [getattr(skeleton.attention(layer), "head_dim", None) or 0 for layer in skeleton.projections]
    head_dim = max(head_dims, default=0) or getattr(text, "head_dim", None) or text.hidden_size // max(1, heads)
    return Costs(
        layers=len(blocks),
        hidden=int(text.hidden_size),
        weights=int(_elements(skeleton.modules[""], 1.0)),
        block=int(max(sizes)),
        head=head,
        active=int(sum(_elements(block, share) for block in blocks)) + head,
        kept=max(_kept(block) for block in blocks) + 8 * int(text.hidden_size),
        attention=4 * heads * int(head_dim),
    )


@dataclass(frozen=True)
class Run:
    """A run over sequences of these lengths. dtype: that the model is loaded in. device: where it computes."""

    lengths: Sequence[int]
    passes: Passes
    dtype: torch.dtype
    device: torch.device
    stream: bool
    batch_size: int

    @property
    def computes_in(self) -> torch.dtype:
        """Gradients of a model in half precision are computed in float32 (`models.widening`)."""
        return torch.promote_types(self.dtype, torch.float32) if self.passes.backwards else self.dtype

    @property
    def goes_twice(self) -> bool:
        """Whether blocks run once more on the way back."""
        return self.stream or self.computes_in != self.dtype


def estimate_run(
    source: ModelSource,
    config: PretrainedConfig,
    lengths: Sequence[int],
    passes: Passes,
    dtype: str,
    device: str,
    stream: bool = False,
    batch_size: int = 1,
    written_bytes: int = 0,
) -> Estimate:
    """Return what a run over sequences of these lengths will take.

    dtype, device, stream: as `models.load.load_model` takes them. written_bytes: of its results and journals; what the
    hub brings first is added. Raises UsageError for an unknown dtype or device.
    """
    check_dtype(dtype)
    run = Run(lengths, passes, dtype_of(config, dtype), usable_device(device), stream, batch_size)
    return reckon(costs_of(config), run, written_bytes + bytes_to_download(source))


def reckon(costs: Costs, run: Run, written_bytes: int = 0) -> Estimate:
    """Return what a run takes of a model that costs so much."""
    lengths, passes, device = run.lengths, run.passes, run.device
    batch_size = min(run.batch_size, len(lengths))
    size, wide = run.dtype.itemsize, run.computes_in.itemsize
    tokens = batch_size * max(lengths)
    kept = costs.kept * wide * tokens if passes.backwards else 0
    inputs = costs.layers * costs.hidden * wide * tokens if passes.backwards else 0
    cast = wide if wide != size else 0  # of a block's weights, beside what they are cast from
    working = 4 * batch_size * max(lengths) * costs.hidden * 4 + HEAD_BYTES
    if run.stream:
        memory = max(costs.block * (size + cast) + kept, costs.head * size) + min(inputs, HELD_BYTES) + working
        written_bytes += max(0, inputs - HELD_BYTES)
    else:
        # While a checkpoint is loaded on a CPU, its file is in memory beside what is made of it.
        loading = costs.weights * size * (2 if device.type == "cpu" else 1)
        running = costs.block * cast + kept + inputs if run.goes_twice else costs.layers * kept
        memory = max(loading, costs.weights * size + running + working)
    return Estimate(
        sequences=len(lengths),
        tokens=sum(lengths),
        memory_bytes=memory + (LIBRARY_BYTES if device.type == "cpu" else 0),
        free_bytes=free_bytes(device),
        disk_bytes=written_bytes,
        seconds=_seconds(costs, run),
    )


def _seconds(costs: Costs, run: Run) -> float:
    passes = run.passes
    rate = _multiplications_a_second(run.computes_in, run.device)
    through = passes.forwards + passes.backwards * (2 if run.goes_twice else 1)
    pairs = sum(length**2 for length in run.lengths)
    products = 2 * costs.active * sum(run.lengths) * through
    attended = costs.attention * pairs * (costs.layers * (passes.forwards + 2 * passes.backwards) + passes.attentions)
    seconds = products / (EFFICIENCY * rate) + attended / (ATTENTION_EFFICIENCY * rate)
    loads = -(-len(run.lengths) // run.batch_size) * through if run.stream else 1
    return seconds + costs.weights * run.dtype.itemsize * loads / BYTES_A_SECOND


def _multiplications_a_second(dtype: torch.dtype, device: torch.device) -> float:
    """Multiply two matrices for a twentieth of a second; return the floating-point operations that one has."""
    size = 1024
    one = torch.ones(size, size, dtype=dtype, device=device)
    linear(one, one)
    best, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < 0.05 or not best:
        before = time.perf_counter()
        linear(one, one)[0, 0].item()  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - before))
    return best


def _blocks(skeleton: Skeleton) -> list[nn.Module]:
    """Return the blocks of the stack that the projections are in."""
    if not skeleton.projections:
        return [skeleton.modules[""]]
    return list(skeleton.modules[block_stack(skeleton.projections)].children())


def _elements(module: nn.Module, experts: float) -> float:
    """Count a module's parameters, tied ones once, those of experts by the share of them that counts."""
    found = {id(weight): (name, weight.numel()) for name, weight in module.named_parameters()}
    return sum(size * (experts if _EXPERTS.search(name) else 1.0) for name, size in found.values())


def _kept(block: nn.Module) -> int:
    """Return how many numbers of each token the way back through a block needs.

    About the longer side of each matrix: what it puts out or, of a down projection, what goes into it.
    """
    return sum(max(weight.shape) for weight in block.parameters() if weight.dim() == 2)


def _active_share(config: PretrainedConfig) -> float:
    """Return the share of a mixture's experts that a token is sent to."""
    chosen = getattr(config, "num_experts_per_tok", None)
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if chosen and (all_of_them := getattr(config, name, None)):
            return float(chosen) / float(all_of_them)
    return 1.0
