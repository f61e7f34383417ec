"""A GGUF file against the checkpoint that it was made from.

The file is written as llama.cpp's converter writes it, with its own reordering of the rotary heads of Q and K.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from folders import save_folder
from gguf import GGMLQuantizationType as Type
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from kvprof import Scores
from kvprof.cli.app import app
from kvprof.errors import ModelError, UsageError
from kvprof.models.checkpoint.files import GGUFCheckpoint
from kvprof.models.checkpoint.gguf_header import check_gguf
from kvprof.models.checkpoint.gguf_model import open_gguf, write_without_vocabulary
from kvprof.models.checkpoint.weights import LayerWeights, stream_projections
from kvprof.models.config import dtype_of, load_config
from kvprof.models.identity import Fingerprint, live_fingerprint
from kvprof.models.inventory import take_inventory
from kvprof.models.load import load_model, resolve
from kvprof.models.pinning import pin
from kvprof.models.source import ModelSource
from kvprof.profile.norms import measure_norms

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rotary rows as llama.cpp does: the two halves of a head become pairs."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: PreTrainedModel, kind: Type = Type.F32, **split: int | bool) -> Path:
    """Write a model as llama.cpp's converter does. split: into parts, as GGUFWriter takes it."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama", **split)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for full_name, parameter in model.state_dict().items():
        name, array = full_name.removesuffix(".weight"), parameter.numpy()
        if name.endswith(("q_proj", "k_proj")):
            array = interleaved(
                array, config.num_attention_heads if name.endswith("q_proj") else config.num_key_value_heads
            )
        stored = outside.get(name)
        if stored is None:
            _, _, layer, rest = name.split(".", 3)
            stored = f"blk.{layer}.{NAMES[rest]}"
        if array.ndim == 2 and kind != Type.F32 and array.shape[1] % 32 == 0:
            writer.add_tensor(f"{stored}.weight", gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{stored}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_weight_that_is_not_there_is_not_made_up(tmp_path: Path) -> None:
    model = tiny_model("llama")
    state = {name: weight for name, weight in model.state_dict().items() if name != "model.layers.1.mlp.up_proj.weight"}
    path = write_gguf(tmp_path / "tiny.gguf", SimpleNamespace(config=model.config, state_dict=lambda: state))
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight: transformers would make up"):
        load_model(resolve(str(path)))


def streamed(source: ModelSource) -> tuple[list[LayerWeights], str]:
    config = load_config(source)
    fingerprint = Fingerprint()
    layers = []
    for weights in stream_projections(pin(source).open(config), take_inventory(config).geometry, config):
        fingerprint.add(weights)
        layers.append(weights)
    return layers, fingerprint.text


def test_a_gguf_file_holds_the_checkpoints_own_projections(tmp_path: Path) -> None:
    model = tiny_model("llama")
    layers, fingerprint = streamed(resolve(str(write_gguf(tmp_path / "tiny.gguf", model))))
    for weights, live in zip(layers, model.model.layers, strict=True):
        assert torch.equal(weights.key, live.self_attn.k_proj.weight)
        assert torch.equal(weights.value, live.self_attn.v_proj.weight)
    assert fingerprint == live_fingerprint(model, take_inventory(model.config).geometry)
    assert fingerprint == streamed(resolve(str(save_folder(tmp_path / "folder"))))[1]


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q5_1])
def test_a_quantized_gguf_file_is_what_transformers_makes_of_it(tmp_path: Path, kind: Type) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), kind)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    layers, fingerprint = streamed(resolve(str(path)))
    for weights, live in zip(layers, loaded.model.layers, strict=True):
        torch.testing.assert_close(weights.key, live.self_attn.k_proj.weight.detach())
        torch.testing.assert_close(weights.value, live.self_attn.v_proj.weight.detach())
    assert fingerprint == live_fingerprint(loaded, take_inventory(loaded.config).geometry)


@pytest.mark.parametrize("name", ["blk.1.attn_k.weight", "blk.1.attn_v.weight"])
def test_rows_of_a_gguf_tensor_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    live = (attention.k_proj if "_k." in name else attention.v_proj).weight
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "tiny.gguf", model), model.config)
    assert torch.equal(checkpoint.read(name, [(9, 12), (2, 3)]), torch.cat([live[9:12], live[2:3]]))
    assert checkpoint.stored_bytes(name, [(9, 12), (2, 3)]) == 4 * 32 * 4
    quantized = write_gguf(tmp_path / "quantized.gguf", model, Type.Q8_0)
    assert GGUFCheckpoint(quantized, model.config).stored_bytes(name, [(0, 4)]) == 4 * (32 + 2)
    whole, rows = (GGUFCheckpoint(quantized, model.config).read(name, part) for part in (None, [(4, 9)]))
    assert torch.equal(whole[4:9], rows)


def test_the_inventory_of_a_gguf_file_is_its_checkpoints(tmp_path: Path) -> None:
    model = tiny_model("llama")
    inventory = take_inventory(load_config(resolve(str(write_gguf(tmp_path / "tiny.gguf", model)))))
    assert inventory.geometry.layers == take_inventory(model.config).geometry.layers
    assert inventory.model.architecture == "LlamaForCausalLM"


def test_the_dtype_of_a_gguf_file_is_what_it_is_dequantized_to(tmp_path: Path) -> None:
    source = resolve(str(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), Type.F16)))
    assert dtype_of(load_config(source), "auto") == load_model(source).dtype == torch.float32


def test_norms_take_a_gguf_file(in_tmp: Path) -> None:
    model = tiny_model("llama")
    write_gguf(in_tmp / "tiny.gguf", model)
    result = CliRunner().invoke(app, ["norms", "tiny.gguf", "--out", "result"])
    assert result.exit_code == 0, result.output
    for measured, live in zip(Scores.load("result/norms.json").layers, model.model.layers, strict=True):
        truth = np.linalg.svd(live.self_attn.k_proj.weight.double().numpy(), compute_uv=False)
        assert measured.key.spectral_norm == pytest.approx(truth[0], rel=1e-6)
        assert measured.key.frobenius_norm == pytest.approx(np.linalg.norm(truth), rel=1e-6)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:3],
        lambda content: content[:100],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-64],
        lambda content: b"\x7fELF" + content[4:],
        lambda content: content[:16] + b"\xff" * 8 + content[24:],
        lambda content: b"not a model at all, but text" * 100,
    ],
    ids=["empty", "stub", "header cut", "half", "last bytes", "magic", "counts", "text"],
)
def test_a_damaged_gguf_file_is_one_message(in_tmp: Path, damage) -> None:  # type: ignore[no-untyped-def]
    path = write_gguf(in_tmp / "tiny.gguf", tiny_model("llama"))
    path.write_bytes(damage(path.read_bytes()))
    result = CliRunner().invoke(app, ["norms", "tiny.gguf", "--out", "result"])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert "tiny.gguf" in result.output
    assert not Path("result/norms.json").exists()


def test_a_missing_gguf_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(str(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'kvprof-bits\[gguf\]'"):
        load_config(source)
    with pytest.raises(ModelError, match=r"pip install 'kvprof-bits\[gguf\]'"):
        GGUFCheckpoint(source.fetch(weights=True), tiny_model("llama").config)


def with_vocabulary(path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tokens: int) -> Path:
    """Write a GGUF file whose vocabulary alone says how large it is."""

    def add_tokens(writer: gguf.GGUFWriter, size: int) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"t{number}" for number in range(tokens)])
        writer.add_token_types([1] * tokens)
        writer.add_token_merges(["t 1", "t 2"])
        writer.add_bos_token_id(1)

    monkeypatch.setattr(gguf.GGUFWriter, "add_vocab_size", add_tokens)
    return write_gguf(path, model)


def test_a_config_is_what_transformers_makes_of_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    plain = write_gguf(tmp_path / "plain.gguf", model)
    counted = with_vocabulary(tmp_path / "counted.gguf", model, monkeypatch, tokens=96)
    for path in (plain, counted):
        whole = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
        whole.dtype = torch.float32  # which it is loaded in; the file has no dtype of its own
        assert load_config(resolve(str(path))).to_dict() == whole.to_dict()
        assert whole.vocab_size == 96


def test_no_vocabulary_is_read_to_inspect_or_to_take_norms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = with_vocabulary(tmp_path / "large.gguf", tiny_model("llama"), monkeypatch, tokens=96)
    read: list[int] = []
    fields = gguf.GGUFReader._build_fields
    monkeypatch.setattr(
        gguf.GGUFReader,
        "_build_fields",
        lambda self, at, count: (end := fields(self, at, count), read.append(end))[0],
    )
    source = resolve(str(path))
    measure_norms(source)
    assert read
    assert max(read) < check_gguf(path).infos_byte - 96 * 8  # each token takes 8 bytes and its letters
    assert not (tmp_path / "cache").exists()


def test_a_copy_without_the_vocabulary_holds_every_other_field_and_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = with_vocabulary(tmp_path / "whole.gguf", tiny_model("llama"), monkeypatch, tokens=96)
    write_without_vocabulary(open_gguf(path), tmp_path / "copy.gguf", weights=True)
    whole, copy = gguf.GGUFReader(path), gguf.GGUFReader(tmp_path / "copy.gguf")
    arrays = {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"}
    assert arrays <= set(whole.fields)
    counts = {"GGUF.kv_count"}
    for name in set(whole.fields) - arrays - counts:
        assert copy.fields[name].contents() == whole.fields[name].contents()
    assert set(copy.fields) == set(whole.fields) - arrays | {"tokenizer.ggml.tokens"}
    for one, other in zip(whole.tensors, copy.tensors, strict=True):
        assert (one.name, one.tensor_type) == (other.name, other.tensor_type)
        assert np.array_equal(one.data, other.data)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVPROF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_file_is_dequantized_once_and_its_weights_are_those_of_the_file(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), Type.Q4_0)
    truth = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).state_dict()
    first = load_model(resolve(str(path)))
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr("kvprof.models.load.load_config", lambda source: first.config)
    for model in (first, load_model(resolve(str(path))), load_model(resolve(str(path)), stream=True)):
        stored = getattr(model, "stored_weight", None)
        for name, weight in model.state_dict().items():
            assert torch.equal(weight if stored is None else stored(name), truth[name]), name
    copied = load_model(resolve(str(path)), dtype="bfloat16")
    assert all(torch.equal(weight, truth[name].bfloat16()) for name, weight in copied.state_dict().items())


def test_a_replaced_file_of_the_same_size_and_time_is_not_taken_for_the_old_one(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model := tiny_model("llama"))
    load_model(resolve(str(path)))
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 5] = 7.0
    size = path.stat().st_size
    write_gguf(path, model)
    os.utime(path, ns=times)
    assert path.stat().st_size == size
    assert load_model(resolve(str(path))).model.layers[1].self_attn.v_proj.weight[3, 5] == 7.0


def test_what_a_killed_process_or_a_full_disk_left_is_made_anew(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    load_model(resolve(str(path)))
    (kept,) = [folder for folder in (cache / "gguf").iterdir() if folder.is_dir()]
    weights = kept / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    (abandoned := cache / "gguf" / f".{kept.name}.killed").mkdir()
    load_model(resolve(str(path)))
    assert weights.read_bytes() == whole
    assert not abandoned.exists()


def test_a_cache_that_cannot_be_written_is_only_a_pity(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    cache.write_text("no folder")
    model = load_model(resolve(str(path)))
    assert torch.equal(model.lm_head.weight, tiny_model("llama").lm_head.weight)
    assert "cannot be kept" in caplog.text
    with pytest.raises(UsageError, match="could not be converted"):
        load_model(resolve(str(path)), stream=True)
    cache.unlink()
    caplog.clear()
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=2**20))
    with caplog.at_level("INFO"):
        load_model(resolve(str(path)))
    assert "is not kept as safetensors: 1.00 MiB free" in caplog.text
    assert not list(cache.rglob("*.safetensors"))
