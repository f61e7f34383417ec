"""The lm-evaluation-harness's tasks, answered by a model whose cache obeys a plan.

Reads a model and a plan; answers requests. A single forward with a quantized cache would read keys and values unrounded
and show no loss. So log likelihoods are computed as `kvprof evaluate` does: every token reads exactly the cache that
decoding token by token would have left it. Text is generated through the packed cache itself, after a prompt that, as
everywhere, is read as one block. Does not know tasks; how words become tokens is left to lm_eval's own `hf` model.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string
from torch import Tensor
from transformers import PreTrainedModel

from kvprof.calibration.tokens import tokenizer_explained
from kvprof.errors import UsageError, did_you_mean
from kvprof.evaluate.logits import choose_route, planned_logits
from kvprof.models.config import check_dtype, load_config
from kvprof.models.decoder import cache_argument
from kvprof.models.identity import fingerprint_of
from kvprof.models.inventory import take_inventory
from kvprof.models.load import lend, load_model, resolve, usable_device
from kvprof.models.source import loading_arguments
from kvprof.records.plan import BitPlan
from kvprof.runtime.cache import PlanCache

logger = logging.getLogger(__name__)


class HarnessModel(HFLM):  # type: ignore[misc]
    """A model for lm_eval, in full precision without a plan: then its answers are those of `--model hf`."""

    def __init__(
        self,
        pretrained: str | PreTrainedModel | None = None,
        plan: str | Path | BitPlan | None = None,
        *,
        exact: bool = False,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        tokenizer: Any = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        truncation: bool = False,
        logits_cache: bool = True,
        softmax_dtype: str | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> None:
        """Load a model, and a plan for it.

        pretrained: a hub id, a folder, a .gguf file or `demo`, by default the plan's own model; or a loaded one.
        plan: a BitPlan, or its file. exact: log likelihoods token by token through the packed cache: the same numbers,
        far slower. device: a GPU that is not there is the CPU, since lm_eval asks for one by itself. batch_size: with
        a plan sequences are computed one at a time, whatever is asked for.
        trust_remote_code: let Python code run that comes with the model, where transformers has none for it. The rest
        is what lm_eval's `hf` makes of it.
        Raises UsageError for an argument that nothing knows, Mismatch for another model's plan.
        """
        if unknown:
            known = [name for name in inspect.signature(type(self).__init__).parameters if name not in _NO_ARGUMENTS]
            name = next(iter(unknown))
            raise UsageError(f"unknown argument {name!r} in --model_args: {did_you_mean(name, known)}")
        self.plan = BitPlan.load(plan) if isinstance(plan, str | Path) else plan
        if self.plan is not None and str(batch_size) != "1":
            logger.info("batch_size %s: with a plan, sequences are computed one at a time", batch_size)
            batch_size = 1
        if isinstance(pretrained, PreTrainedModel):
            self._source = lend(pretrained, tokenizer)
        else:
            self._source = resolve(
                pretrained or (self.plan.model.id if self.plan is not None else None), bool(trust_remote_code)
            )
        self._dtype = str(dtype).removeprefix("torch.")
        check_dtype(self._dtype)
        super().__init__(
            pretrained if isinstance(pretrained, PreTrainedModel) else self._source.id,
            device=_usable(device),
            dtype=dtype,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
            tokenizer=tokenizer,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
            truncation=truncation,
            logits_cache=logits_cache,
            softmax_dtype=softmax_dtype,
            think_end_token=think_end_token,
            enable_thinking=enable_thinking,
            chat_template_args=chat_template_args,
        )
        if self.prefix_token_id is None:
            raise UsageError(
                "the tokenizer has neither a token for the beginning of a text nor for its end.\n"
                "  Give prefix_token_id=N: the token that stands before a text that has no context."
            )
        if self.plan is not None:
            self._check_fits(self.plan)
            self._route = choose_route(self.model, self.plan, [self.prefix_token_id] * 2, exact)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> HarnessModel:
        """Make the model from --model_args, which say more than options of lm_eval's that have defaults."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**options | dict(arg_dict))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> HarnessModel:
        """Make the model from --model_args as they were typed."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm_eval keeps with its results: the plan too."""
        info: dict[str, Any] = super().get_model_info()
        return info if self.plan is None else info | {"plan": self.plan.digest, "plan_recipe": self.plan.recipe}

    def _get_config(self, pretrained: str, **_: Any) -> None:
        self._config = load_config(self._source)

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **options: Any) -> None:
        """Let lm_eval load the tokenizer, from the files that kvprof has found."""
        if self._source.live is None and not tokenizer:
            place = self._source.fetch(weights=False)
            pretrained = str(place if place.is_dir() else place.parent)
            options["gguf_file"] = None if place.is_dir() else place.name
            options["trust_remote_code"] = loading_arguments(self._source, place, tokenizer=True)["trust_remote_code"]
        super()._create_tokenizer(pretrained, tokenizer, **options)

    def tok_encode(self, *arguments: Any, **options: Any) -> Any:
        """Return a text's tokens, as `--model hf` does; raises CalibrationError where the tokenizer fails."""
        with tokenizer_explained(self.tokenizer):
            return super().tok_encode(*arguments, **options)

    def tok_batch_encode(self, *arguments: Any, **options: Any) -> Any:
        """Likewise of several texts, padded."""
        with tokenizer_explained(self.tokenizer):
            return super().tok_batch_encode(*arguments, **options)

    def tok_decode(self, *arguments: Any, **options: Any) -> Any:
        """Return the text of tokens; raises CalibrationError where the tokenizer fails."""
        with tokenizer_explained(self.tokenizer):
            return super().tok_decode(*arguments, **options)

    def apply_chat_template(self, *arguments: Any, **options: Any) -> Any:
        """Return a conversation as one text; raises CalibrationError where the tokenizer fails."""
        with tokenizer_explained(self.tokenizer):
            return super().apply_chat_template(*arguments, **options)

    def _create_model(self, pretrained: str, **_: Any) -> None:
        self._model = load_model(self._source, self._dtype, str(self.device))

    def _check_fits(self, plan: BitPlan) -> None:
        geometry = take_inventory(load_config(self._source), self._source.id).geometry
        plan.check_fits(geometry)  # shapes differ without a look at the weights
        if plan.model.fingerprint is not None:
            plan.check_fits(geometry, fingerprint_of(self.model, geometry, self._source))

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return the logits after each token, (B, T, V), each token having read the plan's cache of those before."""
        if self.plan is None:
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
            return logits
        rows = [planned_logits(self.model, self.plan, ids, self._route) for ids in inps.tolist()]
        return torch.stack(rows)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Return a prompt (1, T) with its continuation, decoded through the packed cache."""
        if self.plan is not None:
            options[cache_argument(self.model)] = copy.deepcopy(self._empty_cache)
        tokens: Tensor = super()._model_generate(context, max_length, stop, **options)
        return tokens

    @property
    def _empty_cache(self) -> PlanCache:
        """A cache to copy: making one looks through the model's weights, to know that the plan is for them."""
        if not hasattr(self, "_cache"):
            assert self.plan is not None
            self._cache = PlanCache.from_plan(self.plan, self.model)
        return self._cache


_NO_ARGUMENTS = ("self", "unknown")


def _usable(device: str | None) -> str:
    """Return the device to compute on, as lm_eval writes it; raises UsageError for one that cannot be."""
    if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
        return "cuda" if torch.cuda.is_available() else "cpu"
    usable_device(device)
    return device
