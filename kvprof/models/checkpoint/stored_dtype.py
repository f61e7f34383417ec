"""The dtype of a checkpoint's weights, for a config that names none: that of its first plain tensor.

Reads the header of the first safetensors file, on the disk or on the hub; never a weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch

from kvprof.errors import ModelError
from kvprof.models.checkpoint.hub import find_on_hub
from kvprof.models.checkpoint.remote import RemoteCheckpoint, shards_on_hub
from kvprof.models.checkpoint.shards import FLOATS, Shards
from kvprof.models.checkpoint.validation import check_weights, read_header


def stored_dtype(folder: Path, hub_id: str | None = None) -> torch.dtype | None:
    """Return the dtype that transformers takes a checkpoint to have whose config names none; None where none is found.

    folder: of the config. hub_id: of the repository to ask where the folder has no weights. The rule is
    `get_state_dict_dtype` of transformers: the first tensor, by name, of the first file that is of a plain float dtype.
    """
    with contextlib.suppress(ModelError):  # who reads the weights says what is wrong with them
        header = read_header(folder, check_weights(folder).files[0])
        return _first_float({name: tensor.dtype for name, tensor in header.items()})
    if hub_id is None:
        return None
    with contextlib.suppress(ModelError):
        hub = find_on_hub(hub_id)
        if hub.weight_bytes is not None:
            first = RemoteCheckpoint(hub, Shards(shards_on_hub(hub).files[:1], {}, hub_id))
            return _first_float({name: first.dtype(name) for name in first.names})
    return None


def _first_float(dtypes: Mapping[str, str]) -> torch.dtype | None:
    """Return the first plain float dtype. dtypes: of tensors, by their names."""
    found = next((dtypes[name] for name in sorted(dtypes) if dtypes[name] in FLOATS), None)
    return None if found is None else getattr(torch, found)
