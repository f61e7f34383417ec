"""One prompt continued twice, in full precision and as a plan says: what a reader would notice.

Reads a model and a plan; writes nothing. Shows a difference, and measures only bytes: how much worse a plan is on
average is the evaluation's question.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel, StoppingCriteria

from kvprof.calibration.tokens import tokenizer_explained
from kvprof.errors import UsageError
from kvprof.models.config import load_config
from kvprof.models.decoder import cache_argument
from kvprof.models.inventory import position_limit
from kvprof.models.load import load_model, load_tokenizer
from kvprof.models.memory import memory_explained
from kvprof.models.source import ModelSource
from kvprof.records.plan import BitPlan
from kvprof.records.replies import Continuation, Continuations
from kvprof.records.requests.check import GenerateRequest
from kvprof.runtime.cache import PlanCache, cache_bytes

LEAST_TEMPERATURE = 1e-3
"""Below it, logits divided by the temperature leave float16's range; 0 says what is meant."""


def compare_continuations(
    source: ModelSource,
    plan: BitPlan,
    prompt: str,
    request: GenerateRequest,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Continuations:
    """Continue a prompt with the full cache and with the plan's, by the same model, from the same seed.

    progress: called with (new tokens done, new tokens in all), of both together.
    Raises UsageError for a prompt that is empty or too long, CalibrationError for a tokenizer that fails on it,
    Mismatch for another model's plan.
    """
    if request.temperature and not LEAST_TEMPERATURE <= request.temperature < math.inf:
        raise UsageError(
            f"--temperature {request.temperature}: 0, or a finite number of at least {LEAST_TEMPERATURE}, is needed."
        )
    if any("\ud800" <= mark <= "\udfff" for mark in prompt):
        raise UsageError("the prompt is not text in UTF-8.")
    tokenizer = load_tokenizer(source)
    with tokenizer_explained(tokenizer):
        inputs = _tokens_of(prompt, tokenizer, request.chat)
    prompt_tokens = inputs["input_ids"].shape[1]
    limit = position_limit(load_config(source))
    if limit is not None and prompt_tokens + request.max_new_tokens > limit:
        raise UsageError(
            f"the prompt's {prompt_tokens} tokens and {request.max_new_tokens} new ones are more than the {limit} "
            "that the model was made for.\n  Shorten the prompt, or lower --max-new-tokens."
        )
    model = load_model(source, request.dtype, request.device)
    planned_cache = PlanCache.from_plan(plan, model)  # before the long part: it refuses another model's plan
    found = []
    for turn, cache in enumerate((DynamicCache(config=model.config), planned_cache)):
        done_before = turn * request.max_new_tokens

        def tick(new: int, done_before: int = done_before) -> None:
            progress(done_before + new, 2 * request.max_new_tokens)

        tokens = _continue(model, tokenizer, inputs, cache, request, tick)
        with tokenizer_explained(tokenizer):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
        found.append(Continuation(text=text, tokens=tuple(tokens), cache_bytes=cache_bytes(cache)))
    progress(2 * request.max_new_tokens, 2 * request.max_new_tokens)
    full, planned = found
    dtype = str(model.dtype).removeprefix("torch.")
    return Continuations(prompt_tokens=prompt_tokens, dtype=dtype, full=full, planned=planned)


def _tokens_of(prompt: str, tokenizer: Any, chat: bool) -> dict[str, Any]:
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("this model's tokenizer has no chat template.\n  Leave --chat away.")
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].numel() == 0:
        raise UsageError("the prompt is empty.\n  Give a few words to go on from.")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def _continue(
    model: PreTrainedModel,
    tokenizer: Any,
    inputs: dict[str, Any],
    cache: Cache,
    request: GenerateRequest,
    tick: Callable[[int], None],
) -> list[int]:
    """Return the new tokens."""
    start = inputs["input_ids"].shape[1]
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    sampling = {"do_sample": True, "temperature": request.temperature} if request.temperature else {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=request.max_new_tokens,
        eos_token_id=end,
        pad_token_id=end[0] if isinstance(end, list) else end,
        use_cache=True,  # some configs say not to, and every step would read the prompt again
        **sampling,
    )
    device = model.get_input_embeddings().weight.device
    torch.manual_seed(request.seed)
    explained = memory_explained(
        f"out of memory on {device} with a prompt of {start} tokens.\n  Shorten it, or take --dtype bfloat16."
    )
    with explained, torch.inference_mode():
        tokens = model.generate(
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            generation_config=config,
            **{cache_argument(model): cache},
            stopping_criteria=[_Tick(lambda length: tick(length - start))],
        )
    return [int(token) for token in tokens[0, start:]]


class _Tick(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing; tells how long the text is."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.tell = tell

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.tell(input_ids.shape[1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
