"""The layers of a PlanCache that a plan gives bits to, with or without a recurrent state beside their attention.

Holds keys and values in a `TensorStore` each, and hands attention plain tensors for the length of one step. Does not
know the model, nor the other layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from kvprof.errors import CacheError, Mismatch
from kvprof.records.geometry import KVLayer
from kvprof.records.plan import AnyLayerPlan, BitPlan
from kvprof.runtime.attention.hook import Hook, Packed
from kvprof.runtime.history import History
from kvprof.runtime.kernels.dispatch import TORCH, Kernels
from kvprof.runtime.kernels.torch_kernels import restored
from kvprof.runtime.store import TensorStore

RECORDED_TOKENS = 128
"""After `activate_past_recording`, how many tokens since the last `crop` wait for the next in full precision."""


class PlannedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, each in the format that the plan gives it.

    Between two steps nothing of the history exists unpacked: `update` returns plain tensors and keeps no hold of them.
    Of a layer that slides, or attends by chunks, the tokens that no query sees again are let go.
    """

    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        plan: BitPlan,
        entry: AnyLayerPlan,
        shape: KVLayer,
        kernels: Kernels = TORCH,
        hook: Hook | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.is_sliding = shape.window is not None
        self.record_past = False
        # The GPU's kernels take a history that begins with a page, and attend to keys and values as they are stored.
        if self.is_sliding or shape.is_latent:
            kernels, hook = TORCH, None
        self.hook = hook
        heads, (window, quantizer), span = shape.kv_heads, (plan.window, plan.quantizer), shape.window
        self.key = TensorStore(entry.key, window, quantizer, heads, shape.key_head_dim, kernels, span)
        self.value = TensorStore(entry.value, window, quantizer, heads, shape.value_head_dim, kernels, span)
        self.stores = (self.key, self.value)

    @property
    def keys(self) -> Tensor | None:
        """What stands for the keys, (B, H, T, D) without storage: a model may ask whether there are any (Mllama)."""
        return self._stand_in(self.shape.key_head_dim)

    @keys.setter
    def keys(self, none: None) -> None:
        """Let transformers' constructor say that there is nothing yet."""

    @property
    def values(self) -> Tensor | None:
        """What stands for the values, as `keys` does."""
        return self._stand_in(self.shape.value_head_dim)

    @values.setter
    def values(self, none: None) -> None:
        """Do as for the keys."""

    def _stand_in(self, head_dim: int) -> Tensor | None:
        if not self.is_initialized:
            return None
        size = (self.batch, self.shape.kv_heads * self.repeats, self.get_seq_length(), head_dim)
        return torch.empty(size, dtype=self.dtype, device="meta")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn dtype, device and batch from the first keys, and how often the model repeats each of its KV heads."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch = key_states.shape[0]
        self.repeats = max(1, key_states.shape[1] // self.shape.kv_heads)
        self._check(key_states, value_states)
        for states in (key_states, value_states):  # Falcon's grouped layout caches a KV head once for each query head
            if self.repeats > 1 and not torch.equal(states, self._repeated(self._distinct(states))):
                raise Mismatch(
                    f"layer {self.shape.layer} brings {states.shape[1]} KV heads that differ, "
                    f"the plan counts {self.shape.kv_heads}."
                )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Add new tokens, (B, H, T, D) each; return what they read: all of the history, and themselves unrounded.

        Raises CacheError, or Mismatch where it is the first, for tokens of another shape than the cache's; nothing is
        added then.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        if key_states.device != self.device:  # loaded from a file, which knows no device
            self.device = key_states.device
            self.change_batch(lambda x: x.to(self.device))
        if key_states.shape[2] == 1 and self._hands_over(key_states, value_states):
            return self._hand_over(key_states, value_states)
        read = []
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            new = self._distinct(states)
            # Contiguous, as DynamicCache's are: some attention sums in an order that the layout of its keys decides.
            read.append(self._repeated(store.read(new)).contiguous())
            store.append(new.detach())
        self._settle()
        return read[0], read[1]

    def _hands_over(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether the attention that comes next reads codes where they lie. No gradient passes through them."""
        wanted = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        return self.hook is not None and self.hook.attends() and not wanted

    def _hand_over(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Add a token; return what stands for the history that its query reads: nothing is unpacked."""
        assert self.hook is not None
        history = History(
            *(
                store.append_and_store(self._distinct(states).detach())
                for store, states in zip(self.stores, (key_states, value_states), strict=True)
            )
        )
        self._settle()

        def unpack() -> tuple[Tensor, Tensor]:
            keys, values = (
                self._repeated(restored(stored, self.key.kernels.unpack_tokens))
                for stored in (history.key, history.value)
            )
            return keys, values

        return Packed(self.hook.kernels, history, unpack).hand_over(key_states, value_states)

    def _settle(self) -> None:
        for store in self.stores:
            store.settle(store.tokens - RECORDED_TOKENS if self.record_past else None)

    def history(self, key_states: Tensor, value_states: Tensor) -> History:
        """Return what the query of a token, (B, H, 1, D) each, reads; adds nothing."""
        return History(self.key.stored(self._distinct(key_states)), self.value.stored(self._distinct(value_states)))

    def get_seq_length(self) -> int:
        """Tokens of one sequence seen."""
        return self.key.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the keys that a query of this length will see, and where they begin."""
        seen = self.get_seq_length()
        read = seen if self.shape.window is None else min(seen, self.shape.window - 1)
        return read + query_length, seen - read

    def get_max_length(self) -> int:
        """Return the tokens that a query sees, -1 where there is no limit."""
        return -1 if self.shape.window is None else self.shape.window

    def activate_past_recording(self) -> None:
        """Hold tokens in full precision until `crop` says how many of them stay."""
        self.record_past = True

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise CacheError where `crop` would need numbers that were rounded away."""
        for store in self.stores:
            store.check_crop(tokens_left(self.get_seq_length(), tokens_to_remove))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, counted as `PlanCache.crop` counts; raises CacheError, changing nothing.

        The layer is then what it would be had it never seen them.
        """
        self.check_crop(tokens_to_remove)
        tokens = tokens_left(self.get_seq_length(), tokens_to_remove)
        for store in self.stores:
            store.crop(tokens)
            store.settle()

    def reset(self) -> None:
        """Forget every token, and that a past was to be recorded."""
        for store in self.stores:
            store.clear()
        self.is_initialized = self.record_past = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i go on with the past of sequence beam_idx[i]."""
        self.change_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self.change_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        self.change_batch(lambda x: x[indices])

    def change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of dimension 0 to every tensor."""
        if self.is_initialized:
            for store in self.stores:
                store.change_batch(change)
            self.batch = change(torch.empty(self.batch, 0, device=self.device)).shape[0]

    def tensors(self) -> list[Tensor]:
        """Return every tensor held."""
        return [tensor for store in self.stores for _, tensor in store.named_tensors()]

    def offload(self) -> None:
        """Refuse: a cache that is small enough stays where it is."""
        raise CacheError("a PlanCache does not offload its layers; lower the plan's bits instead.")

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        shape, layer = self.shape, self.shape.layer
        for name, states, head_dim in (
            ("keys", key_states, shape.key_head_dim),
            ("values", value_states, shape.value_head_dim),
        ):
            if states.shape[1] != shape.kv_heads * self.repeats or states.shape[3] != head_dim:
                raise Mismatch(
                    f"layer {layer} brings {name} of {states.shape[1]} heads of {states.shape[3]}, "
                    f"the plan is for {shape.kv_heads} heads of {head_dim}."
                )
            if states.shape[2] != key_states.shape[2]:
                raise CacheError(
                    f"layer {layer} brings {key_states.shape[2]} tokens of keys and {states.shape[2]} of values."
                )
            if states.shape[0] != self.batch:
                raise CacheError(
                    f"layer {layer} brings {states.shape[0]} sequences, the cache holds {self.batch}.\n"
                    "  Call cache.reset(), or cache.batch_repeat_interleave(n), first."
                )

    def _distinct(self, states: Tensor) -> Tensor:
        return states[:, :: self.repeats] if self.repeats > 1 else states

    def _repeated(self, states: Tensor) -> Tensor:
        return states.repeat_interleave(self.repeats, dim=1) if self.repeats > 1 else states


class PlannedIndexedLayer(PlannedLayer):
    """A layer whose attention reads a selection of its tokens, by keys that an indexer caches in full precision."""

    indexer_keys: Tensor | None = None
    """(B, T, indexer width); None where nothing came yet."""

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Add the indexer's keys of new tokens, (B, T, width); return those of all."""
        held = self.indexer_keys
        if held is not None:
            indexer_key_states = torch.cat([held.to(indexer_key_states.device), indexer_key_states], dim=1)
        self.indexer_keys = indexer_key_states.detach()
        return indexer_key_states

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, as `PlannedLayer` does."""
        super().crop(tokens_to_remove)
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[:, : self.get_seq_length()].clone()

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self.indexer_keys = None

    def change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of dimension 0 to every tensor."""
        super().change_batch(change)
        if self.indexer_keys is not None:
            self.indexer_keys = change(self.indexer_keys)

    def tensors(self) -> list[Tensor]:
        """Return every tensor held."""
        return super().tensors() + ([] if self.indexer_keys is None else [self.indexer_keys])


class PlannedHybridLayer(LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A layer with attention and a recurrent state side by side: the plan's keys and values, transformers' state."""

    def __init__(self, planned: PlannedLayer, number_of_states: int) -> None:
        self.planned = planned
        super().__init__(number_of_states=number_of_states)
        self.is_sliding = planned.is_sliding

    @property
    def record_past(self) -> bool:
        """Whether both parts hold what `crop` may take back."""
        return self.planned.record_past

    @record_past.setter
    def record_past(self, record: bool) -> None:
        self.planned.record_past = record

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Prepare the recurrent state, where named arguments ask for it, or the keys and values."""
        if args:
            self.planned.lazy_initialization(*args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Add new tokens as `PlannedLayer.update` does."""
        return self.planned.update(key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens of one sequence held."""
        return self.planned.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the keys that a query of this length will see, and where they begin."""
        return self.planned.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        """Return the tokens that a query sees, -1 where there is no limit."""
        return self.planned.get_max_length()

    def reset(self) -> None:
        """Forget every token and the state."""
        LinearAttentionLayer.reset(self)
        self.planned.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i go on with the past of sequence beam_idx[i]."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        self.planned.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        self.planned.crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence's keys and values; `PlanCache` repeats the states."""
        self.planned.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences' keys and values; `PlanCache` keeps the states."""
        self.planned.batch_select_indices(indices)


def planned_layer(layer: Any) -> PlannedLayer | None:
    """Return the part of a cache's layer that the plan speaks of, or None where it skips the layer."""
    return layer if isinstance(layer, PlannedLayer) else getattr(layer, "planned", None)


def tokens_left(held: int, tokens_to_remove: int) -> int:
    """Return how many of the tokens held a crop leaves."""
    return min(held, tokens_to_remove) if tokens_to_remove > 0 else max(0, held + tokens_to_remove)
