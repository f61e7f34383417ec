"""What a model says of its quantization, in its folder or loaded; a loaded one's matrices, dequantized.

Reads config.json and the files that older tools wrote beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvprof.models.checkpoint.files import Checkpoint, LiveCheckpoint
from kvprof.models.own_code import read_object
from kvprof.models.quantized.checkpoint import dequantized
from kvprof.models.quantized.matrix import Settings

_KEYS = ("quantization_config", "compression_config", "quantization")
"""Of config.json: what transformers calls it, what compressed-tensors did before, and MLX."""
_FILES = ("quantize_config.json", "quant_config.json")
"""Of AutoGPTQ and of AutoAWQ."""


def settings_in(folder: Path) -> Settings:
    """Return what the files of a folder say of the quantization of its weights; an empty one where they say nothing."""
    config = read_object(folder / "config.json")
    text_config = config.get("text_config")
    for table in (config, text_config if isinstance(text_config, Mapping) else {}):
        for key in _KEYS:
            if isinstance(found := table.get(key), Mapping):
                return found
    return next((found for name in _FILES if (found := read_object(folder / name))), {})


def open_live(model: PreTrainedModel) -> Checkpoint:
    """Open a loaded model's parameters as a checkpoint, quantized ones dequantized as they are read."""
    found: Any = getattr(model.config, "quantization_config", None) or {}
    return dequantized(LiveCheckpoint(model), found if isinstance(found, Mapping) else found.to_dict())
