"""A model whose blocks are loaded one at a time computes what the whole one does, and holds one block."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import edit_weights, save_folder
from mean_squares import mean_squares
from tiny import TINY, skip_unknown, tiny_model
from transformers import AutoModelForImageTextToText, Gemma3nTextConfig, LlavaConfig, PreTrainedModel

from kvprof.calibration.sequences import Batch, batches
from kvprof.errors import ModelError, UnsupportedAttention, UnsupportedStreaming, UsageError
from kvprof.models.execution import activation_offload as offload
from kvprof.models.execution import streaming
from kvprof.models.execution.activation_offload import ActivationOffload
from kvprof.models.inventory import take_inventory
from kvprof.models.load import input_device, load_model
from kvprof.models.source import ModelSource
from kvprof.profile.decoder import Decoder, formats_of
from kvprof.profile.gradients import gradient_norms
from kvprof.profile.loss_increase import loss_effects
from kvprof.records.plan import Quantizer, Window

WINDOW = Window(sink_tokens=2, recent_tokens=4)
FORMATS = {"key": ("int2g16", "int3g16"), "value": ("int2g8",)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVPROF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(model: PreTrainedModel, folder: Path, **how: object) -> ModelSource:
    model.save_pretrained(folder, **how)
    return ModelSource(str(folder), "folder", folder)


def streamed(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return load_model(save(model, folder), "float32", "cpu", stream=True)


def assert_holds_nothing(model: PreTrainedModel) -> None:
    """No weight has memory, and none can be computed with by mistake."""
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.itemsize
        assert parameter.isnan().all()


def ragged(vocabulary: int = 96) -> Batch:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, vocabulary, (length,), generator=generator).tolist() for length in (40, 40, 31)]
    return next(batches(rows, 3))


def losses_of(model: PreTrainedModel, batch: Batch) -> dict[tuple[int, str, str], torch.Tensor]:
    formats = formats_of(take_inventory(model.config).geometry, Decoder(FORMATS, WINDOW))
    if not formats:
        return {}
    return mean_squares(loss_effects(model, batch, formats, WINDOW, Quantizer(), 0.5, seed=0))


def assert_same_gradients(found: PreTrainedModel, whole: PreTrainedModel, batch: Batch) -> None:
    geometry = take_inventory(whole.config).geometry
    expected, got = gradient_norms(whole, geometry, batch), gradient_norms(found, geometry, batch)
    for index in expected:
        torch.testing.assert_close(torch.tensor(got[index]), torch.tensor(expected[index]), rtol=1e-6, atol=0)


def test_every_architecture_has_the_logits_gradients_and_losses_of_the_whole_model(
    any_tiny: tuple[str, PreTrainedModel], tmp_path: Path
) -> None:
    _, whole = any_tiny
    found, batch = streamed(whole, tmp_path / "model"), ragged()
    with torch.no_grad():
        torch.testing.assert_close(found(batch.input_ids).logits, whole(batch.input_ids).logits)
    assert_same_gradients(found, whole, batch)
    try:
        expected = losses_of(whole, batch)
    except UnsupportedAttention:
        with pytest.raises(UnsupportedAttention):
            losses_of(found, batch)
    else:
        got = losses_of(found, batch)
        assert got.keys() == expected.keys()
        for key, loss_B in expected.items():
            torch.testing.assert_close(got[key], loss_B, rtol=1e-6, atol=0)
    assert_holds_nothing(found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2"])
def test_what_comes_into_blocks_may_wait_on_the_disk(
    name: str, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[Path] = []
    save_file = offload.save_file
    monkeypatch.setattr(offload, "HELD_BYTES", 0)
    monkeypatch.setattr(ActivationOffload.__init__, "__defaults__", (0,))
    monkeypatch.setattr(offload, "save_file", lambda tensors, file: files.append(file) or save_file(tensors, file))
    whole = tiny_model(name)
    assert_same_gradients(streamed(whole, tmp_path / "model"), whole, ragged())
    assert len(files) == whole.config.num_hidden_layers - 1  # nothing asks for what comes into the first
    assert not any(file.exists() for file in files)


@pytest.mark.parametrize("ahead", [False, True])
def test_no_more_blocks_are_in_memory_than_the_one_that_runs_and_the_one_that_comes(
    ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TINY["llama"]()
    config.num_hidden_layers = 6
    torch.manual_seed(0)
    whole = type(tiny_model("llama"))(config).eval().requires_grad_(False)
    read, alive, most = streaming._Reader._read, [], []

    def counted(self: object, unit: streaming._Unit) -> dict[str, torch.Tensor]:
        found = read(self, unit)
        if ".layers." in unit.names[0]:
            alive.append(weak := torch.utils.weak.TensorWeakRef(found[unit.names[0]]))
            most.append(sum(ref() is not None for ref in alive))
            del weak
        return found

    monkeypatch.setattr(streaming._Reader, "_read", counted)
    usual = streaming.stream_weights
    monkeypatch.setattr("kvprof.models.load.stream_weights", lambda *given: usual(*given, ahead=ahead))
    found = streamed(whole, tmp_path / "model")
    assert_same_gradients(found, whole, ragged())
    assert max(most) <= (2 if ahead else 1) + ahead  # the next is read before the last one's pages are let go
    assert len(most) >= 2 * 6


@pytest.mark.parametrize("how", [{"max_shard_size": "10KB"}, {}])
def test_a_checkpoint_in_another_dtype_is_cast_block_by_block(how: dict[str, str], tmp_path: Path) -> None:
    source = save(tiny_model("llama").to(torch.bfloat16), tmp_path / "model", **how)
    found = load_model(source, "float32", "cpu", stream=True)
    assert found.dtype == torch.float32
    assert_same_gradients(found, load_model(source, "float32", "cpu"), ragged())


def test_of_a_multimodal_model_the_text_decoder_streams(tmp_path: Path) -> None:
    tower = {"num_hidden_layers": 5, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}
    config = LlavaConfig(
        text_config=tiny_model("llama").config.to_dict(),
        vision_config={"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48} | tower,
    )
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    assert_same_gradients(streamed(whole, tmp_path / "model"), whole, ragged(90))


def test_layers_that_share_keys_cannot_run_one_at_a_time(tmp_path: Path) -> None:
    skip_unknown("gemma3n")
    from transformers import Gemma3nForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = Gemma3nTextConfig(
        **small,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=96,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        laurel_rank=4,
        altup_num_inputs=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
        sliding_window=16,
    )
    with pytest.raises(UnsupportedStreaming, match=r"layer 2 .* another layer's keys.*\n.*--stream"):
        streamed(Gemma3nForCausalLM(config), tmp_path / "model")


def test_a_model_that_asks_its_weights_where_they_are_finds_them_there(tmp_path: Path) -> None:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        hidden_size=32,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=96,
        num_local_experts=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    whole = Llama4ForCausalLM(config).eval().requires_grad_(False)  # sends its ids to where the embedding is
    found = streamed(whole, tmp_path / "model")
    batch = ragged()
    with torch.no_grad():
        torch.testing.assert_close(found(batch.input_ids).logits, whole(batch.input_ids).logits)
    assert_same_gradients(found, whole, batch)


def test_a_streamed_model_says_where_it_computes_and_what_it_stores(tmp_path: Path) -> None:
    whole = tiny_model("llama")
    found = streamed(whole, tmp_path / "model")
    assert input_device(found) == found.device == torch.device("cpu")
    assert streaming.is_streamed(found)
    assert not streaming.is_streamed(whole)
    for name, weight in whole.named_parameters():
        assert found.get_parameter(name).shape == weight.shape
        assert torch.equal(found.stored_weight(name), weight)


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    source = save(tiny_model("llama"), tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(tmp_path / "model", lambda state: state.update({name: state[name][:1].clone()}))
    found = load_model(source, "float32", "cpu", stream=True)
    with pytest.raises(ModelError, match=rf"{name} is 1x32, but the config says 48x32"):
        found(ragged().input_ids)


def test_a_model_without_keys_of_its_own_says_so(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    small = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 96}
    with pytest.raises(ModelError, match="no layer keeps keys and values of its own: recurrent"):
        streamed(MambaForCausalLM(MambaConfig(**small)), tmp_path / "model")


def test_a_gguf_file_is_refused(tmp_path: Path) -> None:
    (file := tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises((UsageError, ModelError)):
        load_model(ModelSource(str(file), "gguf", file), stream=True)


LEFT_BEHIND = """
import os, sys
from kvprof.models.execution.activation_offload import ActivationOffload
offload = ActivationOffload()
print(offload.folder, flush=True)
os._exit(9) if sys.argv[1] == "killed" else None
"""


@pytest.mark.parametrize("end", ["killed", "well"])
def test_what_a_killed_process_left_is_removed_by_the_next(end: str, own_cache: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEFT_BEHIND, end], env=os.environ.copy(), capture_output=True, text=True, check=False
    )
    folder = Path(done.stdout.strip())
    assert folder.exists() == (end == "killed"), done.stderr
    mine, other = ActivationOffload(), ActivationOffload()
    assert mine.folder.exists()
    assert other.folder.exists()  # a living process's, even its own, is left alone
    assert mine.folder.exists()
    assert not folder.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_shelf_gives_back_what_it_was_given(dtype: torch.dtype) -> None:
    tensors = [torch.randn(3, number + 1).to(dtype) for number in range(6)]
    some = ActivationOffload(held_bytes=2 * tensors[0].nbytes + tensors[1].nbytes)
    kept = [some.put(tensor) for tensor in tensors]
    assert {one.file is None for one in kept} == {True, False}
    for tensor, one in zip(tensors, kept, strict=True):
        assert torch.equal(some.take(one), tensor)
    assert list(some.folder.iterdir()) == []


def test_a_folder_from_the_command_line_streams(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "model")
    model = load_model(ModelSource(str(folder), "folder", folder), stream=True)
    assert_holds_nothing(model)
