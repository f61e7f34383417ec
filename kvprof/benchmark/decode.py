"""One decoding step of a whole model, its cache filled without a prompt: how long it takes, and in how much memory.

Reads a loaded model and an empty cache; fills that with random keys and values. Returns records. Does not know plans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from kvprof.benchmark.bench import fill_tokens
from kvprof.benchmark.planned_attention import put
from kvprof.benchmark.timing import WARM_UP, time_calls
from kvprof.errors import first_line
from kvprof.models.decoder import cache_argument, text_config
from kvprof.models.load import input_device
from kvprof.models.memory import memory_explained, peak_memory, settled_bytes
from kvprof.records.benchmark import CacheName, DecodeRun
from kvprof.runtime.layers import planned_layer

WATCHED_STEPS = 2
"""Steps whose memory is watched, apart from those that are timed."""

SPARE_POSITIONS = 16
"""Rows that a table of positions may have beside those that the model was made for (OPT's has two)."""


@dataclass(frozen=True)
class DecodeSettings:
    """What is decoded: so many steps, each of a token for each of `batch` sequences of `context` tokens."""

    context: int
    batch: int
    steps: int
    seed: int

    @property
    def tokens_held(self) -> int:
        """Tokens of one sequence that are in the cache at the end."""
        return self.context + WARM_UP + self.steps + WATCHED_STEPS


def time_decode(
    model: PreTrainedModel, name: CacheName, make: Callable[[], Cache], cache_bytes: int, settings: DecodeSettings
) -> DecodeRun:
    """Return the time of a decoding step with a cache that holds a whole context, and the memory that it takes.

    make: makes the empty cache. cache_bytes: of the filled one, by count. On a GPU what the host does between two
    kernels counts where the GPU waits for it, as it does for whoever generates text.
    Raises OutOfMemory, once the cache is gone again.
    """
    device = input_device(model)
    cache: Cache | None = make()
    explained = memory_explained(f"{settings.batch} sequences of {settings.context} tokens do not fit {device}.")
    try:
        with explained, torch.inference_mode():
            ids = _token_ids(model, settings, device)
            model(input_ids=ids, use_cache=False)  # weights on a disk are in memory from here on
            before = settled_bytes(device)
            fill(cache, model, settings)

            argument = cache_argument(model)

            def step() -> None:
                model(input_ids=ids, use_cache=True, **{argument: cache})

            timing = time_calls([step], device, settings.steps, hides_host=False)
            with peak_memory(device, before) as peak:
                for _ in range(WATCHED_STEPS):
                    step()
    finally:
        cache = None  # or the frames of an error would hold it
    return DecodeRun(
        cache=name,
        batch=settings.batch,
        cache_bytes=cache_bytes,
        timing=timing,
        tokens_per_second=settings.batch / max(timing.median_seconds, 1e-9),
        peak_bytes=peak.bytes,
    )


def fill(cache: Cache, model: PreTrainedModel, settings: DecodeSettings) -> None:
    """Put a whole context into every layer of a cache that keeps keys and values, all but its first token at random.

    The model itself reads the first one, and so says what shapes its layers bring, and who attends to them. Recurrent
    states are those after one token: their size does not depend on the context.
    """
    ids = _token_ids(model, settings, input_device(model))
    model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})
    for index, layer in enumerate(cache.layers):
        planned = planned_layer(layer)
        if planned is not None:
            shape = planned.shape
            widths, dtype, device = (shape.key_head_dim, shape.value_head_dim), planned.dtype, planned.device
            heads = shape.kv_heads  # Falcon brings a KV head once for each query head; the cache holds it once
        elif isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.dim() == 4 and layer.keys.numel():
            widths, dtype, device = (layer.keys.shape[3], layer.values.shape[3]), layer.keys.dtype, layer.keys.device
            heads = layer.keys.shape[1]
        else:
            continue
        chunk = min(settings.context, fill_tokens(settings.batch * heads * max(widths), dtype))
        generator = torch.Generator(device).manual_seed(settings.seed + index)
        block = [
            torch.randn(settings.batch, heads, chunk, width, generator=generator, device=device, dtype=dtype)
            for width in widths
        ]
        for first in range(1, settings.context, chunk):
            keys, values = (part[:, :, : settings.context - first] for part in block)
            if planned is not None:
                put(planned, keys, values)
            else:
                cache.update(keys, values, index)


def lacks_positions(model: PreTrainedModel, positions: int) -> bool:
    """Whether the model looks its positions up in a table, and that has fewer than so many."""
    limit = getattr(text_config(model.config), "max_position_embeddings", None)
    if limit is None or positions <= limit:
        return False
    tokens = model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens)
    return any(limit <= table.num_embeddings <= limit + SPARE_POSITIONS for table in tables)


def why_not(error: Exception) -> str:
    """Return the reason to write down where a model cannot decode so."""
    return f"the model cannot decode from a cache without a prompt: {first_line(error)}"


def _token_ids(model: PreTrainedModel, settings: DecodeSettings, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(settings.seed)
    vocabulary = text_config(model.config).vocab_size
    return torch.randint(0, vocabulary, (settings.batch, 1), generator=generator).to(device)
