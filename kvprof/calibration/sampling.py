"""Token by token, what a model itself would write: sampled at temperature 1 from its own distribution, in a batch.

Reads a loaded model. Its generation config is never asked, and the random numbers come from the caller, so that no
global state is read or moved. Does not know text, files, nor what the tokens are for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvprof.errors import CalibrationError, OutOfMemory, is_out_of_memory

_HALF = (torch.float16, torch.bfloat16)
_DAMAGED = "  No wider dtype would help: its weights are damaged."


def sample_tokens(
    model: PreTrainedModel,
    first: Sequence[int],
    draws_BT: Tensor,
    step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Continue each first token by one token for each random number, all rows side by side.

    model: in eval mode. first: B token ids. draws_BT: (B, T), float64, uniform in [0, 1): a row's tokens follow from
    its own draws alone, up to the rounding of a forward of B rows. step: called after each token.
    Returns (B, 1 + T), int64, on the CPU: what stands at a token that ends a text is followed by the next text.
    Raises CalibrationError for a model that keeps no cache, or whose predictions are not finite.
    """
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":  # offloaded: accelerate moves what comes in to where it computes
        device = torch.device("cpu")
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    tokens = [torch.tensor(first, device=device)]  # each (B,)
    sound = torch.tensor(True)
    cache = None
    try:
        with torch.no_grad():
            for draws_B in draws_BT.T:
                output = model(input_ids=tokens[-1][:, None], past_key_values=cache, **options)
                cache = getattr(output, "past_key_values", None)
                if cache is None:
                    raise CalibrationError(
                        "this model keeps no cache of keys and values, and cannot write text.\n"
                        "  Leave `self` out of --data."
                    )
                chosen_B, finite = _choose(output.logits[:, -1, :vocabulary], draws_B)
                sound = sound.to(finite.device) & finite
                tokens.append(chosen_B.to(device))
                step()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        rows, steps = draws_BT.shape
        raise OutOfMemory(
            f"out of memory on {device} while the model wrote {rows} sequences of {steps + 1} tokens.\n"
            "  Lower --sequence-length, or leave `self` out of --data; what is written so far is kept."
        ) from None
    if not sound:  # asked once: each look at a GPU's tensor waits for it
        dtype = str(model.dtype).removeprefix("torch.")
        raise CalibrationError(
            f"the model cannot write text: in {dtype} its predictions are not finite.\n"
            + ("  Use --dtype float32, or leave `self` out of --data." if model.dtype in _HALF else _DAMAGED)
        )
    return torch.stack(tokens, dim=1).cpu()


def _choose(logits_BV: Tensor, draws_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens at which the distributions' cumulative sums pass the draws, (B,), and whether all is finite."""
    # The sum of 50,000 float32 numbers would shift a boundary by more than a rare token's share of it.
    widest = torch.float32 if logits_BV.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    sums_BV = torch.softmax(logits_BV.float(), dim=-1).to(widest).cumsum(dim=-1)
    totals_B = sums_BV[:, -1]
    targets_B = draws_B.to(device=sums_BV.device, dtype=widest) * totals_B
    chosen_B1 = torch.searchsorted(sums_BV, targets_B[:, None], right=True)  # never a token of probability 0
    return chosen_B1[:, 0].clamp(max=logits_BV.shape[-1] - 1), totals_B.isfinite().all()
