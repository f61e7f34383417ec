"""Quantized weights that a package is missing for, or that transformers cannot load; adapters without their model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from coded import code_folder
from folders import edit_json, edit_weights, save_folder
from tiny import tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from typer.testing import CliRunner, Result

from kvprof.cli.app import app
from kvprof.errors import ModelError, UsageError
from kvprof.models.load import lend, load_model, resolve
from kvprof.models.packages import plain_weights

LAST = ["--data", "builtin", "--sequences", "1", "--sequence-length", "32", "--formats", "none", "--out", "out"]


def run(*words: str) -> Result:
    return CliRunner().invoke(app, [*words])


def refusal(*words: str) -> str:
    result = run(*words)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert not list(Path("out").glob("*.json"))
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    ("settings", "package", "command"),
    [
        ({"quant_method": "compressed-tensors"}, "compressed-tensors", "pip install 'kvprof-bits[compressed-tensors]'"),
        ({"quant_method": "gptq", "bits": 4}, "optimum and gptqmodel", "pip install 'kvprof-bits[gptq]'"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel", "pip install 'kvprof-bits[gptq]'"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "bitsandbytes",
            "pip install 'kvprof-bits[bitsandbytes]'",
        ),
        ({"load_in_8bit": True}, "bitsandbytes", "pip install 'kvprof-bits[bitsandbytes]'"),
        ({"quant_method": "hqq"}, "hqq", "pip install hqq"),
        ({"quant_method": "quanto"}, "optimum-quanto", "pip install optimum-quanto"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_missing_package_is_named_with_its_extra(
    in_tmp: Path, settings: dict[str, object], package: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvprof.models.packages._is_installed", lambda module: False)
    edit_json(save_folder(in_tmp / "model") / "config.json", quantization_config=settings)
    said = refusal("gradients", "model", *LAST)
    assert f"loading it needs the package {package}, which is not installed" in said
    assert command in said


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq"])
def test_weights_that_cannot_be_streamed_say_so(in_tmp: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvprof.models.packages._is_installed", lambda module: True)
    edit_json(save_folder(in_tmp / "model") / "config.json", quantization_config={"quant_method": method})
    said = refusal("gradients", "model", "--stream", *LAST)
    assert (
        f"is quantized with {method}, whose weights cannot be loaded one block at a time. Leave out --stream." in said
    )


SCHEME = {"num_bits": 4, "type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False}


def add_cache_scheme(folder: Path, **settings: object) -> Path:
    """Let a folder want keys and values rounded to 4 bits, as compressed-tensors does it in front of every cache."""
    scales = [f"model.layers.{layer}.self_attn.{side}_scale" for layer in range(2) for side in "kv"]
    edit_weights(folder, lambda state: state.update({name: torch.tensor([0.5]) for name in scales}))
    method = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    edit_json(folder / "config.json", quantization_config=method | {"kv_cache_scheme": SCHEME} | settings)
    return folder


@torch.no_grad()
def cached_keys(model: PreTrainedModel) -> list[Tensor]:
    cache = DynamicCache(config=model.config)
    model(torch.arange(12)[None], past_key_values=cache)
    return [layer.keys for layer in cache.layers]


def test_a_checkpoints_scheme_for_the_cache_is_left_to_the_plan(in_tmp: Path) -> None:
    truth = cached_keys(load_model(resolve(str(save_folder(in_tmp / "plain")))))
    folder = add_cache_scheme(save_folder(in_tmp / "model"), format="dense", config_groups={})
    for model in (load_model(resolve(str(folder))), load_model(resolve(str(folder)), stream=True)):
        assert all(map(torch.equal, cached_keys(model), truth))
    assert run("norms", "model", "--out", "out").exit_code == 0


def test_quantized_weights_are_loaded_without_the_scheme_for_the_cache(in_tmp: Path) -> None:
    pytest.importorskip("compressed_tensors")
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    settings = {"format": "float-quantized", "ignore": ["lm_head"], "config_groups": groups}

    def code(module: str, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / 448
        return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale.bfloat16()}

    plain = {"quant_method": "compressed-tensors", "quantization_status": "compressed"} | settings
    truth = cached_keys(load_model(resolve(str(code_folder(in_tmp / "plain", code, plain)))))
    folder = add_cache_scheme(code_folder(in_tmp / "model", code, plain), **settings)
    assert all(map(torch.equal, cached_keys(load_model(resolve(str(folder)))), truth))


def test_a_loaded_model_that_rounds_its_keys_itself_is_refused(in_tmp: Path) -> None:
    pytest.importorskip("compressed_tensors")
    folder = add_cache_scheme(save_folder(in_tmp / "model"), format="dense", config_groups={})
    live = AutoModelForCausalLM.from_pretrained(folder)
    if not any(name.endswith("kv_cache") for name, _ in live.named_modules()):
        pytest.skip("this transformers and this compressed-tensors leave the scheme out")
    with pytest.raises(UsageError, match="rounds its keys and values itself, by its checkpoint's kv_cache_scheme"):
        load_model(lend(live))


def test_every_extra_that_is_named_is_one() -> None:
    from kvprof.models.packages import _EXTRAS

    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for extra in _EXTRAS.values():
        assert f"\n{extra} = [" in pyproject


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "modelopt"}, "quantized by modelopt, which transformers cannot load"),
        ({"bits": 4, "group_size": 64}, "names no quant_method, as MLX's does not"),
    ],
)
def test_what_transformers_cannot_load_is_said(in_tmp: Path, settings: dict[str, object], said: str) -> None:
    """transformers itself goes on without the scales where it does not know the method."""
    code = lambda module, weight: {"weight": weight.to(torch.float8_e4m3fn), "weight_scale": torch.ones(())}  # noqa: E731
    code_folder(in_tmp / "model", code, settings)
    assert said in refusal("gradients", "model", *LAST)
    assert run("norms", "model", "--out", "other").exit_code == 0


class _Coded(nn.Module):
    """A layer as GPTQModel's are: codes, and a method that makes a weight of them, (in_features, out_features)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(1, dtype=torch.int32))
        self._weight, self.bias = weight, None

    def dequantize_weight(self) -> Tensor:
        return self._weight.T.half()


def test_layers_of_codes_become_linear_ones() -> None:
    model = tiny_model("llama")
    weight = model.model.layers[1].self_attn.k_proj.weight.clone()
    model.model.layers[1].self_attn.k_proj = _Coded(weight)
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(to_dict=lambda: {"quant_method": "gptq"}))
    plain = plain_weights(model)
    assert torch.equal(plain.model.layers[1].self_attn.k_proj.weight, weight.half().float())
    ids = torch.tensor([[1, 2, 3]])
    assert plain(ids).logits.shape == (1, 3, 96)


def test_codes_that_nobody_can_dequantize_are_refused() -> None:
    model = tiny_model("llama")
    layer = _Coded(model.model.layers[1].self_attn.k_proj.weight)
    layer.dequantize_weight = None  # type: ignore[assignment, method-assign]
    model.model.layers[1].self_attn.k_proj = layer
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(to_dict=lambda: {"quant_method": "awq"}))
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.k_proj is a _Coded"):
        plain_weights(model)


def adapter(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


@pytest.mark.parametrize("command", ["inspect", "norms", "gradients"])
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"base_model_name_or_path": "org/base"}, "holds an adapter of org/base (adapter_config.json), and no model"),
        ({"model": "org/base", "fine_tune_type": "lora"}, "holds an adapter of org/base (adapter_config.json)"),
        ({"base_model_name_or_path": None}, "holds an adapter (adapter_config.json), and no model"),
        ({"base_model_name_or_path": ["a"]}, "holds an adapter (adapter_config.json), and no model"),
    ],
    ids=["peft", "mlx", "no base", "no name"],
)
def test_an_adapter_names_its_model(in_tmp: Path, config: dict[str, object], said: str, command: str) -> None:
    adapter(in_tmp / "lora", **config)
    assert said in refusal(command, "lora")


def test_an_adapter_beside_weights_names_its_model_too(in_tmp: Path) -> None:
    folder = save_folder(in_tmp / "model")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert "holds an adapter of org/base" in refusal("norms", "model", "--out", "out")


def test_the_tokenizer_of_an_adapter_can_be_taken(in_tmp: Path) -> None:
    save_folder(in_tmp / "model")
    adapter(in_tmp / "lora", base_model_name_or_path="org/base")
    for file in (in_tmp / "model").glob("tokenizer*"):
        file.rename(in_tmp / "lora" / file.name)
    result = run("gradients", "model", "--tokenizer", "lora", *LAST)
    assert result.exit_code == 0, result.output
