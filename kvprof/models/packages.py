"""Quantized weights in a model that transformers loads: which package that needs, and plain weights instead of codes.

Reads a config, changes a model that was just loaded. `kvprof norms` needs none of the packages.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from kvprof.errors import ModelError, UnsupportedStreaming
from kvprof.models.decoder import text_config

_MODULES: dict[str, tuple[str, ...]] = {
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "auto-round": ("auto_round",),
    "hqq": ("hqq",),
    "torchao": ("torchao",),
    "quark": ("quark",),
    "quanto": ("optimum.quanto",),
    "aqlm": ("aqlm",),
    "vptq": ("vptq",),
    "eetq": ("eetq",),
}
"""By quant_method, the modules that transformers imports."""

_PACKAGES = {"optimum.quanto": "optimum-quanto", "quark": "amd-quark"}
"""Of modules that are called otherwise than their package."""

_EXTRAS = {"compressed-tensors": "compressed-tensors", "gptq": "gptq", "awq": "gptq", "bitsandbytes": "bitsandbytes"}
"""By quant_method, kvprof's extra that brings what is needed."""


_DEQUANTIZING = {
    "compressed-tensors": "CompressedTensorsConfig",
    "fp8": "FineGrainedFP8Config",
    "mxfp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
}
"""By quant_method, transformers' settings that can ask for plain weights; on a GPU it would compute in codes."""
_STREAMED = tuple(_DEQUANTIZING)
"""Methods whose weights are dequantized while they are loaded, each by itself."""


def check_packages(model_id: str, config: PretrainedConfig) -> None:
    """Raise ModelError where a model's weights are quantized in a way that transformers cannot load, saying why.

    The package that is missing is named, with kvprof's extra for it; or that transformers does not know the method.
    """
    settings = _settings(config)
    if settings is None:
        return
    method = _method(settings)
    if method is None:
        raise ModelError(
            f"{model_id} is quantized in a way that transformers cannot load: its quantization_config names no "
            f"quant_method, as MLX's does not.\n  {_OTHERWISE}"
        )
    known = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZER_MAPPING}
    if method not in known:
        raise ModelError(f"{model_id} is quantized by {method[:60]}, which transformers cannot load.\n  {_OTHERWISE}")
    missing = [name for name in _MODULES.get(method, ()) if not _is_installed(name)]
    if missing:
        packages = " and ".join(_PACKAGES.get(name, name.replace("_", "-")) for name in missing)
        extra = _EXTRAS.get(method)
        command = f"pip install 'kvprof-bits[{extra}]'" if extra else f"pip install {packages.replace(' and ', ' ')}"
        raise ModelError(
            f"{model_id} is quantized with {method}, and loading it needs the package {packages}, which is not "
            f"installed.\n  Install it: {command}"
        )


def check_streamable(model_id: str, config: PretrainedConfig) -> None:
    """Raise UnsupportedStreaming for weights that transformers cannot leave in the checkpoint block by block."""
    settings = _settings(config)
    method = None if settings is None else _method(settings)
    if method not in (None, *_STREAMED):
        raise UnsupportedStreaming(
            f"{model_id} is quantized with {method}, whose weights cannot be loaded one block at a time.\n"
            "  Leave out --stream."
        )


def dequantizing(config: PretrainedConfig) -> Any | None:
    """Return the quantization_config that makes transformers dequantize while it loads; None where it needs none."""
    settings = _settings(config) or {}
    name = _DEQUANTIZING.get(_method(settings) or "")
    if name is None:
        return None
    # What is given here replaces what the checkpoint says of the same, so that its list is handed on.
    kept = {key: settings[key] for key in ("modules_to_not_convert", "ignored_layers") if settings.get(key)}
    return getattr(transformers, name)(dequantize=True, **(kept if "FP8" in name else {}))


def drop_cache_scheme(config: PretrainedConfig) -> bool:
    """Take out of a config how the checkpoint wants keys and values rounded; return whether it said anything of it.

    compressed-tensors rounds by its kv_cache_scheme in front of every cache, under transformers before 5.23 even where
    weights are dequantized. What kvprof compares with is a cache in full precision, and how to round is the plan's.
    """
    dropped = False
    for part in _parts(config):
        settings = getattr(part, "quantization_config", None)
        if not isinstance(settings, Mapping) or settings.get("kv_cache_scheme") is None:
            continue
        dropped = True
        if settings.get("config_groups"):
            part.quantization_config = {key: value for key, value in settings.items() if key != "kv_cache_scheme"}
        else:  # the weights are plain
            del part.quantization_config
    return dropped


def plain_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model whose linear layers have weights that gradients can be asked of, whatever was loaded.

    Raises ModelError for a layer of codes that nobody can dequantize.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return model
    if _method(dict(quantizer.quantization_config.to_dict())) == "bitsandbytes":
        model = model.dequantize(dtype=model.dtype)
    for name, module in list(model.named_modules()):
        if callable(dequantize := getattr(module, "dequantize_weight", None)):  # of GPTQModel, (in, out)
            model.set_submodule(name, _linear(dequantize().T.to(model.dtype), getattr(module, "bias", None)))
        elif "weight_packed" in dict(module.named_parameters(recurse=False)) or hasattr(module, "qweight"):
            raise ModelError(
                f"{name} is a {type(module).__name__}, whose codes cannot be made weights again.\n  {_OTHERWISE}"
            )
    return model


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer with this weight, (out_features, in_features)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return layer


_OTHERWISE = "Name the checkpoint that it was quantized from; kvprof norms reads the weights of many such formats."


def _settings(config: PretrainedConfig) -> Mapping[str, Any] | None:
    """Return what a config says of its quantization; None where it says nothing."""
    for part in _parts(config):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            return found if isinstance(found, Mapping) else dict(found.to_dict())
    return None


def _parts(config: PretrainedConfig) -> tuple[PretrainedConfig, PretrainedConfig]:
    """Return where a config may say how weights are quantized: itself and that of its decoder, often the same."""
    return config, text_config(config)


def _method(settings: Mapping[str, Any]) -> str | None:
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    found = settings.get("quant_method")
    return None if found is None else str(getattr(found, "value", found))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package that it would be in
        return False
