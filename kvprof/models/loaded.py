"""A model that the caller has loaded: measured where it is, and given back as it was.

Reads a live model's config and parameters. Does not know what is measured on it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from transformers import PretrainedConfig, PreTrainedModel

from kvprof.errors import ModelError, UsageError
from kvprof.models.decoder import text_config


def live_config(model: PreTrainedModel) -> PretrainedConfig:
    """Return a loaded model's config; a copy with the model's dtype, where it was cast, or never named one."""
    config: PretrainedConfig = model.config
    if config.dtype in (model.dtype, str(model.dtype).removeprefix("torch.")):
        return config
    config = copy.deepcopy(config)
    for part in {id(part): part for part in (config, text_config(config))}.values():
        part.dtype = model.dtype
    return config


def check_loaded(model: PreTrainedModel, dtype: str, device: torch.device | None, stream: bool) -> None:
    """Raise UsageError where a loaded model is to be used in another way than it was loaded.

    dtype: `auto` is its own. device: None is where it is.
    """
    own = str(model.dtype).removeprefix("torch.")
    if any(type(module).__name__ == "QuantizedKVCache" for module in model.modules()):  # of compressed-tensors
        raise UsageError(
            "the loaded model rounds its keys and values itself, by its checkpoint's kv_cache_scheme.\n"
            "  Name its folder or hub id instead of the loaded model."
        )
    if stream:
        raise UsageError("--stream leaves weights in the checkpoint; this model has them.\n  Name its folder instead.")
    if dtype not in ("auto", own):
        raise UsageError(f"--dtype {dtype}: the model is loaded, in {own}.\n  Cast it first: model.to(torch.{dtype}).")
    places = {parameter.device for parameter in model.parameters()}
    if device is not None and not all(
        place.type == device.type and device.index in (None, place.index) for place in places
    ):
        where = ", ".join(sorted(map(str, places)))
        raise UsageError(f"--device {device}: the model is loaded, on {where}.\n  Move it first: model.to('{device}').")


def check_in_memory(model: PreTrainedModel) -> None:
    """Raise ModelError for a model some of whose weights are elsewhere, and come only while it runs."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(
                f"{name} is not in memory: the model was loaded with parts of it offloaded.\n"
                "  Name its folder or hub id instead of the loaded model."
            )


@contextlib.contextmanager
def as_found(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into eval mode, no parameter asking for a gradient; give it back as it was, whatever happens."""
    training = [module for module in model.modules() if module.training]
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True  # not train(), which would take the children along
