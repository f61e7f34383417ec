"""Every format of quantized weights against what its own package made of the same tensors, to the last bit.

references.safetensors is written by make_references.py beside it, with the packages whose versions references.json has.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from coded import same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvprof.errors import ModelError
from kvprof.models.checkpoint.files import SafetensorsCheckpoint
from kvprof.models.checkpoint.shards import FLOATS, quantized
from kvprof.models.quantized.checkpoint import dequantized

HERE = Path(__file__).parent
MODULE = "model.layers.0.self_attn.k_proj"
SETTINGS: dict[str, dict[str, Any]] = json.loads((HERE / "references.json").read_text())["settings"]
STORED = load_file(HERE / "references.safetensors")
FIRST = {name.split()[0]: name for name in SETTINGS}


def parts_of(case: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return a case's tensors by the names beside the module's, and the matrix that they make."""
    parts = {name.partition("/")[2]: tensor for name, tensor in STORED.items() if name.startswith(f"{case}/")}
    return parts, parts.pop("expected")


def read(folder: Path, parts: dict[str, Tensor], settings: object, rows: list[tuple[int, int]] | None = None) -> Tensor:
    state = {f"{MODULE}.{leaf}": tensor.contiguous() for leaf, tensor in parts.items()}
    save_file(state | {"model.norm.weight": torch.ones(3)}, folder / "model.safetensors")
    checkpoint = dequantized(SafetensorsCheckpoint(folder), settings)  # type: ignore[arg-type]
    name = f"{MODULE}.weight"
    assert name in checkpoint.names
    if checkpoint.dtype(name) not in FLOATS:  # as Projections does
        raise quantized(name, checkpoint.dtype(name))
    found = checkpoint.read(name, rows)
    if rows is None:
        assert found.shape == checkpoint.shape(name)
    assert str(found.dtype) == f"torch.{checkpoint.dtype(name)}"
    assert checkpoint.held_bytes(name) >= found.nbytes
    return found


@pytest.mark.parametrize("case", sorted(SETTINGS))
def test_a_matrix_is_what_the_formats_own_package_makes_of_it(tmp_path: Path, case: str) -> None:
    parts, expected = parts_of(case)
    if " fp4 " in case:  # whose code 8 is -0.0 or 0.0, as bitsandbytes' kernels happen to reach the end of a row
        expected = expected + 0.0
    assert same_bits(read(tmp_path, parts, SETTINGS[case]), expected)


@pytest.mark.parametrize("case", sorted(FIRST.values()))
def test_rows_are_those_of_the_whole(tmp_path: Path, case: str) -> None:
    parts, expected = parts_of(case)
    found = read(tmp_path, parts, SETTINGS[case], [(3, 4), (0, 2)])
    assert same_bits(found, torch.cat([expected[3:4], expected[:2]]))


@pytest.mark.parametrize("case", sorted(FIRST.values()))
@pytest.mark.parametrize("damage", ["missing", "longer", "dtype", "nan"])
def test_parts_that_do_not_go_together_are_one_message(tmp_path: Path, case: str, damage: str) -> None:
    """Each part in turn; but for tensors that nothing is read from."""
    whole, _ = parts_of(case)
    optional = {"weight_format", "g_idx", "weight_zero_point", "weight_packed", "qweight"}
    for leaf, tensor in whole.items():
        parts = dict(whole)
        if damage == "missing":
            if leaf in optional or leaf in ("weight", "weight.nested_absmax"):
                continue
            del parts[leaf]
        elif damage == "longer":
            if leaf == "weight_format":
                continue
            parts[leaf] = torch.cat([tensor, tensor]) if tensor.ndim else torch.stack([tensor, tensor])
        elif damage == "dtype":
            if leaf == "weight_format":
                continue
            parts[leaf] = tensor.reshape(-1).view(torch.uint8).to(torch.int16)
        elif tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            parts[leaf] = torch.full_like(tensor, float("nan"))
        else:
            continue
        with pytest.raises(ModelError) as raised:
            read(tmp_path, parts, SETTINGS[case])
        assert MODULE in str(raised.value), leaf


class Held:
    """Tensors in memory as a checkpoint."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.names = tensors, list(tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> str:
        return str(self.tensors[name].dtype).removeprefix("torch.")

    def stored_bytes(self, name: str, rows: object = None) -> int:
        return self.tensors[name].nbytes

    def held_bytes(self, name: str, rows: object = None) -> int:
        return self.tensors[name].nbytes

    def read(self, name: str, rows: object = None) -> Tensor:
        return self.tensors[name]


WORDS = [0, -1, 3, 8, 2**31, 2**70, "4", None, [], {}, [2, 2], True, 1.5, "nf4", float("nan")]


@pytest.mark.parametrize("case", sorted({*FIRST.values(), *sorted(SETTINGS)[::5], *sorted(SETTINGS)[-3:]}))
def test_whatever_is_done_to_parts_and_config_nothing_but_one_message_comes(case: str) -> None:
    """Shapes, dtypes, contents and settings at random; a matrix that still comes out has the shape that was told."""
    draw = random.Random(case)
    dtypes = [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.uint32,
        torch.int64,
    ]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2]
    whole, _ = parts_of(case)
    refused = 0
    for _ in range(400):
        parts, settings = dict(whole), dict(SETTINGS[case])
        for _ in range(draw.choice([1, 1, 2])):
            leaf = draw.choice(list(parts))
            shape = [draw.choice([0, 1, 2, 3, 8, 16, 31, 32, 64]) for _ in range(draw.randrange(4))]
            kind = draw.choice(dtypes) if draw.random() < 0.4 else parts[leaf].dtype
            if draw.random() < 0.3:
                shape = list(parts[leaf].shape)
            elif draw.random() < 0.3:
                shape = list(reversed(parts[leaf].shape))
            size = math.prod(shape) * kind.itemsize
            content = bytearray(draw.randbytes(size))
            parts[leaf] = (
                torch.frombuffer(content, dtype=kind).reshape(shape) if size else torch.empty(shape, dtype=kind)
            )
            if draw.random() < 0.2 and len(parts) > 1:
                del parts[leaf]
        if draw.random() < 0.5:
            settings[draw.choice([*settings, "mode", "weight_block_size", "checkpoint_format"])] = draw.choice(WORDS)
        state = {f"{MODULE}.{leaf}": tensor for leaf, tensor in parts.items()}
        checkpoint = dequantized(Held(state), settings)  # type: ignore[arg-type]
        name = f"{MODULE}.weight"
        try:
            if name in checkpoint.names and checkpoint.dtype(name) in FLOATS:
                assert checkpoint.read(name).shape == checkpoint.shape(name)
        except ModelError as error:
            refused += MODULE in str(error)
    assert refused > 40


@pytest.mark.parametrize("value", [0, -1, 7, 2**40, "4", None, 4.0, True, [4]], ids=str)
@pytest.mark.parametrize("name", ["bits", "group_size"])
def test_a_number_of_the_config_that_cannot_be_is_one_message(tmp_path: Path, name: str, value: object) -> None:
    case = "mlx 4 bits 64 bfloat16"
    parts, _ = parts_of(case)
    with pytest.raises(ModelError, match=MODULE):
        read(tmp_path, parts, SETTINGS[case] | {name: value})


def test_mlx_names_matrices_that_are_quantized_otherwise(tmp_path: Path) -> None:
    parts, expected = parts_of("mlx 8 bits 64 bfloat16")
    settings = {"bits": 4, "group_size": 64, MODULE: {"bits": 8, "group_size": 64}}
    assert same_bits(read(tmp_path, parts, settings), expected)


def test_nothing_of_a_config_is_taken_for_a_pattern(tmp_path: Path) -> None:
    """A target that would keep a regular expression busy for ever."""
    case = "compressed-tensors packed 4 bits group"
    parts, expected = parts_of(case)
    settings = json.loads(json.dumps(SETTINGS[case]))
    settings["config_groups"]["group_0"]["targets"] = ["re:(.*.*)*$" * 20 + "!"]
    settings["ignore"] = ["re:(a+)+$"]
    assert same_bits(read(tmp_path, parts, settings), expected)
