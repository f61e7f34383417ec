"""What will a run of this model take? Memory, time and disk, reckoned from its config before a weight is loaded.

Reads a config's module tree and asks the device how fast it multiplies. Estimates: the end of a run says beside them
what it took.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PretrainedConfig

from kvprof.models.config import check_dtype, dtype_of
from kvprof.models.decoder import query_heads
from kvprof.models.execution.activation_offload import HELD_BYTES
from kvprof.models.inventory import take_inventory
from kvprof.models.layouts import block_stack
from kvprof.models.load import usable_device
from kvprof.models.memory import free_bytes
from kvprof.models.pinning import bytes_to_download
from kvprof.models.skeleton import Skeleton, build_skeleton
from kvprof.models.source import ModelSource
from kvprof.records.estimate import Estimate

LIBRARY_BYTES = 25 * 2**20
"""What the libraries and the allocator take beside the tensors, once they compute."""
LOGITS_AT_ONCE = 2**22
"""Logits that are compared, or asked for a loss, at a time."""
COPIES_OF_LOGITS = 6
"""What stands of those meanwhile, in float32: softmaxes, differences, gradients."""
FEWEST_POSITIONS = 16
"""Whose logits are asked for at a time, however large the vocabulary."""
SOFTMAXES_A_LOSS = 3
"""As long as which a loss over the vocabulary takes, with its gradient."""
SOFTMAXES_A_DRAW = 7
"""The same of drawing a token, whose sums are taken in float64."""
CALLS_A_MODULE = 8
"""Calls of a forward for each module without parts: masks, caches and what is computed between modules count too."""
STARTING_SECONDS = 1.0
"""For the model's code, and for the first use of each kernel."""
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

    forwards, backwards: through the whole model; with backwards, a few positions at a time go through the head.
    attentions: of a layer once more, over the queries that count, added up over layers. softmaxes: of all logits, or
    what takes as long. held: how many times the logits of all tokens stand in memory.
    """

    forwards: float
    backwards: float = 0.0
    attentions: float = 0.0
    softmaxes: float = 0.0
    held: int = 1


@dataclass(frozen=True)
class Costs:
    """What a model's parts take, in elements.

    block: of the largest block. active: that a token is multiplied with. kept: that a block's backward needs of each
    token. attention: multiplications of one layer for each pair of tokens. cached: of each token, in the cache.
    modules: those without parts.
    """

    layers: int
    hidden: int
    weights: int
    block: int
    head: int
    active: int
    kept: int
    attention: int
    cached: int
    modules: int

    @property
    def vocabulary(self) -> int:
        """Tokens that the head knows."""
        return self.head // self.hidden


def costs_of(config: PretrainedConfig) -> Costs:
    """Count a model's parts on its module tree, without any storage."""
    skeleton = build_skeleton(config)
    text = skeleton.config
    blocks = _blocks(skeleton)
    sizes = [_elements(block, 1.0) for block in blocks]
    share = _active_share(text)
    head = int(text.vocab_size) * int(text.hidden_size)
    heads = query_heads(text)
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
        cached=sum(
            layer.kv_heads * ((layer.key_head_dim or 0) + (layer.value_head_dim or 0))
            for layer in take_inventory(config).geometry.layers
        ),
        modules=sum(not list(module.children()) for module in skeleton.modules.values()),
    )


@dataclass(frozen=True)
class Run:
    """A run over sequences of these lengths.

    dtype: that the model is loaded in. device: where it computes. written: of text that the model writes itself, the
    sequences of each batch, each as long as the longest. stored: the checkpoint's own dtype.
    """

    lengths: Sequence[int]
    passes: Passes
    dtype: torch.dtype
    device: torch.device
    stream: bool
    batch_size: int
    written: Sequence[int] = ()
    stored: torch.dtype | None = None

    @property
    def computes_in(self) -> torch.dtype:
        """Gradients of a model in half precision are computed in float32 (`models.execution.upcast`)."""
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
    written: Sequence[int] = (),
) -> Estimate:
    """Return what a run over sequences of these lengths will take.

    dtype, device, stream: as `models.load.load_model` takes them. written_bytes: of its results and journals; what the
    hub brings first is added. written: as `Run` has it. Raises UsageError for an unknown dtype or device.
    """
    check_dtype(dtype)
    own, target = dtype_of(config, "auto"), usable_device(device)
    run = Run(lengths, passes, dtype_of(config, dtype), target, stream, batch_size, written, own)
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
    logits = costs.vocabulary * tokens
    held = 0 if passes.backwards else passes.held * logits * size
    working = 4 * tokens * costs.hidden * 4 + COPIES_OF_LOGITS * 4 * min(logits, LOGITS_AT_ONCE) + held
    writing = _writing_bytes(costs, run)
    if run.stream:
        memory = max(costs.block * (size + cast) + kept, costs.head * size) + min(inputs, HELD_BYTES)
        memory = max(memory + working, costs.block * size + writing)
        written_bytes += max(0, inputs - HELD_BYTES)
    else:
        # A file of the same dtype is mapped, and is the weights; one that is cast stands beside what is made of it.
        loading = costs.weights * size
        if device.type == "cpu" and run.stored is not None and run.stored != run.dtype:
            loading += costs.weights * run.stored.itemsize
        running = costs.block * cast + kept + inputs if run.goes_twice else costs.layers * kept
        memory = max(loading, costs.weights * size + max(running + working, writing))
    return Estimate(
        sequences=len(lengths),
        tokens=sum(lengths),
        memory_bytes=memory + (LIBRARY_BYTES if device.type == "cpu" else 0),
        free_bytes=free_bytes(device),
        disk_bytes=written_bytes,
        seconds=_seconds(costs, run),
        writing_seconds=_writing_seconds(costs, run) if run.written else None,
    )


def _writing_bytes(costs: Costs, run: Run) -> int:
    """Return what writing text takes beside the weights: the cache, and what tokens are drawn from."""
    rows = max(run.written, default=0)
    return rows * (costs.cached * run.dtype.itemsize * max(run.lengths) + costs.vocabulary * (4 + 4 + 8 + 8))


def _writing_seconds(costs: Costs, run: Run) -> float:
    """Return what writing text takes: for each token of a batch, one forward and one draw from each distribution."""
    seconds = 0.0
    # At each token the cache is copied to be longer by one, and spread over the query heads; on average, half of it.
    spread = costs.attention // 2 * costs.layers
    moved = (2 * costs.cached + 2 * spread) * max(run.lengths) / 2 * _seconds_a_weight(1, run.dtype, run.device)
    for rows in set(run.written):
        step = costs.active * _seconds_a_weight(rows, run.dtype, run.device)
        step += rows * moved + costs.modules * CALLS_A_MODULE * _seconds_a_call(run.device)
        step += SOFTMAXES_A_DRAW * rows * costs.vocabulary * _seconds_a_logit(run.device)
        step += costs.weights * run.dtype.itemsize / BYTES_A_SECOND if run.stream else 0
        seconds += run.written.count(rows) * max(run.lengths) * step
    return seconds


def _seconds(costs: Costs, run: Run) -> float:
    passes, tokens = run.passes, sum(run.lengths)
    rate = _multiplications_a_second(run.computes_in, run.device)
    once = passes.forwards + passes.backwards
    through = once + (passes.backwards if run.goes_twice else 0)
    pairs = sum(length**2 for length in run.lengths)
    products = 2 * (costs.active - costs.head) * tokens * through
    attended = costs.attention * pairs * (costs.layers * (passes.forwards + 2 * passes.backwards) + passes.attentions)
    seconds = attended / (ATTENTION_EFFICIENCY * rate)
    if passes.backwards:  # the head is read for a few positions at a time
        positions = max(FEWEST_POSITIONS, LOGITS_AT_ONCE // costs.vocabulary)
        parts = sum(-(-length // positions) for length in run.lengths)
        positions = min(positions, max(run.lengths))
        seconds += costs.head * parts * once * _seconds_a_weight(positions, run.computes_in, run.device)
    else:
        products += 2 * costs.head * tokens * once
    seconds += products / (EFFICIENCY * rate)
    softmaxes = passes.softmaxes + SOFTMAXES_A_LOSS * passes.backwards
    seconds += tokens * costs.vocabulary * softmaxes * _seconds_a_logit(run.device)
    batches = -(-len(run.lengths) // run.batch_size)
    seconds += costs.modules * CALLS_A_MODULE * batches * through * _seconds_a_call(run.device)
    loads = batches * through if run.stream else 1
    return STARTING_SECONDS + seconds + costs.weights * run.dtype.itemsize * loads / BYTES_A_SECOND


def _multiplications_a_second(dtype: torch.dtype, device: torch.device) -> float:
    """Multiply two matrices for a twentieth of a second; return the floating-point operations that one has."""
    size = 1024
    one = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _usual_seconds(lambda: linear(one, one))


def _seconds_a_weight(rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return how long each weight of a large matrix takes, of a product with few rows: most of it is reading."""
    weight = torch.ones(2**14, 2**10, dtype=dtype, device=device)
    few = torch.ones(rows, 2**10, dtype=dtype, device=device)
    return _usual_seconds(lambda: linear(few, weight)) / weight.numel()


def _seconds_a_logit(device: torch.device) -> float:
    """Return how long each number of a softmax takes."""
    logits = torch.ones(2**5, 2**15, device=device)
    return _usual_seconds(lambda: logits.log_softmax(-1)) / logits.numel()


def _seconds_a_call(device: torch.device) -> float:
    """Return how long a module takes that has next to nothing to compute."""
    module, one = nn.Linear(8, 8, device=device), torch.ones(1, 8, device=device)
    calls = 100

    def several() -> torch.Tensor:
        for _ in range(calls):
            found: torch.Tensor = module(one)
        return found

    with torch.no_grad():
        return _usual_seconds(several) / calls


def _usual_seconds(compute: Callable[[], torch.Tensor]) -> float:
    """Compute again and again for a twentieth of a second; return the median time.

    Not the best: what shares the machine now will share it with the run.
    """
    compute().flatten()[0].item()
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < 0.05 or len(times) < 3:
        before = time.perf_counter()
        compute().flatten()[0].item()  # waits for the device
        times.append(time.perf_counter() - before)
    return median(times)


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
