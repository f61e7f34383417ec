"""Where a model comes from: a hub id, a folder, a GGUF file or the demo model -> source, model, tokenizer.

Reads checkpoints and the hub. Does not know what is measured on the model.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvprof.errors import ModelError, UsageError, first_line
from kvprof.models.checkpoint.gguf_header import TOKENS
from kvprof.models.checkpoint.gguf_model import first_part, models_in, open_gguf
from kvprof.models.checkpoint.validation import check_loadable, refuse_adapter
from kvprof.models.config import DTYPES, check_dtype, load_config, weight_bytes
from kvprof.models.conversion import demo_source, gguf_folder, kept
from kvprof.models.decoder import check_reads_text
from kvprof.models.execution.activation_offload import ActivationOffload
from kvprof.models.execution.streaming import stream_weights
from kvprof.models.loaded import check_loaded
from kvprof.models.memory import free_bytes
from kvprof.models.names import DEMO, nearest_path
from kvprof.models.packages import check_packages, check_streamable, dequantizing, drop_cache_scheme
from kvprof.models.quantized.fp8 import check_scales
from kvprof.models.source import NAME_A_TOKENIZER, ModelSource, explained, from_pretrained, loading_arguments, silent

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "tekken*.json")

GPU_SHARE = 0.7
"""Of a GPU's free memory, what the weights may fill; the rest is for activations and gradients."""


def resolve(model: str | None, trust_remote_code: bool = False, tokenizer: str | None = None) -> ModelSource:
    """Find out what a MODEL argument names: nothing or `demo`, a folder, a .gguf file, else a hub id.

    trust_remote_code: whether Python code that a folder or a hub id brings may run, where transformers has none.
    tokenizer: what holds the tokenizer, named as a model is; a folder needs no config. The model itself by default.
    Raises ModelError for a path that holds no model, UsageError for a word that can be none of these.
    """
    source = _resolved(model, trust_remote_code)
    if tokenizer is None:
        return source
    return replace(source, tokenizer_source=resolve_tokenizer(tokenizer, trust_remote_code))


def resolve_tokenizer(tokenizer: str, trust_remote_code: bool = False) -> ModelSource:
    """Find out what --tokenizer names: a folder with or without a model, else whatever `resolve` knows."""
    path = Path(os.path.expanduser(tokenizer))
    if path.name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json") and path.is_file():
        path = path.parent
    if os.path.isdir(path) and has_tokenizer(path):
        return ModelSource(str(path.resolve()), "folder", path.resolve(), trusts_code=trust_remote_code)
    return _resolved(tokenizer, trust_remote_code)


def _resolved(model: str | None, trust_remote_code: bool) -> ModelSource:
    if model is None or model == DEMO:
        return demo_source()
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):  # unlike Path.is_dir, no name is too long for it
        if not (path / "config.json").is_file():
            refuse_adapter(path, str(path))
            gguf = _only_gguf(path)
            return ModelSource(str(gguf), "gguf", gguf)
        return ModelSource(str(path.resolve()), "folder", path.resolve(), trusts_code=trust_remote_code)
    if os.path.isfile(path):
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is a file, but not a .gguf one.\n  Name the folder that holds its config.json.")
        gguf = first_part(path.resolve())
        return ModelSource(str(gguf), "gguf", gguf)
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or path.suffix == ".gguf":
        raise ModelError(f"there is no model at {model}: no such folder or file.\n  {nearest_path(path)}".rstrip())
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model, re.ASCII):
        raise UsageError(f"{model!r} is neither a folder, a .gguf file nor a hub id such as org/name.")
    return ModelSource(model, "hub", hub_id=model, trusts_code=trust_remote_code)


def _only_gguf(folder: Path) -> Path:
    """Return the GGUF model of a folder that has no config.json; raises ModelError where there is none, or several."""
    found = models_in(folder)
    if len(found) == 1:
        return found[0].resolve()
    advice = "A model folder holds config.json and *.safetensors, or one GGUF model."
    if found:
        advice = f"Name one of the GGUF models in it: {', '.join(str(folder / file.name) for file in found)}"
    raise ModelError(f"the folder {folder} has no config.json.\n  {advice}")


def load_tokenizer(source: ModelSource) -> Any:
    """Load a model's tokenizer, or the one that was named instead.

    Raises UsageError for a model that was lent without one, ModelError where there is none.
    """
    if source.tokenizer_source is not None:
        return load_tokenizer(source.tokenizer_source)
    if source.live is not None:
        if source.tokenizer is None:
            raise UsageError(
                "reading text with a loaded model needs its tokenizer.\n"
                "  Give tokenizer=AutoTokenizer.from_pretrained(...)."
            )
        return source.tokenizer
    place = source.fetch(weights=False)
    _check_has_tokenizer(source, place)
    if place.is_file() and (converted := kept(source, place, "tokenizer")) is not None:
        place = converted
    arguments = loading_arguments(source, place, tokenizer=True)
    with explained(source, "tokenizer"), silent():
        tokenizer = AutoTokenizer.from_pretrained(**arguments)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(f"the tokenizer of {source.id} is a {type(tokenizer).__name__}, which is none.")
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has any of the files that tokenizers are saved in."""
    return any(next(folder.glob(pattern), None) is not None for pattern in _TOKENIZER_FILES)


def _check_has_tokenizer(source: ModelSource, place: Path) -> None:
    """Raise ModelError where a model comes without a tokenizer, saying how to name another's."""
    if place.is_dir():
        if has_tokenizer(place):
            return
        where = str(place) if source.hub_id is None else f"{source.hub_id} on the hub"
        what = "none of tokenizer.json, tokenizer.model and vocab.json is there"
    else:
        if TOKENS in open_gguf(place).fields:
            return
        where, what = str(place), f"its metadata have no {TOKENS}"
    raise ModelError(f"no tokenizer in {where}: {what}.\n  {NAME_A_TOKENIZER}")


def load_model(source: ModelSource, dtype: str = "auto", device: str = "auto", stream: bool = False) -> PreTrainedModel:
    """Load a model in eval mode, no parameter asking for a gradient.

    dtype: auto (the checkpoint's own), float32, bfloat16 or float16.
    device: auto (the first GPU; where the model does not fit it, accelerate spreads the layers over all GPUs and the
    CPU; the CPU where there is no GPU), or a torch device such as cpu, cuda:1, mps.
    stream: leave the weights in the checkpoint, and load each block when it runs (`models.execution.streaming`); auto
    is then the first GPU whatever its size.
    A model that is loaded already is returned as it is. Raises UsageError for an unknown dtype or device, or another
    than a loaded model has, ModelError for a checkpoint that cannot be loaded.
    """
    check_dtype(dtype)
    if source.live is not None:
        check_loaded(source.live, dtype, None if device == "auto" else usable_device(device), stream)
        check_reads_text(source.live)
        return source.live
    config = load_config(source)
    changed = drop_cache_scheme(config)
    check_packages(source.id, config)
    if stream:
        check_streamable(source.id, config)
    target = usable_device(device) if stream else _placement(device, config, dtype)
    place = source.fetch(weights=True)
    if place.is_file() and (converted := kept(source, place, "weights")) is not None:
        place = converted
    if place.is_dir():
        check_scales(check_loadable(place, config))
    elif len(open_gguf(place).paths) > 1:
        raise ModelError(
            f"{place.name} is one of several parts, which have to be joined first, and cannot be here: "
            f"{gguf_folder()} has no space for that, or cannot be written.\n"
            "  Name another folder in KVPROF_CACHE, or join them yourself: llama-gguf-split --merge"
        )
    elif stream:
        raise UsageError(
            "--stream reads safetensors, and this .gguf file could not be converted into them.\n"
            "  Name the folder or hub id it was made from."
        )
    spread: dict[str, Any] = {"device_map": "auto"} if target is None else {}
    if stream:
        offload = ActivationOffload()
        spread = {"device_map": {"": "disk"}, "offload_folder": offload.folder}
    arguments = loading_arguments(source, place)
    arguments |= {"quantization_config": dequantizing(config)} if place.is_dir() and dequantizing(config) else {}
    if place.is_dir():
        arguments |= {"use_safetensors": True}
    if changed or not place.is_dir():  # a GGUF file's takes long to read again
        arguments |= {"config": config}
    model = from_pretrained(source, config, arguments | spread | {"dtype": DTYPES.get(dtype, "auto")})
    with explained(source), silent():
        model = model.eval().requires_grad_(False)
        if stream:
            assert target is not None
            stream_weights(model, offload, target)
        elif target is not None:
            model = model.to(target)
    if not stream:
        check_reads_text(model)
    return model


def lend(model: PreTrainedModel, tokenizer: Any = None) -> ModelSource:
    """Return a loaded model as a source like any other: its id is where it was loaded from, else its class.

    tokenizer: loaded too, or the name of what holds it.
    """
    named = resolve_tokenizer(str(tokenizer)) if isinstance(tokenizer, str | Path) else None
    return ModelSource(
        model.name_or_path or type(model).__name__,
        "loaded",
        live=model,
        tokenizer=None if named else tokenizer,
        tokenizer_source=named,
    )


def _placement(device: str, config: PretrainedConfig, dtype: str) -> torch.device | None:
    """Return the device to load on, or None where accelerate must spread the layers over all there are."""
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        first = torch.device("cuda:0")
        return first if weight_bytes(config, dtype) <= GPU_SHARE * free_bytes(first) else None
    return usable_device(device)


def usable_device(device: str) -> torch.device:
    """Return one device: of `auto` the first GPU, else the CPU. Raises UsageError for one that is not there."""
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _unusable(device, first_line(error)) from None
    if target.type == "meta":
        raise _unusable(device, "it holds no numbers")
    return target


def _unusable(device: str, reason: str) -> UsageError:
    here = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        here.append("mps")
    advice = f"Leave out --device, or take what is here: {', '.join(here)}."
    return UsageError(f"--device {device} cannot be used here: {reason.rstrip('.')}.\n  {advice}")


def wider_dtype_advice(model: PreTrainedModel, otherwise: str) -> str:
    """Return which --dtype to try where a model's numbers are not finite, or what else is wrong with the widest."""
    advice = {
        torch.float16: "Use --dtype bfloat16 (the same range as float32) or --dtype float32.",
        torch.bfloat16: "Use --dtype float32.",
    }
    return advice.get(model.dtype, f"No wider dtype would help: {otherwise}.")


def input_device(model: PreTrainedModel) -> torch.device:
    """Return where a model wants its token ids."""
    device: torch.device = model.get_input_embeddings().weight.device
    # Of an offloaded model, accelerate moves what comes in to where it computes.
    return torch.device("cpu") if device.type == "meta" else device
