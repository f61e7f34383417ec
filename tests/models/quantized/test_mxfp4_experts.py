"""gpt-oss as it is published: experts in MXFP4, attention in bfloat16."""

from __future__ import annotations

from pathlib import Path

import torch
from coded import edit_file, stored
from folders import edit_json, save_folder
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kvprof.cli.app import app
from kvprof.records.scores import Scores

EXPERTS, HIDDEN = 4, 32
LAST = ["--data", "builtin", "--sequences", "1", "--sequence-length", "32", "--formats", "none", "--out", "out"]


def publish(folder: Path) -> Path:
    """Save a tiny gpt-oss with random codes for its experts."""
    save_folder(folder, "gpt-oss")
    generator = torch.Generator().manual_seed(0)

    def code(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
            _, inputs, outputs = state.pop(name).shape
            blocks = (EXPERTS, outputs, inputs // 32, 16)
            state[f"{name}_blocks"] = torch.randint(0, 256, blocks, generator=generator, dtype=torch.uint8)
            state[f"{name}_scales"] = torch.full(blocks[:3], 120, dtype=torch.uint8)
        state.update({name: tensor.bfloat16() for name, tensor in state.items() if tensor.is_floating_point()})

    edit_file(folder, code)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    edit_json(folder / "config.json", quantization_config=settings, dtype=None, torch_dtype=None)
    return folder


def test_attention_is_read_as_it_is_stored_and_experts_are_left_alone(in_tmp: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import tiny

    monkeypatch.setitem(tiny.TINY, "gpt-oss", tiny._config("GptOss", **GPT_OSS))
    publish(in_tmp / "model")
    first = CliRunner().invoke(app, ["norms", "model", "--out", "out"])
    assert first.exit_code == 0, first.output
    assert "are quantized" not in first.output
    second = CliRunner().invoke(app, ["gradients", "model", *LAST])
    assert second.exit_code == 0, second.output
    norms, gradients = Scores.load("out/norms.json"), Scores.load("out/gradients.json")
    assert norms.model is not None
    assert gradients.model is not None
    assert norms.geometry is not None
    assert gradients.geometry is not None
    assert norms.model.fingerprint == gradients.model.fingerprint
    assert norms.geometry.dtype == gradients.geometry.dtype == "bfloat16"
    key = stored(in_tmp / "model")["model.layers.0.self_attn.k_proj.weight"]
    live = AutoModelForCausalLM.from_pretrained("model", dtype="auto")
    assert torch.equal(live.model.layers[0].self_attn.k_proj.weight, key)


GPT_OSS = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "num_local_experts": EXPERTS,
    "sliding_window": 16,
    "vocab_size": 96,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
