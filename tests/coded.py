"""Model folders whose projections are quantized as others publish them, and what kvprof reads of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from folders import edit_json, save_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvprof.models.config import load_config
from kvprof.models.load import resolve
from kvprof.models.pinning import pin

Coding = Callable[[str, Tensor], dict[str, Tensor]]
"""From a module's name and its weight to the tensors that it is stored as, by the name beside the module's."""

KEY = "model.layers.1.self_attn.k_proj"


def code_folder(folder: Path, coding: Coding, settings: object, name: str = "llama", **arguments: object) -> Path:
    """Save a tiny model with its decoder's matrices quantized, in bfloat16 else. settings: the quantization_config."""
    save_folder(folder, name, **arguments)
    for file in folder.glob("*.safetensors"):
        state: dict[str, Tensor] = {}
        for full_name, weight in load_file(file).items():
            module, _, leaf = full_name.rpartition(".")
            if leaf == "weight" and weight.ndim == 2 and ".layers." in module:
                state |= {f"{module}.{part}": tensor for part, tensor in coding(module, weight).items()}
            else:
                state[full_name] = weight.bfloat16()
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, file, metadata={"format": "pt"})
    edit_json(folder / "config.json", quantization_config=settings, dtype="bfloat16")
    return folder


def edit_file(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of an unsharded checkpoint in place."""
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def stored(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of an unsharded checkpoint as it is stored."""
    return load_file(folder / "model.safetensors")


def read_weight(folder: Path, module: str = KEY) -> Tensor:
    """Return a module's weight as `kvprof norms` reads it."""
    source = resolve(str(folder))
    return pin(source).open(load_config(source).get_text_config(decoder=True)).read(f"{module}.weight")


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether two matrices are the same float32 numbers, to the last bit."""
    return torch.equal(found.float().view(torch.int32), expected.float().contiguous().view(torch.int32))
