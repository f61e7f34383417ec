"""A checkpoint on the disk, in every shape that it comes in, against the weights of the model that was saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folders import edit_json, edit_weights, save_folder
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from kvprof.errors import ModelError, NonFiniteWeight, UnknownLayout
from kvprof.models.checkpoint.files import LiveCheckpoint, SafetensorsCheckpoint
from kvprof.models.checkpoint.weights import LayerWeights, stream_projections
from kvprof.models.identity import Fingerprint, live_fingerprint
from kvprof.models.inventory import take_inventory

KEY = "model.layers.1.self_attn.k_proj.weight"
VALUE = "model.layers.1.self_attn.v_proj.weight"


def streamed(folder: Path, name: str = "llama") -> list[LayerWeights]:
    """Read the projections of a saved tiny model."""
    config = tiny_model(name).config
    return list(stream_projections(SafetensorsCheckpoint(folder), take_inventory(config).geometry, config))


def fingerprint(layers: list[LayerWeights]) -> str:
    whole = Fingerprint()
    for weights in layers:
        whole.add(weights)
    return whole.text


@pytest.mark.parametrize("shard", ["10KB", "1GB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_read_as_they_were_saved(tmp_path: Path, dtype: torch.dtype, shard: str) -> None:
    model = tiny_model("llama")
    model.to(dtype).save_pretrained(tmp_path, max_shard_size=shard)
    layers = streamed(tmp_path)
    for weights, live in zip(layers, model.model.layers, strict=True):
        assert weights.key.dtype == dtype
        assert torch.equal(weights.key, live.self_attn.k_proj.weight)
        assert torch.equal(weights.value, live.self_attn.v_proj.weight)
    assert fingerprint(layers) == live_fingerprint(model, take_inventory(model.config).geometry)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "qwen2"])
@pytest.mark.parametrize("prefix", ["", "language_model.", "model.language_model."])
def test_the_prefix_of_a_checkpoint_is_of_no_matter(tmp_path: Path, name: str, prefix: str) -> None:
    folder = save_folder(tmp_path, name)
    before = fingerprint(streamed(folder, name))
    state = load_file(folder / "model.safetensors")
    base = tiny_model(name).base_model_prefix + "."
    save_file({prefix + key.removeprefix(base): tensor for key, tensor in state.items()}, folder / "model.safetensors")
    assert fingerprint(streamed(folder, name)) == before


@pytest.mark.parametrize("layers_of_tower", [1, 2, 5])
def test_a_tower_beside_the_decoder_is_never_measured(tmp_path: Path, layers_of_tower: int) -> None:
    folder = save_folder(tmp_path)
    before = fingerprint(streamed(folder))
    edit_weights(
        folder,
        lambda state: state.update(
            {
                f"vision_tower.encoder.layers.{layer}.self_attn.{part}_proj.weight": torch.randn(16, 32)
                for layer in range(layers_of_tower)
                for part in "qkv"
            }
        ),
    )
    assert fingerprint(streamed(folder)) == before


def test_a_draft_layer_behind_the_last_one_is_left_out(tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    before = fingerprint(streamed(folder))
    edit_weights(
        folder,
        lambda state: state.update({k.replace(".1.", ".2."): v.clone() for k, v in state.items() if ".layers.1." in k}),
    )
    assert fingerprint(streamed(folder)) == before


def test_the_whole_file_is_preferred_to_a_second_copy_of_it(tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    (folder / "consolidated.safetensors").write_bytes(b"the same weights under other names")
    assert len(streamed(folder)) == 2


def test_shards_that_the_index_does_not_name_are_left_out(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, max_shard_size="10KB")
    before = fingerprint(streamed(folder))
    (folder / "model-99999-of-99999.safetensors").write_bytes(b"of an older version")
    assert fingerprint(streamed(folder)) == before


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        streamed(folder)


def test_a_folder_of_pickles_is_refused_unopened(tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.bin\)"):
        streamed(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:4],
        lambda content: content[:200],
        lambda content: content[:-1],
        lambda content: content + b"more",
        lambda content: (2**62).to_bytes(8, "little") + content[8:],
        lambda content: (2**64 - 1).to_bytes(8, "little") + content[8:],
        lambda content: content[:8] + b"\xff" * 64 + content[72:],
        lambda content: (2).to_bytes(8, "little") + b"[]",
        lambda content: b"version 1\noid sha256:00\nsize 12345\n",
    ],
    ids=[
        "empty",
        "stub",
        "header cut",
        "a byte short",
        "longer",
        "huge header",
        "header",
        "no JSON",
        "list",
        "LFS pointer",
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    folder = save_folder(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated or corrupt"):
        streamed(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, max_shard_size="10KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"names the shard {shard.name}, but it is not there"):
        streamed(folder)


@pytest.mark.parametrize(
    "weight_map",
    [*({KEY: shard} for shard in ("../model.safetensors", "/model.safetensors", "a\\b", "..", "", 7, ["a"])), [], None],
    ids=str,
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, weight_map: object) -> None:
    folder = save_folder(tmp_path / "inner", max_shard_size="10KB")
    save_folder(tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"outside its folder|is not an index|is not there"):
        streamed(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "[" * 100_000, "\xff"], ids=["empty", "cut", "list", "deep", "binary"]
)
def test_a_broken_index_is_named(tmp_path: Path, text: str) -> None:
    folder = save_folder(tmp_path, max_shard_size="10KB")
    (folder / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match="is not an index of safetensors shards"):
        streamed(folder)


def test_a_tensor_that_the_index_promises_and_no_shard_has_is_named(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, max_shard_size="10KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][KEY]
    save_file({k: v for k, v in load_file(shard).items() if k != KEY} | {"other": torch.zeros(1)}, shard)
    with pytest.raises(ModelError, match=f"says that {KEY} is in {shard.name}, but it is not"):
        streamed(folder)


@pytest.mark.parametrize("rows", [[(3, 5)], [(0, 2), (9, 16)], [(4, 8), (0, 4)]])
def test_rows_of_a_tensor_are_those_of_the_loaded_model(tmp_path: Path, rows: list[tuple[int, int]]) -> None:
    model = tiny_model("llama")
    live = model.model.layers[1].self_attn.k_proj.weight
    wanted = torch.cat([live[start:stop] for start, stop in rows])
    for checkpoint in (SafetensorsCheckpoint(save_folder(tmp_path, max_shard_size="10KB")), LiveCheckpoint(model)):
        assert torch.equal(checkpoint.read(KEY, rows), wanted)
        assert checkpoint.stored_bytes(KEY, rows) == 4 * 32 * len(wanted)
        assert checkpoint.stored_bytes(KEY) == 4 * live.numel()
        assert checkpoint.dtype(KEY) == "float32"


@pytest.mark.parametrize("name", ["phi3", "gpt-neox", "falcon-mqa", "falcon-grouped", "codegen", "jetmoe"])
def test_the_queries_of_a_fused_matrix_are_not_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read_bytes = 0
    original = SafetensorsCheckpoint.read

    def counting(self: SafetensorsCheckpoint, name: str, rows: object = None) -> torch.Tensor:
        nonlocal read_bytes
        tensor = original(self, name, rows)  # type: ignore[arg-type]
        read_bytes += tensor.nbytes if tensor.ndim > 1 else 0
        return tensor

    monkeypatch.setattr(SafetensorsCheckpoint, "read", counting)
    layers = streamed(save_folder(tmp_path, name), name)
    assert read_bytes == sum(weights.key.nbytes + weights.value.nbytes for weights in layers)


def test_a_layer_without_projections_is_named(tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    edit_weights(folder, lambda state: state.pop(VALUE))
    with pytest.raises(UnknownLayout, match=r"1 of 2 layers project keys and values \(k_proj/v_proj\), but layer 1"):
        streamed(folder)


def test_weights_of_another_shape_than_the_config_says_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"k_proj.weight is 32x32, but the config says 16 rows"):
        streamed(save_folder(tmp_path, "llama-mha"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [KEY, VALUE])
def test_an_entry_that_is_no_number_names_its_tensor(tmp_path: Path, name: str, bad: float) -> None:
    folder = save_folder(tmp_path)
    edit_weights(folder, lambda state: state[name].view(-1)[5:6].fill_(bad))
    with pytest.raises(NonFiniteWeight, match=f"{name} holds 1 NaN or infinite"):
        streamed(folder)


def test_a_bad_number_outside_keys_and_values_is_nobodys_business(tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    edit_weights(folder, lambda state: state["model.layers.0.mlp.up_proj.weight"].fill_(float("nan")))
    assert len(streamed(folder)) == 2


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantized_weights_are_refused_by_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_folder(tmp_path)
    edit_weights(folder, lambda state: state.update({KEY: state[KEY].to(dtype)}))
    with pytest.raises(ModelError, match=f"{KEY} is quantized to {str(dtype).removeprefix('torch.')}"):
        streamed(folder)


def test_packed_weights_are_refused(tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    edit_weights(folder, lambda state: state.update({KEY: torch.zeros(256, 1, dtype=torch.uint8)}))
    with pytest.raises(ModelError, match=r"256x1, but the config says 16 rows.*\n.*quantized"):
        streamed(folder)


def test_a_model_without_keys_and_values_of_its_own_says_why(tmp_path: Path) -> None:
    from transformers import MambaConfig

    save_folder(tmp_path)
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=96, state_size=4)
    with pytest.raises(ModelError, match="recurrent layer"):
        list(stream_projections(SafetensorsCheckpoint(tmp_path), take_inventory(config).geometry, config))


def test_a_checkpoint_is_read_whatever_else_its_config_says(tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    edit_json(folder / "config.json", quantization_config={"quant_method": "martian"}, some_new_key=[1])
    assert len(streamed(folder)) == 2
