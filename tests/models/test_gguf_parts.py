"""GGUF models in parts, as gguf's own writer splits them; files that are no language model, or do not say which."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from test_gguf import write_gguf
from tiny import tiny_model
from typer.testing import CliRunner, Result

from kvprof.cli.app import app
from kvprof.errors import ModelError
from kvprof.models.checkpoint.gguf_header import check_gguf
from kvprof.models.checkpoint.gguf_model import open_gguf, write_without_vocabulary
from kvprof.models.config import load_config
from kvprof.models.identity import checkpoint_fingerprint
from kvprof.models.inventory import take_inventory
from kvprof.models.load import load_model, resolve
from kvprof.models.pinning import pin
from kvprof.records.scores import Scores


def run(*words: str) -> Result:
    return CliRunner().invoke(app, [*words])


def parts_of(folder: Path, kind: Type = Type.F32, **split: int | bool) -> list[Path]:
    """Write a tiny model in parts; by default of four tensors each."""
    folder.mkdir(exist_ok=True)
    write_gguf(folder / "tiny.gguf", tiny_model("llama"), kind, **split or {"split_max_tensors": 4})
    return sorted(folder.glob("*.gguf"))


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0, Type.Q4_0])
@pytest.mark.parametrize("split", [{"split_max_tensors": 4}, {"split_max_tensors": 7, "small_first_shard": True}])
def test_all_parts_are_read_whichever_is_named(tmp_path: Path, kind: Type, split: dict[str, int | bool]) -> None:
    whole = resolve(str(write_gguf(tmp_path / "whole.gguf", tiny_model("llama"), kind)))
    parts = parts_of(tmp_path / "parts", kind, **split)
    assert len(parts) > 2
    expected = load_model(whole).state_dict()
    geometry = take_inventory(load_config(whole)).geometry
    fingerprint = checkpoint_fingerprint(whole, geometry)
    for named in (tmp_path / "parts", parts[0], parts[1], parts[-1]):
        source = resolve(str(named))
        assert source.id == str(parts[0])
        assert take_inventory(load_config(source)).geometry == geometry
        assert checkpoint_fingerprint(source, geometry) == fingerprint
        loaded = load_model(source).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())


def test_joined_parts_hold_every_field_and_tensor_of_the_whole(tmp_path: Path) -> None:
    parts = parts_of(tmp_path / "parts", Type.Q4_0)
    write_gguf(tmp_path / "whole.gguf", tiny_model("llama"), Type.Q4_0)
    write_without_vocabulary(open_gguf(parts[0]), tmp_path / "joined.gguf", weights=True)
    whole, joined = gguf.GGUFReader(tmp_path / "whole.gguf"), gguf.GGUFReader(tmp_path / "joined.gguf")
    assert set(joined.fields) == set(whole.fields)
    found = {tensor.name: (tensor.tensor_type, tensor.data) for tensor in joined.tensors}
    assert found.keys() == {tensor.name for tensor in whole.tensors}
    for tensor in whole.tensors:
        assert found[tensor.name][0] == tensor.tensor_type
        assert np.array_equal(found[tensor.name][1], tensor.data)


def test_the_commands_take_parts_and_agree(in_tmp: Path) -> None:
    parts = parts_of(in_tmp / "parts")
    write_gguf(in_tmp / "whole.gguf", tiny_model("llama"))
    for place, out in (("whole.gguf", "one"), ("parts", "many"), (str(parts[-1]), "last")):
        result = run("norms", place, "--out", out)
        assert result.exit_code == 0, result.output
    one, many, last = (Scores.load(f"{out}/norms.json") for out in ("one", "many", "last"))
    assert one.layers == many.layers == last.layers
    assert run("validate", "many/norms.json", "whole.gguf").exit_code == 0
    assert run("inspect", "parts").exit_code == 0


@pytest.mark.parametrize("missing", [0, 1, -1])
@pytest.mark.parametrize("command", ["inspect", "norms", "gradients"])
def test_a_missing_part_is_named(in_tmp: Path, missing: int, command: str) -> None:
    parts = parts_of(in_tmp / "parts")
    gone = parts.pop(missing)
    gone.unlink()
    for named in ("parts", *map(str, parts)):
        result = run(command, named)
        assert result.exit_code == 1
        number = int(gone.name[5:10])
        said = f"part {number} of {len(parts) + 1} of a GGUF model is missing: {gone.name}."
        assert said in " ".join(result.output.split())
    assert not (in_tmp / "outputs").exists()


def test_parts_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    parts = parts_of(tmp_path / "parts")
    others = parts_of(tmp_path / "others", split_max_tensors=6)
    content = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ModelError, match=r"00002-of-\d+\.gguf is not part 2 of \d+ by its own metadata"):
        open_gguf(parts[0])
    parts[1].write_bytes(content)
    open_gguf(parts[0])
    parts[1].write_bytes(others[1].read_bytes())
    with pytest.raises(ModelError, match="is not part 2 of"):
        open_gguf(parts[0])
    parts[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"00002-of-\d+\.gguf is not a readable GGUF file"):
        open_gguf(parts[0])


def test_a_part_of_another_name_says_how_parts_are_called(tmp_path: Path) -> None:
    parts = parts_of(tmp_path / "parts")
    renamed = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=r"is one of \d+ parts by its metadata, but is not called so"):
        load_config(resolve(str(renamed)))


def test_a_replaced_part_is_another_model(tmp_path: Path) -> None:
    parts = parts_of(tmp_path / "parts")
    source = resolve(str(parts[0]))
    before, first = pin(source).identity, load_model(source).state_dict()
    tensor = next(iter(check_gguf(parts[-1]).tensors.values()))
    content = bytearray(parts[-1].read_bytes())
    content[tensor.start_byte : tensor.start_byte + 4] = struct.pack("<f", 7.0)
    parts[-1].write_bytes(content)
    assert pin(source).identity != before
    changed = load_model(source).state_dict()
    assert sum(not torch.equal(weight, changed[name]) for name, weight in first.items()) == 1


def test_no_space_to_join_parts_says_how_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(tmp_path / "parts")
    monkeypatch.setattr("kvprof.models.conversion.SPARED_BYTES", 2**60)
    with pytest.raises(ModelError, match="llama-gguf-split --merge"):
        load_model(resolve(str(parts[0])))


def small_file(path: Path, architecture: str | None = "llama", **fields: object) -> Path:
    """Write a GGUF file of the smallest language model's metadata; a field given as None is left out."""
    usual: dict[str, object] = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": 96,
    }
    writer = gguf.GGUFWriter(path, architecture or "llama")
    if architecture is None:
        writer.kv_data[0].pop("general.architecture")
    for name, value in (usual | fields).items():
        name = name if name.startswith("general.") else f"{architecture}.{name}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_uint32(name, value)  # type: ignore[arg-type]
    for layer in range(2):
        writer.add_tensor(f"blk.{layer}.attn_k.weight", np.ones((16, 32), np.float32))
        writer.add_tensor(f"blk.{layer}.attn_v.weight", np.ones((16, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("command", ["inspect", "norms", "gradients"])
@pytest.mark.parametrize(
    "lacking",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
        "vocab_size",
    ],
)
def test_metadata_that_are_missing_are_not_made_up(in_tmp: Path, lacking: str, command: str) -> None:
    small_file(in_tmp / "small.gguf", **{lacking: None})
    result = run(command, "small.gguf", "--out", "out") if command != "inspect" else run(command, "small.gguf")
    assert result.exit_code == 1
    assert f"its metadata lack llama.{lacking}" in " ".join(result.output.split())
    assert not (in_tmp / "out" / f"{command}.json").exists()


def test_a_file_with_metadata_is_inspected(in_tmp: Path) -> None:
    small_file(in_tmp / "small.gguf")
    result = run("inspect", "small.gguf")
    assert result.exit_code == 0, result.output


def test_without_a_number_of_kv_heads_all_heads_have_their_own(in_tmp: Path) -> None:
    """So the format's page says; the config class of the architecture may say something else (Mistral's: 8)."""
    for architecture in ("llama", "qwen2", "qwen3"):
        path = small_file(in_tmp / f"{architecture}.gguf", architecture, **{"attention.head_count_kv": None})
        layers = take_inventory(load_config(resolve(str(path)))).geometry.layers
        assert [layer.kv_heads for layer in layers] == [4, 4]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"general.type": "adapter", "general.base_model.0.repo_url": "org/base"},
            "general.type is 'adapter' of org/base",
        ),
        ({"general.type": "adapter"}, "general.type is 'adapter'"),
        ({"general.type": "mmproj"}, "general.type is 'mmproj'"),
        ({"general.type": "imatrix"}, "general.type is 'imatrix'"),
        ({"architecture": "clip"}, "image or audio encoder"),
        ({"architecture": None}, "has no general.architecture"),
    ],
    ids=["adapter with base", "adapter", "projector", "importance matrix", "clip", "no architecture"],
)
def test_what_is_no_language_model_is_refused(in_tmp: Path, fields: dict[str, str], said: str) -> None:
    small_file(in_tmp / "small.gguf", **fields)  # type: ignore[arg-type]
    for command in ("inspect", "norms", "gradients"):
        result = run(command, "small.gguf")
        assert result.exit_code == 1
        assert said in " ".join(result.output.split())
