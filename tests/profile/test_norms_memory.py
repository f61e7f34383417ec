"""Does `norms` read a checkpoint as a stream? Peak memory, and bytes off a hub, for the shapes of Llama-3.3-70B."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import running_hub
from transformers import LlamaConfig

from kvprof.records.scores import Scores

LAYERS, HIDDEN, KV_HEADS, INTERMEDIATE, VOCABULARY, SHARDS = 80, 8192, 8, 28672, 128256, 30
KV_WIDTH = KV_HEADS * 128
FILLED = (0, 41)
"""Layers whose K and V hold numbers; the rest of the 141 GB are holes in the files, which read as zeros."""
WEIGHT_BYTES = 2 * KV_WIDTH * HIDDEN
ALLOWED_BYTES = 256 * 2**20

MEASURE = """
import sys
from pathlib import Path
from kvprof.models.load import resolve
from kvprof.profile.norms import run_norms

def peak():  # unlike getrusage's, it is this process's alone, not that of the one that it was forked from
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before = peak()
run = run_norms(resolve(sys.argv[1]), Path(sys.argv[2]))
print(peak() - before, run.fetched.fetched_bytes if run.fetched else 0, run.fetched.whole_bytes if run.fetched else 0)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc, and files have holes")


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
    for head in range(KV_HEADS):
        weight[128 * head, 7 * head] = 1.0 + head + layer
        weight[128 * head + 1, 7 * head + 1] = 0.5
    return (weight * (2 if "k_proj" in name else 1)).bfloat16()


def write_sparse_checkpoint(folder: Path) -> None:
    """Write config, index and shards of bfloat16: the header, the few tensors with numbers, and a length."""
    LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=64,
        num_key_value_heads=KV_HEADS,
        intermediate_size=INTERMEDIATE,
        vocab_size=VOCABULARY,
        max_position_embeddings=131072,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    shapes = tensor_shapes()
    names, weight_map = list(shapes), {}
    for number in range(SHARDS):
        shard = folder / f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        header, offsets, end = {}, {}, 0
        for name in names[number * len(names) // SHARDS : (number + 1) * len(names) // SHARDS]:
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


@pytest.fixture(scope="module")
def seventy_billion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("70b")
    write_sparse_checkpoint(folder)
    yield folder
    for shard in folder.glob("*.safetensors"):
        shard.unlink()


def measured(model: str, folder: Path, **environment: str) -> list[int]:
    """Measure in a process of its own; return its peak memory over the imports, and what it fetched of how much."""
    command = [sys.executable, "-c", MEASURE, model, str(folder)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    layers = Scores.load(folder / "norms.json").layers
    assert len(layers) == LAYERS
    for entry in layers:
        expected = KV_HEADS + float(entry.layer) if entry.layer in FILLED else 0.0
        assert entry.key.spectral_norm == pytest.approx(2 * expected, rel=1e-6)
        assert entry.value.spectral_norm == pytest.approx(expected, rel=1e-6)
        assert len(entry.key.head_spectral_norm or ()) == KV_HEADS
    return [int(number) for number in done.stdout.split()[-3:]]


# The hub comes first: what it reads of the holes, one after the other, the map below finds in the system's memory.
def test_of_seventy_billion_parameters_on_a_hub_two_in_a_hundred_bytes_are_fetched(
    seventy_billion: Path, tmp_path: Path
) -> None:
    with running_hub() as hub:
        hub.models["org/large"] = seventy_billion
        peak_bytes, fetched_bytes, whole_bytes = measured(
            "org/large", tmp_path / "out", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0"
        )
    assert peak_bytes < ALLOWED_BYTES
    assert whole_bytes == sum(shard.stat().st_size for shard in seventy_billion.glob("*.safetensors"))
    assert whole_bytes > 140e9
    assert fetched_bytes == sum(count for name, count in hub.sent_bytes.items() if name.endswith(".safetensors"))
    assert fetched_bytes >= 2 * LAYERS * WEIGHT_BYTES
    assert fetched_bytes < 0.02 * whole_bytes


def test_seventy_billion_parameters_are_measured_in_the_memory_of_two_matrices(
    seventy_billion: Path, tmp_path: Path
) -> None:
    peak_bytes, fetched_bytes, _ = measured(str(seventy_billion), tmp_path)
    assert peak_bytes < ALLOWED_BYTES
    assert fetched_bytes == 0
