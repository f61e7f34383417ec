"""Every reader of a file that a stranger could have made, what it may raise, and sound files to start from."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvprof.allocate.budget import bit_limit
from kvprof.allocate.methods import exact
from kvprof.errors import KvprofError
from kvprof.models.checkpoint.gguf_header import read_gguf_header
from kvprof.models.checkpoint.shards import LENGTH_BYTES, find_shards, header_bytes, parse_header
from kvprof.models.own_code import find_code
from kvprof.profile.shards import merge_shards, seal
from kvprof.records.effects import encode
from kvprof.records.history import History, StepTaken
from kvprof.records.kinds import load_any
from kvprof.records.plan import BitPlan
from kvprof.records.recipe import read_recipe
from kvprof.records.scores import LOSS_INCREASE, Scores
from kvprof.storage.journal import Journal, _line
from kvprof.targets.kvtuner_import import kvtuner_plan, read_kvtuner

CORPUS = Path(__file__).parent.parent / "data" / "fuzz"
"""A folder for each reader: inputs that a defect was found with, and are read again by each run of the tests."""


@dataclass(frozen=True)
class Reader:
    """What reads a file, the errors that it may leave with, and files that it takes.

    read: given where the file lies; raises nothing but `refuses`. words: pieces that mean something to it.
    """

    read: Callable[[Path], None]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...] = ()
    refuses: tuple[type[Exception], ...] = (KvprofError,)


# Sound files


def _scores() -> dict[str, Any]:
    return {
        "schema": "kvprof.scores/1",
        "source": "gradients",
        "kvprof_version": "0.1.0",
        "model": {"id": "org/name", "fingerprint": "sha256:00", "architecture": "LlamaForCausalLM", "num_layers": 2},
        "calibration": {"dataset": "builtin", "split": None, "sequences": 2, "sequence_length": 8, "tokens": 16,
                        "seed": 0, "fingerprint": "sha256:11"},
        "geometry": {
            "dtype": "float16",
            "layers": [
                {"layer": layer, "kind": "full", "kv_heads": 2, "key_head_dim": 64, "value_head_dim": 64}
                for layer in range(2)
            ],
        },
        "layers": [
            {
                "layer": layer,
                "key": {"gradient_norm": 0.1, "spectral_norm": 2.5, "head_spectral_norm": [1.0, 2]},
                "value": {"loss_increase": {"int2g32": 0.01}, "loss_increase_stderr": {"int2g32": 1e-5}},
            }
            for layer in range(2)
        ],
    }  # fmt: skip


def _scores_with_effects() -> dict[str, Any]:
    value = _scores()
    value["effects"] = {"block_tokens": 2, "bandwidth_blocks": 2, "tokens": [4, 3]}
    for entry in value["layers"]:
        for tensor in ("key", "value"):
            entry[tensor] = {
                "loss_increase": {"int2g32": 0.01, "int4g32": 0.001},
                "loss_effects": {"int2g32": [encode(0.08, [0.2, -0.1])] * 2, "int4g32": [encode(0, [0, -0.0])] * 2},
            }
    return value


def _shard() -> dict[str, Any]:
    value = _scores()
    text = value["calibration"] | {"sequences": 1, "tokens": 8}
    for entry in value["layers"]:
        for tensor in ("key", "value"):
            entry[tensor] = {"gradient_norm": 0.1, "gradient_norm_samples": [0.1], "loss_increase": {"int2g32": 0.01},
                             "loss_increase_samples": {"int2g32": [0.01]},
                             "loss_effects": {"int2g32": [encode(0.08, [0.2, -0.1])]}}  # fmt: skip
    value["calibration"] = text
    value["effects"] = {"block_tokens": 3, "bandwidth_blocks": 1, "tokens": [4]}
    value["shard"] = {"number": 1, "of": 1, "sequences": [0], "text": text, "settings": {"seed": 0}, "checksum": ""}
    value["shard"]["checksum"] = seal(Scores.from_json(value, "shard"))
    return value


def _plan() -> dict[str, Any]:
    return {
        "schema": "kvprof.plan/1",
        "kvprof_version": "0.1.0",
        "model": {"id": "org/name", "fingerprint": "sha256:00", "architecture": "LlamaForCausalLM", "num_layers": 2},
        "budget": {"requested": 2.5, "unit": "nominal", "nominal_bits": 2.5, "stored_bits": 3.5, "bytes_per_token": 9},
        "quantizer": {"scale_dtype": "float16", "zero_dtype": "float16", "rotation_seed": 0},
        "window": {"sink_tokens": 4, "recent_tokens": 128},
        "geometry": _scores()["geometry"],
        "layers": [
            {
                "layer": layer,
                "key": {"bits": 4, "group_size": 32, "axis": "channel", "clip": "mse", "recent_fraction": 0.1},
                "value": {"scheme": "rotated", "bits": 2, "group_size": 64, "axis": "token", "clip": "none"},
            }
            for layer in range(2)
        ],
        "solver": {"method": "exact", "metric": "loss_increase", "objective": 0.03, "optimal": True},
        "provenance": {"scores": "sha256:22", "command": "kvprof allocate --budget 2.5"},
    }  # fmt: skip


SETTINGS = {"model": "org/name", "formats": ["int2g32"], "tokens": 512}

RECIPE = """description = "A recipe"
model = "demo"
[text]
data = ["builtin", "./a.txt:2"]
sequences = 4
[gradients]
formats = "int2g32,value:rot2"
[[plans]]
budgets = [2.5, 3]
name = "a"
pin = ["0:key:4"]
[evaluate]
sequence_length = 512
[[targets]]
runtime = "vllm"
"""


def _gguf() -> bytes:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    fields = [
        text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama"),
        text(b"llama.block_count") + struct.pack("<II", 4, 2),
        text(b"general.alignment") + struct.pack("<II", 4, 32),
        text(b"tokens") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text("é".encode()),
        text(b"nested") + struct.pack("<IIQIQ", 9, 9, 1, 6, 2) + struct.pack("<2f", 1, 2),
        text(b"flag") + struct.pack("<IB", 7, 1),
    ]
    tensors = [
        text(b"blk.0.attn_k.weight") + struct.pack("<I2QIQ", 2, 32, 2, 2, 0),
        text(b"blk.0.attn_v.weight") + struct.pack("<I2QIQ", 2, 4, 2, 0, 64),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)) + b"".join(fields + tensors)
    return head + b"\0" * (-len(head) % 32) + b"\0" * 96


def _safetensors() -> bytes:
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
            "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
        }
    ).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 34


def _history() -> bytes:
    step = StepTaken(arguments=("norms",), kvprof_version="0.1.0", model=None, reads={"a": "b"}, writes={"c": "d"})
    return History(steps={"norms": step}).to_text().encode()


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1).encode()


# Readers, with what is done at once with what they read


def _read_scores(path: Path) -> None:
    scores = Scores.load(path)
    assert Scores.from_json(json.loads(scores.to_text()), "again") == scores
    assert isinstance(scores.metrics, tuple)
    if scores.effects is not None and LOSS_INCREASE in scores.metrics:
        assert exact(scores, bit_limit(4, "stored")).solver is not None


def _read_plan(path: Path) -> None:
    plan = BitPlan.load(path)
    assert BitPlan.from_json(json.loads(plan.to_text()), "again") == plan
    if plan.geometry is not None:
        assert plan.bytes_at(1_000) >= 0


def _read_shard(path: Path) -> None:
    merge_shards({path: Scores.load(path)}).to_text()


def _read_journal(path: Path) -> None:
    with Journal(path, SETTINGS) as journal:
        assert isinstance(journal.done, dict)


def _read_kvtuner(path: Path) -> None:
    kvtuner_plan(read_kvtuner(path)).to_text()


def _read_safetensors(path: Path) -> None:
    content = path.read_bytes()
    stop = LENGTH_BYTES + header_bytes(content[:LENGTH_BYTES], len(content))
    parse_header(content[LENGTH_BYTES:stop], len(content))


def _read_index(path: Path) -> None:
    names = ["model.safetensors.index.json", "a.safetensors", "b.safetensors"]
    for shard in find_shards(names, lambda: path.read_bytes().decode(), "here").files:
        assert shard in names


def _read_config(path: Path) -> None:
    folder = path.parent / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(path.read_bytes())
    from kvprof.models.checkpoint.validation import check_config

    check_config(folder)
    code = find_code(folder)
    assert code is None or not any("/" in name or "\\" in name for name in code.files)


READERS: dict[str, Reader] = {
    "scores": Reader(
        _read_scores,
        (_json(_scores()), _json(_scores_with_effects())),
        (b"NaN", b"1e999", b"-0.0", b'"layer"', b"9" * 5_000, b"f38=", b"AACAfw==", b'"bandwidth_blocks"'),
    ),
    "plan": Reader(_read_plan, (_json(_plan()),), (b"NaN", b"16", b'"rotated"', b'"axis"', b"9" * 5_000)),
    "shard": Reader(_read_shard, (_json(_shard()),), (b"[0]", b"null", b'"sequences"')),
    "history": Reader(lambda path: _ignore(History.load(path)), (_history(),), (b"null", b'"steps"')),
    "any": Reader(
        lambda path: _ignore(load_any(path)),
        (_json(_plan()), _json(_scores())),
        (b"kvprof.audit/1", b"kvprof.spectra/1", b"kvprof.evaluation/1", b"kvprof.frontier/1", b"kvprof.benchmark/1"),
    ),
    "recipe": Reader(
        lambda path: _ignore(read_recipe(path)), (RECIPE.encode(),), (b"[[plans]]", b"= 1e999", b"[a.b]", b'"""', b"{}")
    ),
    "journal": Reader(
        _read_journal,
        ("".join(_line(key, value) for key, value in [("settings", SETTINGS), ("a", [1, 2.5]), ("b", None)]).encode(),),
        (b"\n", b'["settings", '),
    ),
    "kvtuner": Reader(
        _read_kvtuner,
        (
            b"0: {nbits_key: 4, nbits_value: 2}\n1: {nbits_key: 8, nbits_value: 4}\n",
            b"0:\n  nbits_key: 4\n  nbits_value: 2\n",
        ),
        (b"&a ", b"*a", b"<<: ", b"!!python/object/apply:os.system ", b"? ", b"- ", b"---\n", b"|\n", b"'", b"{"),
    ),
    "gguf": Reader(
        lambda path: _ignore(read_gguf_header(path.read_bytes())),
        (_gguf(),),
        (b"\x09\0\0\0", b"\xff" * 8),
        (ValueError,),
    ),
    "safetensors": Reader(_read_safetensors, (_safetensors(),), (b'"F4"', b"[0, 0]", b"[[", b"1e9"), (ValueError,)),
    "index": Reader(
        _read_index,
        (_json({"metadata": {}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}),),
        (b"../", b"\\", b".bin", b"[]", b"null"),
    ),
    "config": Reader(
        _read_config,
        (_json({"model_type": "own", "num_hidden_layers": 2, "text_config": {"n_layer": 3},
                "auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "c.D"}}),),
        (b"--", b"../", b"attn_implementation", b"999999", b"null"),
    ),
}  # fmt: skip


def _ignore(_: object) -> None:
    return None


def corpus(name: str) -> Iterator[Path]:
    """Yield the inputs that a defect of a reader was found with."""
    yield from sorted((CORPUS / name).glob("*"))
