"""Does `norms` read a checkpoint as a stream? The peak memory of a process that measures Llama-3.1-8B's shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from kvprof.records.scores import Scores

HIDDEN, LAYERS, KV_WIDTH, INTERMEDIATE, VOCABULARY = 4096, 32, 8 * 128, 14336, 128256
FILLED = (0, 15, 31)
"""Layers whose K and V hold numbers; the rest of the 16 GB are holes in the files, which read as zeros."""
ALLOWED_BYTES = 200 * 2**20 + 2 * (KV_WIDTH * HIDDEN * 2)

MEASURE = """
import resource, sys
from kvprof.models.load import resolve
from kvprof.profile.norms import measure_norms
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
scores, _ = measure_norms(resolve(sys.argv[1]))
after = peak()
scores.save(sys.argv[2])
print((after - before) * (1 if sys.platform == "darwin" else 1024))
"""


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (HIDDEN, HIDDEN),
                "self_attn.k_proj": (KV_WIDTH, HIDDEN),
                "self_attn.v_proj": (KV_WIDTH, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HIDDEN),
                "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
                "mlp.up_proj": (INTERMEDIATE, HIDDEN),
                "mlp.down_proj": (HIDDEN, INTERMEDIATE),
                "input_layernorm": (HIDDEN,),
                "post_attention_layernorm": (HIDDEN,),
            }.items()
        }
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def filling(name: str) -> torch.Tensor:
    """Two entries a head, in different rows and columns: the singular values are the entries."""
    weight = torch.zeros(KV_WIDTH, HIDDEN)
    layer = int(name.split(".")[2])
    for head in range(8):
        weight[128 * head, 7 * head] = 1.0 + head + layer
        weight[128 * head + 1, 7 * head + 1] = 0.5
    return (weight * (2 if "k_proj" in name else 1)).bfloat16()


def write_sparse_checkpoint(folder: Path, shards: int = 4) -> None:
    """Write config, index and shards of bfloat16: the header, the few tensors with numbers, and a length."""
    LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=INTERMEDIATE,
        vocab_size=VOCABULARY,
        max_position_embeddings=131072,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    shapes = tensor_shapes()
    names, weight_map = list(shapes), {}
    share = -(-len(names) // shards)
    for number in range(shards):
        shard = folder / f"model-{number + 1:05}-of-{shards:05}.safetensors"
        header, offsets, end = {}, {}, 0
        for name in names[number * share : (number + 1) * share]:
            offsets[name], end = end, end + 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offsets[name], end]}
            weight_map[name] = shard.name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(shard, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, offset in offsets.items():
                if name.endswith(("k_proj.weight", "v_proj.weight")) and int(name.split(".")[2]) in FILLED:
                    file.seek(8 + len(text) + offset)
                    file.write(filling(name).view(torch.int16).numpy().tobytes())
            file.truncate(8 + len(text) + end)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is read with the resource module")
def test_an_eight_billion_parameter_checkpoint_is_measured_in_the_memory_of_two_matrices(tmp_path: Path) -> None:
    write_sparse_checkpoint(tmp_path)
    try:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path), str(tmp_path / "norms.json")],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        for shard in tmp_path.glob("*.safetensors"):
            shard.unlink()
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < ALLOWED_BYTES
    layers = Scores.load(tmp_path / "norms.json").layers
    assert len(layers) == LAYERS
    for entry in layers:
        expected = 8.0 + entry.layer if entry.layer in FILLED else 0.0
        assert entry.key.spectral_norm == pytest.approx(2 * expected, rel=1e-6)
        assert entry.value.spectral_norm == pytest.approx(expected, rel=1e-6)
        assert len(entry.key.head_spectral_norm) == 8
