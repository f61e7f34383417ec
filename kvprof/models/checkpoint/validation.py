"""What must hold of a model's files before any library opens them: only safetensors and GGUF, only within the folder.

Reads config.json, an index of shards and the headers of safetensors and GGUF files; never a weight. transformers would
take a pickle where it finds one, follow an index out of the folder, and build as many layers as a config asks for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import PretrainedConfig

from kvprof.errors import ModelError, first_line
from kvprof.models.checkpoint.gguf_header import MOST_LAYERS
from kvprof.models.checkpoint.gguf_model import open_gguf
from kvprof.models.checkpoint.hub import refuse_pickles
from kvprof.models.checkpoint.shards import (
    FLOATS,
    LENGTH_BYTES,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    Shards,
    StoredTensor,
    find_shards,
    header_bytes,
    parse_header,
    quantized,
    read_index,
)
from kvprof.models.own_code import read_object, read_value

LARGEST_CONFIG_BYTES = 2**24
ADAPTER = "adapter_config.json"
_LONGEST_NAME = 300

_COUNTS = re.compile(r"(^n_|^num_|_)(layers?|experts|blocks)$|^depth$")


def check_config(place: Path) -> None:
    """Raise ModelError for a config that asks for more than there can be, or for code of somebody else's.

    place: a folder with config.json, or a .gguf file.
    """
    if place.is_file():
        open_gguf(place)
        return
    file = place / "config.json"
    if file.is_file() and file.stat().st_size > LARGEST_CONFIG_BYTES:
        raise ModelError(f"{file}: no config has more than {LARGEST_CONFIG_BYTES} bytes.")
    config = _read_config(file)
    _check_dtype(file, config)
    for table in _tables(config):
        for name, value in table.items():
            if _COUNTS.search(name) and type(value) is int and value > MOST_LAYERS:
                raise ModelError(f"{file}: {name} is {value}; no model has more than {MOST_LAYERS}.")
            if "attn_implementation" in name and "/" in str(value):
                raise ModelError(
                    f"{file}: {name} is {str(value)[:60]!r}, code that would be fetched from the hub.\n"
                    f"  Remove {name} from it: kvprof chooses how attention is computed."
                )
    if config.get("transformers_weights") is not None:
        raise ModelError(
            f"{file}: transformers_weights names a file of its own for the weights, "
            f"{str(config['transformers_weights'])[:60]!r}.\n"
            "  Remove it: weights are in model.safetensors, or in the shards of its index."
        )


def _read_config(file: Path) -> dict[str, object]:
    """Return what a config.json holds, nothing where it is no JSON: what loads it says why."""
    value = read_value(file)
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds {json.dumps(value):.40}, and no config: that is an object with a model_type.")
    return value


def _check_dtype(file: Path, config: Mapping[str, object]) -> None:
    """Raise ModelError for a config of a dtype that no model computes in: libraries fail on it in odd words."""
    for table in (config, config.get("text_config")):
        for name in ("dtype", "torch_dtype"):
            value = table.get(name) if isinstance(table, dict) else None
            if value is None or isinstance(value, dict):
                continue
            found = getattr(torch, str(value), None)
            if not (isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1):
                raise ModelError(
                    f"{file}: {name} is {value!r:.60}, which is no dtype that transformers loads a model in.\n"
                    f"  Write bfloat16, float16 or float32; or remove {name}, and the weights' own dtype is taken."
                )


def refuse_adapter(folder: Path, name: str) -> None:
    """Raise ModelError for a folder that holds an adapter alone, naming the model that it was trained on.

    name: what the user calls the folder.
    """
    if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{name} holds an adapter{_base(folder)} ({ADAPTER}), and no model.\n"
            "  Name that model; or merge the two, and name what is saved: "
            "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(folder)"
        )


def _base(folder: Path) -> str:
    """Return a clause with the model that an adapter is of, where its config says so."""
    config = read_object(folder / ADAPTER)
    base = config.get("base_model_name_or_path") or config.get("model")  # the latter: MLX's
    return f" of {base[:_LONGEST_NAME]}" if isinstance(base, str) and base else ""


def check_weights(folder: Path) -> Shards:
    """Return the safetensors files that a folder's weights are in.

    Raises ModelError for pickles, for an index that names anything but safetensors files of the folder, and for what is
    an adapter.
    """
    names = [file.name for file in folder.iterdir() if file.is_file()]
    refuse_pickles(names, str(folder))
    if ADAPTER in names:
        raise ModelError(
            f"{folder} holds an adapter{_base(folder)} ({ADAPTER}), which would be laid over the weights or left out, "
            "as other packages are installed.\n  Merge it first (merge_and_unload), or remove that file."
        )
    return find_shards(names, lambda: read_index(folder / SAFETENSORS_INDEX), str(folder))


def check_loadable(folder: Path, config: PretrainedConfig) -> dict[str, str]:
    """Raise ModelError for weights that transformers would not find, or would take for other numbers than they are.

    Of a checkpoint whose config says how it is quantized, transformers reads the scales too.
    Returns the dtype of every tensor, by name.
    """
    places = read_headers(folder)
    if not any((folder / name).is_file() for name in (SAFETENSORS, SAFETENSORS_INDEX)):
        raise ModelError(
            f"{folder} has neither {SAFETENSORS} nor {SAFETENSORS_INDEX}, so nobody can tell which of its files make "
            f"the model.\n  Download the index too; a single file has to be called {SAFETENSORS}."
        )
    if getattr(config, "quantization_config", None) is None:
        for name, (_, tensor) in places.items():
            if tensor.dtype not in FLOATS and name.endswith((".weight", ".bias")):
                raise quantized(name, tensor.dtype)
    return {name: tensor.dtype for name, (_, tensor) in places.items()}


def read_headers(folder: Path) -> dict[str, tuple[str, StoredTensor]]:
    """Return every tensor of a folder's safetensors by name, with the file that it is in.

    Raises ModelError as `check_weights` does, and for a file that is truncated, corrupt or not what the index says.
    """
    shards = check_weights(folder)
    return shards.places(read_header(folder, shard) for shard in shards.files)


def read_header(folder: Path, name: str) -> dict[str, StoredTensor]:
    """Return the tensors that a safetensors file names; raises ModelError where it is truncated or corrupt."""
    shard = folder / name
    try:
        file_bytes = shard.stat().st_size
        with shard.open("rb") as file:
            length = header_bytes(file.read(LENGTH_BYTES), file_bytes)
            return parse_header(file.read(length), file_bytes)
    except (ValueError, OSError) as error:
        raise ModelError(f"{shard} is truncated or corrupt: {first_line(error)}.\n  Download it again.") from None


def _tables(value: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """Yield a config and the configs in it."""
    waiting = [value]
    while waiting:
        table = waiting.pop()
        yield table
        waiting += [part for part in table.values() if isinstance(part, dict)]
