"""Token by token, what a model itself would write: sampled at temperature 1 from its own distribution, in a batch.

Reads a loaded model. Its generation config is never asked, and the random numbers come from the caller, so that no
global state is read or moved. Does not know text, files, nor which tokens end a text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvprof.errors import CalibrationError, OutOfMemory, is_out_of_memory

TOKENS_AHEAD = 128
"""Tokens that a cache has room for each time it is moved."""

_HALF = (torch.float16, torch.bfloat16)
_DAMAGED = "  No wider dtype would help: its weights are damaged."


def sample_documents(
    model: PreTrainedModel,
    openings: Sequence[Sequence[int]],
    limits: Sequence[int],
    numbers: Sequence[Callable[[], float]],
    ends: Collection[int] = (),
    step: Callable[[int], None] = lambda tokens: None,
    texts: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue each opening until a token that ends a text, or until it is as long as its limit, all side by side.

    model: in eval mode. openings: B rows of P token ids, all of one length. limits: of each row, its tokens at most,
    the opening included. numbers: of each row, asked once for each token, uniform in [0, 1): a row's tokens follow
    from its own numbers alone, up to the rounding of a forward of so many rows. ends: the tokens that end a text. step:
    called after each forward, with the number of tokens that it added.
    texts: of each row, which text it is a document of; by default each of its own. Documents of one text follow each
    other, and a limit is of a document and all before it together: a later one may turn out to be of no use, and is
    counted once those before it have ended.
    Returns the openings with what follows them; the token that ends a text is kept. Where the cache can drop no row, of
    each text the first document alone is written, and the others come back empty.
    Raises CalibrationError for a model that keeps no cache, or whose predictions are not finite.
    """
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":  # offloaded: accelerate moves what comes in to where it computes
        device = torch.device("cpu")
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    takes = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in takes else "past_key_values"  # since transformers 5.24, and before
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in takes:
        options["logits_to_keep"] = 1
    written = _Documents([list(opening) for opening in openings], limits, texts or range(len(openings)), ends)
    held = sorted(written.going)  # the rows of a forward, ended ones too where the cache cannot drop them
    ids_BT = torch.tensor([openings[row] for row in held], device=device)
    cache = None
    try:
        with torch.no_grad():
            while written.going:
                begins = cache is None
                output = model(input_ids=ids_BT, **{name: cache}, **options)
                cache = getattr(output, name, None)
                if cache is None:
                    raise CalibrationError(
                        "this model keeps no cache of keys and values, and cannot write text.\n"
                        "  Leave `self` out of --data."
                    )
                if begins and _can_drop(cache):
                    _leave_room(cache)
                elif begins and written.leave_first():
                    held, cache = sorted(written.going), None
                    ids_BT = torch.tensor([openings[row] for row in held], device=device)
                    continue
                draws_B = torch.tensor(
                    [numbers[row]() if row in written.going else 0.0 for row in held], dtype=torch.float64
                )
                chosen_B, finite = _choose(output.logits[:, -1, :vocabulary], draws_B)
                if not finite:
                    raise CalibrationError(_not_finite(model))
                before = written.counted
                written.add(dict(zip(held, chosen_B.tolist(), strict=True)))
                step(written.counted - before)
                if written.going and len(written.going) < len(held) and _can_drop(cache):
                    kept = torch.tensor([place for place, row in enumerate(held) if row in written.going])
                    cache.batch_select_indices(kept)  # on the CPU: layers may lie on several devices
                    chosen_B = chosen_B[kept]
                    held = [row for row in held if row in written.going]
                ids_BT = chosen_B[:, None].to(device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory on {device} while the model wrote {len(set(written.texts))} sequences of {max(limits)} "
            "tokens.\n  Lower --sequence-length, or leave `self` out of --data; what is written so far is kept."
        ) from None
    return written.documents


class _Documents:
    """Documents while they are written, and which of them still go on.

    documents, limits, texts, ends: as `sample_documents` has them. counted: tokens that are known to stand in a text,
    those of each document that all before it have ended.
    """

    def __init__(
        self, documents: list[list[int]], limits: Sequence[int], texts: Sequence[int], ends: Collection[int]
    ) -> None:
        self.documents, self.limits, self.texts, self.ends = documents, limits, texts, ends
        self._ended: set[int] = set()
        self._look()

    def add(self, tokens: Mapping[int, int]) -> None:
        """Append a token to each row that goes on."""
        for row in self.going:
            self.documents[row].append(tokens[row])
            if tokens[row] in self.ends:
                self._ended.add(row)
        self._look()

    def leave_first(self) -> bool:
        """Give up all but the first document of each text; return whether there were any."""
        first = {text: row for row, text in reversed(list(enumerate(self.texts)))}
        others = set(range(len(self.documents))) - set(first.values()) - self._ended
        for row in others:
            self.documents[row] = []
        self._ended |= others
        self._look()
        return bool(others)

    def _look(self) -> None:
        """Find the rows that go on: those that no token has ended, where those before them leave room."""
        self.going: set[int] = set()
        self.counted = 0
        before: dict[int, int] = {}  # tokens of the documents of each text so far
        unended: set[int] = set()  # texts with a document that may yet grow
        for row, (document, text, limit) in enumerate(zip(self.documents, self.texts, self.limits, strict=True)):
            room = limit - before.get(text, 0)
            before[text] = before.get(text, 0) + len(document)
            if text not in unended:
                self.counted += min(len(document), max(room, 0))
            if row not in self._ended:
                unended.add(text)
                if len(document) < room:
                    self.going.add(row)


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of a cache that has room for tokens to come, so that they do not move those before them.

    keys, values: views of what is filled, (B, H, T, D).
    """

    keys: Tensor
    values: Tensor
    _room: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, layer: DynamicLayer) -> _RoomyLayer:
        """Return the layer with room."""
        found = cls.__new__(cls)
        found.__dict__ = dict(vars(layer))
        return found

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put keys and values behind those before; return all, (B, H, T, D) each."""
        start, stop = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self._room is None or self._room[0].shape[2] < stop:
            self._room = _with_room(self.keys, stop), _with_room(self.values, stop)
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:stop] = states
        self.keys, self.values = (room[:, :, :stop] for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the rows; the next token makes room anew."""
        super().batch_select_indices(indices)
        self._room = None


def _with_room(states: Tensor, tokens: int) -> Tensor:
    """Return a tensor with these states, and room for others behind so many tokens."""
    rows, heads, filled, channels = states.shape
    room = states.new_empty(rows, heads, tokens + TOKENS_AHEAD, channels)
    room[:, :, :filled] = states
    return room


def _leave_room(cache: DynamicCache) -> None:
    """Give each layer that grows by copying itself room for tokens to come."""
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[place] = _RoomyLayer.of(layer)


def _can_drop(cache: Any) -> bool:
    """Whether all that a cache holds is keys and values of rows; a recurrent state cannot be told to drop any."""
    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, _RoomyLayer) for layer in cache.layers
    )


def _not_finite(model: PreTrainedModel) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    advice = "  Use --dtype float32, or leave `self` out of --data." if model.dtype in _HALF else _DAMAGED
    return f"the model cannot write text: in {dtype} its predictions are not finite.\n{advice}"


def _choose(logits_BV: Tensor, draws_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens at which the distributions' cumulative sums pass the draws, (B,), and whether all is finite."""
    # The sum of 50,000 float32 numbers would shift a boundary by more than a rare token's share of it.
    widest = torch.float32 if logits_BV.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    sums_BV = torch.softmax(logits_BV.float(), dim=-1).to(widest).cumsum(dim=-1)
    totals_B = sums_BV[:, -1]
    targets_B = draws_B.to(device=sums_BV.device, dtype=widest) * totals_B
    chosen_B1 = torch.searchsorted(sums_BV, targets_B[:, None], right=True)  # never a token of probability 0
    return chosen_B1[:, 0].clamp(max=logits_BV.shape[-1] - 1), totals_B.isfinite().all()
