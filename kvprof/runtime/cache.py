"""PlanCache: the transformers cache that obeys a bit plan.

Reads a BitPlan and the model it is for; holds keys and values as the plan says, in the bytes that it promised, and
hands attention plain tensors for the length of one layer's step. Does not know scores, nor how a plan was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from kvprof.errors import CacheError
from kvprof.models.identity import live_fingerprint
from kvprof.models.inventory import take_inventory
from kvprof.models.recurrent_states import state_tensors
from kvprof.records.geometry import ELEMENT_BYTES
from kvprof.records.plan import BitPlan
from kvprof.runtime.attention.hook import hook
from kvprof.runtime.kernels.dispatch import TORCH, kernels_named
from kvprof.runtime.layers import PlannedHybridLayer, PlannedIndexedLayer, PlannedLayer, planned_layer, tokens_left
from kvprof.runtime.snapshot import Snapshot, save_layers


class PlanCache(Cache):  # type: ignore[misc]
    """A key-value cache that stores what a bit plan says.

        cache = PlanCache.from_plan(BitPlan.load("plan.json"), model)
        model.generate(**inputs, past_key_values=cache)

    A query that arrives alone reads the cache as it stands, with its own key and value unrounded; a block of queries (a
    prompt) reads the block itself unrounded. Layers that the plan skips (shared, recurrent, and those of a sliding
    window that it leaves alone) are transformers' own. Positions are those of the tensors: in a left-padded batch the
    padding counts as tokens.

    Assisted decoding verifies a block of tokens at once, and so reads some of them unrounded that decoding one by one
    would read rounded: its text is as good, and need not be the same.
    """

    def __init__(self, plan: BitPlan, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self.plan = plan
        """The plan, its geometry that of the model in the dtype that it is loaded in: so its bytes are the cache's."""

    @classmethod
    def from_plan(cls, plan: BitPlan, model: PreTrainedModel, kernels: str = "auto") -> PlanCache:
        """Return an empty cache for this model; raises Mismatch for a plan of another.

        kernels: `triton` packs with Triton's kernels and attends a lone query straight to the codes; `torch` unpacks
        the history at every step; `auto` is the first on a GPU that has Triton, else the second. With Triton's the
        model attends through kvprof from now on (`model.set_attn_implementation` takes that back), which any other
        cache bears. Raises CacheError where they cannot run.

        Reads W_k and W_v where the plan has a fingerprint to compare. For many caches of one model, `copy.deepcopy` an
        empty one. Keys and values beyond 65,504, which float16 ends at, need bfloat16 scales and zeros in the plan.
        """
        if not isinstance(plan, BitPlan):
            raise CacheError(f"a {type(plan).__name__} is no plan.\n  Give BitPlan.load(path).")
        if not hasattr(model, "config"):
            raise CacheError(f"a {type(model).__name__} is no model.\n  Give a loaded transformers model.")
        for entry in plan.layers:
            if external := [form.name for form in (entry.key, entry.value) if form.is_external]:
                raise CacheError(
                    f"layer {entry.layer} is to be stored as {external[0]}, which is another runtime's format.\n"
                    "  kvprof evaluate measures such a plan, kvprof export writes it for its runtime; a plan for this "
                    "cache is one that allocate makes without --target."
                )
        if plan.window.own_token_stored:
            raise CacheError(
                "the plan has a query read its own key and value as they are stored, as other runtimes do, and this "
                "cache gives them in full precision.\n"
                "  kvprof evaluate measures such a plan; leave out window.own_token_stored for this cache."
            )
        geometry = take_inventory(model.config).geometry.leaving(plan.reasons)
        plan.check_fits(geometry)  # shapes differ without a look at the weights
        if plan.model.fingerprint is not None:
            plan.check_fits(geometry, live_fingerprint(model, geometry))
        dtype = str(model.dtype).removeprefix("torch.")
        if dtype in ELEMENT_BYTES:
            geometry = geometry.model_copy(update={"dtype": dtype})
        plan = plan.model_copy(update={"geometry": geometry})
        chosen = kernels_named(kernels, model.device)
        packed = any(not geometry.layers[entry.layer].is_latent for entry in plan.layers)
        hooked = hook(model, chosen) if packed and chosen is not TORCH else None
        layers = list(DynamicCache(config=model.config).layers)
        layers += [DynamicLayer() for _ in range(geometry.num_layers - len(layers))]
        for entry in plan.layers:
            shape = geometry.layers[entry.layer]
            kind = PlannedIndexedLayer if shape.indexer_width else PlannedLayer
            planned = kind(plan, entry, shape, chosen, hooked)
            own = layers[entry.layer]
            if isinstance(own, LinearAttentionCacheLayerMixin):
                layers[entry.layer] = PlannedHybridLayer(planned, own.number_of_states)
            else:
                layers[entry.layer] = planned
        return cls(plan, layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new tokens to a layer, (B, H, T, D) each; return what their queries read, the new ones unrounded.

        Raises CacheError for a layer that the model has not, or what are no keys and values; nothing is added then.
        """
        if not (type(layer_idx) is int and 0 <= layer_idx < len(self.layers)):
            raise CacheError(f"there is no layer {layer_idx!r}: the cache has 0 to {len(self.layers) - 1}.")
        for states in (key_states, value_states):
            if not (isinstance(states, Tensor) and states.dim() == 4 and states.is_floating_point()):
                raise CacheError(f"layer {layer_idx} was given {_described(states)}, no (B, H, T, D) of floats.")
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return found

    def nbytes(self) -> int:
        """Return the bytes of all that is held: codes, scales, zero points, sinks, windows and recurrent states.

        Equal to `plan.bytes_at(tokens, batch)`, which counts of a sliding layer the whole window, as the last query
        read it: its oldest token transformers lets go after that step.
        """
        return cache_bytes(self)

    def save(self, path: str | Path) -> Path:
        """Write the cache to a .safetensors file, whole or not at all: the plan, every token, every state."""
        return save_layers(self.plan, self.layers, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel, kernels: str = "auto") -> PlanCache:
        """Read a cache that `save` wrote, to go on where it was; kernels: as `from_plan` takes them.

        Raises InvalidFile for a file that is none or is damaged, Mismatch for one of another model or dtype.
        """
        snapshot = Snapshot.read(Path(path))
        cache = cls.from_plan(snapshot.plan, model, kernels)
        snapshot.fill(cache.plan, cache.layers, model)
        return cache

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, by a negative number, of every layer; a positive one is the length to keep.

        The cache is then what it would be had it never seen them. Raises CacheError where numbers would be needed that
        were rounded away, or that transformers' own layers let go; nothing is changed then. Of the tokens that came
        after `activate_past_recording` and after the last crop, the last RECORDED_TOKENS can always be taken back, but
        not from a recurrent state.
        """
        if type(tokens_to_remove) is not int:
            raise CacheError(f"{tokens_to_remove!r} is no number of tokens.")
        held = self.get_seq_length()
        left = tokens_left(held, tokens_to_remove)
        if left < held:
            _check_states(self.layers)  # first: recording a past, which other layers ask for, would not help
        for layer in self.layers:
            if (planned := planned_layer(layer)) is not None:
                planned.check_crop(left - held)
            if left < held:
                _check_own_crop(layer, held, left)
        for layer in self.layers:
            # A layer of transformers' that records nothing has nothing to drop either, and refuses to be asked.
            if left < held or getattr(layer, "record_past", True):
                layer.crop(left - held)

    def reset(self) -> None:
        """Forget every token, every state, and that a past was to be recorded: any batch may come next."""
        super().reset()
        for layer in self.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False
            if isinstance(layer, LinearAttentionCacheLayerMixin):  # a state was only zeroed, and is of the old batch
                for states in (layer.conv_states, layer.recurrent_states):
                    states.update(dict.fromkeys(states))
                for initialized in (layer.is_conv_states_initialized, layer.is_recurrent_states_initialized):
                    initialized.update(dict.fromkeys(initialized, False))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, next to each other; raises CacheError for less than once."""
        if type(repeats) is not int or repeats < 1:
            raise CacheError(f"a sequence cannot be repeated {repeats!r} times.\n  reset() empties the cache.")
        self._change_batch(
            lambda layer: layer.batch_repeat_interleave(repeats), lambda x: x.repeat_interleave(repeats, 0)
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these indices, in their order; raises CacheError for one that is not there."""
        self._check_sequences(indices)
        self._change_batch(lambda layer: layer.batch_select_indices(indices), lambda x: x[indices])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i go on with the past of sequence beam_idx[i]; raises CacheError for one that is not there."""
        self._check_sequences(beam_idx)
        super().reorder_cache(beam_idx)

    def _check_sequences(self, indices: Tensor) -> None:
        """Raise CacheError, before anything is changed, for what are no indices of sequences that are held.

        On a GPU, which would have to be waited for, their range is left to it.
        """
        if not isinstance(indices, Tensor) or indices.dtype.is_floating_point or indices.dtype.is_complex:
            raise CacheError(f"{_described(indices)} names no sequences.\n  Give a tensor of whole numbers.")
        planned = (planned_layer(layer) for layer in self.layers)
        size = next((layer.batch for layer in planned if layer is not None and layer.is_initialized), None)
        if size is None or indices.device.type != "cpu" or indices.dtype == torch.bool or not indices.numel():
            return
        if indices.min() < -size or indices.max() >= size:
            raise CacheError(f"there is no sequence {int(indices.max())}: the cache holds {size}, from 0.")

    def _change_batch(self, change_layer: Callable[[Any], None], change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):  # transformers changes no batch of theirs
                for states in (layer.conv_states, layer.recurrent_states):
                    states.update({index: change(x) for index, x in states.items() if x is not None})
            if hasattr(layer, "batch_select_indices"):
                change_layer(layer)


def _described(given: object) -> str:
    if isinstance(given, Tensor):
        return f"{str(given.dtype).removeprefix('torch.')} of {tuple(given.shape)}"
    return f"a {type(given).__name__}"


def cache_bytes(cache: Cache) -> int:
    """Return the bytes that any cache of transformers' holds, counted as `PlanCache.nbytes`."""
    return sum(_held_bytes(layer) + _state_bytes(layer) for layer in cache.layers)


def _state_bytes(layer: Any) -> int:
    states = state_tensors(layer) if isinstance(layer, LinearAttentionCacheLayerMixin) else []
    return sum(state.numel() * state.element_size() for state in states)


def _held_bytes(layer: Any) -> int:
    planned = planned_layer(layer)
    if planned is not None:
        return sum(tensor.numel() * tensor.element_size() for tensor in planned.tensors())
    parts = (getattr(layer, name, None) for name in ("keys", "values", "indexer_keys"))
    held = [x for x in parts if x is not None and x.numel()]
    if isinstance(layer, DynamicSlidingWindowLayer):
        read = min(layer.get_seq_length(), layer.sliding_window)
        return sum(x.numel() // x.shape[2] * read * x.element_size() for x in held)
    return sum(x.numel() * x.element_size() for x in held)


def _check_states(layers: Iterable[Any]) -> None:
    """Raise CacheError where a layer has a recurrent state, which holds no past."""
    mixed = (layer for layer in layers if isinstance(layer, LinearAttentionCacheLayerMixin))
    if any(any(layer.is_recurrent_states_initialized.values()) for layer in mixed):
        raise CacheError("the cache has layers with a recurrent state, which cannot go back; nothing was changed.")


def _check_own_crop(layer: Any, held: int, left: int) -> None:
    """Raise CacheError where transformers' part of a layer has let go what it needs to go back to fewer tokens."""
    sizes: list[tuple[int, int]] = []  # tokens that are there, and that every step needs
    if isinstance(layer, DynamicSlidingWindowLayer) and held >= layer.sliding_window:
        sizes.append((layer.keys.shape[-2], layer.sliding_window - 1))
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for number, state in layer.conv_states.items():
            if state is not None:
                sizes.append((state.shape[-1], layer.conv_kernel_size[number]))
    for there, needed in sizes:
        if not layer.record_past or there - (held - left) < min(left, needed):
            raise CacheError(
                f"the cache cannot go back from {held} to {left} tokens: it has layers of a sliding window, or of a "
                "state, which have let go what they held then.\n"
                "  Call cache.activate_past_recording() before the tokens that may be taken back; nothing was changed."
            )
