"""Token by token, what a model itself would write: sampled at temperature 1 from its own distribution, in a batch.

Reads a loaded model. Its generation config is never asked, and the random numbers come from the caller, so that no
global state is read or moved. Does not know text, files, nor which tokens end a text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvprof.errors import CalibrationError, OutOfMemory, is_out_of_memory

_HALF = (torch.float16, torch.bfloat16)
_DAMAGED = "  No wider dtype would help: its weights are damaged."


def sample_documents(
    model: PreTrainedModel,
    openings: Sequence[Sequence[int]],
    limits: Sequence[int],
    numbers: Sequence[Callable[[], float]],
    ends: Collection[int] = (),
    step: Callable[[int], None] = lambda tokens: None,
) -> list[list[int]]:
    """Continue each opening until a token that ends a text, or until it is as long as its limit, all side by side.

    model: in eval mode. openings: B rows of P token ids, all of one length. limits: of each row, its tokens at most,
    the opening included. numbers: of each row, asked once for each token, uniform in [0, 1): a row's tokens follow
    from its own numbers alone, up to the rounding of a forward of so many rows. ends: the tokens that end a text. step:
    called after each forward, with the number of tokens that it added.
    Returns the openings with what follows them; the token that ends a text is kept.
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
    documents = [list(opening) for opening in openings]
    going = {row for row, limit in enumerate(limits) if len(documents[row]) < limit}
    held = list(range(len(documents)))  # the rows of a forward, ended ones too where the cache cannot drop them
    ids_BT = torch.tensor(documents, device=device)
    cache = None
    try:
        with torch.no_grad():
            while going:
                output = model(input_ids=ids_BT, **{name: cache}, **options)
                cache = getattr(output, name, None)
                if cache is None:
                    raise CalibrationError(
                        "this model keeps no cache of keys and values, and cannot write text.\n"
                        "  Leave `self` out of --data."
                    )
                draws_B = torch.tensor([numbers[row]() if row in going else 0.0 for row in held], dtype=torch.float64)
                chosen_B, finite = _choose(output.logits[:, -1, :vocabulary], draws_B)
                if not finite:
                    raise CalibrationError(_not_finite(model))
                written = len(going)
                for row, token in zip(held, chosen_B.tolist(), strict=True):
                    if row in going:
                        documents[row].append(token)
                        if token in ends or len(documents[row]) >= limits[row]:
                            going.remove(row)
                step(written)
                if going and len(going) < len(held) and _can_drop(cache):
                    kept = torch.tensor([place for place, row in enumerate(held) if row in going])
                    cache.batch_select_indices(kept)  # on the CPU: layers may lie on several devices
                    chosen_B = chosen_B[kept]
                    held = [row for row in held if row in going]
                ids_BT = chosen_B[:, None].to(device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory on {device} while the model wrote {len(limits)} sequences of {max(limits)} tokens.\n"
            "  Lower --sequence-length, or leave `self` out of --data; what is written so far is kept."
        ) from None
    return documents


def _can_drop(cache: Any) -> bool:
    """Whether all that a cache holds is keys and values of rows; a recurrent state cannot be told to drop any."""
    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
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
