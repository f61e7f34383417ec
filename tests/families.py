"""Each family of models as a tiny random one, through the whole chain of commands: what came of it, as plain facts.

Reads tiny models; returns what was seen. Does not know what is right (test_model_coverage.py), nor how it is shown
(coverage_table.py).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from folders import save_folder, save_text
from transformers import Cache, DynamicCache, PreTrainedModel
from typer.testing import CliRunner, Result

from kvprof import BitPlan, Scores
from kvprof.cli.app import app
from kvprof.models.inventory import take_inventory
from kvprof.models.load import load_model, resolve
from kvprof.models.skeleton import build_skeleton
from kvprof.records.evaluation import Evaluation
from kvprof.records.formats import TENSORS
from kvprof.records.plan import LatentPlan, TensorPlan, layer_plan
from kvprof.runtime import PlanCache

FAMILIES = {
    "llama": "Llama",
    "llama-mha": "Llama, a KV head for each query head",
    "llama-mqa": "Llama, one KV head",
    "smollm3": "SmolLM3",
    "granite": "Granite",
    "mistral": "Mistral",
    "mistral-sliding": "Mistral with a sliding window",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3-moe": "Qwen3-MoE",
    "qwen3-next": "Qwen3-Next",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "gemma3n": "Gemma 3n",
    "gemma4": "Gemma 4",
    "phi": "Phi",
    "phi3": "Phi-3",
    "gpt2": "GPT-2",
    "gpt-bigcode-mqa": "GPT-BigCode (StarCoder)",
    "gpt-bigcode-mha": "GPT-BigCode, `multi_query=False`",
    "starcoder2": "StarCoder2",
    "gpt-neox": "GPT-NeoX",
    "gptj": "GPT-J",
    "codegen": "CodeGen",
    "gpt-oss": "gpt-oss",
    "bloom": "Bloom",
    "opt": "OPT",
    "falcon-mqa": "Falcon, one KV head (7B)",
    "falcon-mha": "Falcon with alibi (RW)",
    "falcon-grouped": "Falcon, grouped (40B)",
    "mpt": "MPT",
    "olmo2": "OLMo2",
    "cohere": "Cohere",
    "stablelm": "StableLM",
    "jetmoe": "JetMoE",
    "persimmon": "Persimmon",
    "dbrx": "DBRX",
    "deepseek-v2": "DeepSeek-V2",
    "deepseek-v3": "DeepSeek-V3",
    "deepseek-v32": "DeepSeek-V3.2",
    "jamba": "Jamba",
    "bamba": "Bamba",
    "falcon-h1": "Falcon-H1",
    "lfm2": "LFM2",
    "inkling": "Inkling",
    "xglm": "XGLM",
}
"""What each tiny model stands for."""

FULL = TensorPlan(bits=16, group_size=32, axis="token")
TEXT = ("--data", "text.txt", "--pack", "--sequences", "2", "--sequence-length", "48")
WINDOW = ("--sink-tokens", "2", "--recent-tokens", "8")
FORMATS = "int2g8,int4g8,rot2"


def see(name: str) -> dict[str, Any]:
    """Run the chain for one tiny model, in a folder of its own, and return what was seen.

    Layers are listed by number where a command reached them; where it refused, `refused` is its exit code and the first
    line of what it said.
    """
    return see_folder(lambda folder: save_folder(folder, name))


def see_folder(save: Callable[[Path], object]) -> dict[str, Any]:
    """Do as `see` does with the model that `save` puts into a folder."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            save(Path("model"))
            save_text(Path("text.txt"))
            return _see()
        finally:
            os.chdir(here)


def _see() -> dict[str, Any]:
    source = resolve("./model")
    model = load_model(source)
    inventory, skeleton = take_inventory(model.config), build_skeleton(model.config)
    geometry = inventory.geometry
    projection = next(iter(skeleton.projections.values()), None)
    heads = next(((skeleton.query_heads, layer.kv_heads) for layer in geometry.scored), None)
    seen: dict[str, Any] = {
        "architecture": inventory.model.architecture,
        "layers": geometry.num_layers,
        "kinds": [layer.kind for layer in geometry.layers],
        "heads": heads and {"query": heads[0], "key_value": heads[1]},
        "projections": projection and "/".join(projection.layout.names),
        "keeps_a_cache": getattr(model.config, "use_cache", True),
        "red_flags": [flag.name for flag in inventory.red_flags],
        "inspect": _code(_run("inspect", "./model")),
    }
    seen["norms"] = _scored(_run("norms", "./model", "--out", "out"), "norms", "spectral_norm")
    measured = _run("gradients", "./model", "--out", "out", "--formats", FORMATS, *TEXT, *WINDOW)
    seen["loss_increase"] = _scored(measured, "gradients", "loss_increase")
    if measured.exit_code:
        measured = _run("gradients", "./model", "--out", "out", "--formats", "none", *TEXT)
    seen["gradient_norm"] = _scored(measured, "gradients", "gradient_norm")
    scores = next((f"out/{one}.json" for one in ("gradients", "norms") if Path(f"out/{one}.json").exists()), None)
    if scores is None:
        return seen | {"plan": None, "cache": None, "evaluate": None}
    options: tuple[str, ...] = ("--budget", "6", "--unit", "stored", "--group-size", "8")
    if not isinstance(seen["loss_increase"], dict):
        options = options[:4]  # the formats are those that were scored
    allocated = _run("allocate", "--scores", scores, "--out", "out/plan.json", *options, *WINDOW)
    if allocated.exit_code:
        return seen | {"plan": _refused(allocated), "cache": None, "evaluate": None}
    plan = BitPlan.load("out/plan.json")
    assert all(not entry.tensor(tensor).is_full for entry in plan.layers for tensor in TENSORS)
    seen |= {"plan": [entry.layer for entry in plan.layers], "cache": _cached(model, plan)}
    evaluated = _run("evaluate", "out/plan.json", "--model", "./model", "--no-rivals", "--out", "out", *TEXT)
    if evaluated.exit_code:
        return seen | {"evaluate": _refused(evaluated)}
    found = Evaluation.load("out/evaluation.json")
    return seen | {"evaluate": {"path": found.path, "loses": found.plan.kl_nats > 0}}


def _run(*words: str) -> Result:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def _code(result: Result) -> Any:
    return _refused(result) if result.exit_code else True


def _refused(result: Result) -> dict[str, Any]:
    said = next(line for line in result.output.splitlines() if line.startswith("error: "))
    return {"refused": result.exit_code, "says": said.removeprefix("error: ")}


def _scored(result: Result, source: str, metric: str) -> Any:
    """Return the layers whose keys and values both have a metric."""
    if result.exit_code:
        return _refused(result)
    entries = Scores.load(f"out/{source}.json").layers
    return [
        entry.layer for entry in entries if all(getattr(entry.tensor(tensor), metric) is not None for tensor in TENSORS)
    ]


def _cached(model: PreTrainedModel, plan: BitPlan) -> dict[str, bool]:
    """Return whether 16 bits generate what a DynamicCache does, and whether the plan's cache has the plan's bytes."""
    full = (layer_plan(entry.layer, FULL, FULL, isinstance(entry, LatentPlan)) for entry in plan.layers)
    lossless = plan.model_copy(update={"layers": tuple(full)})
    wanted, expected = PlanCache.from_plan(lossless, model), DynamicCache(config=model.config)
    same = torch.equal(_written(model, wanted), _written(model, expected))
    cache = PlanCache.from_plan(plan, model)
    _written(model, cache)
    tokens = cache.get_seq_length()
    return {
        "as_dynamic_cache_in_16_bits": same,
        "bytes_as_planned": cache.nbytes() == cache.plan.bytes_at(tokens),
        "smaller_than_16_bits": cache.nbytes() < wanted.nbytes(),
    }


def _written(model: PreTrainedModel, cache: Cache) -> torch.Tensor:
    """Return the logits of 20 tokens that a model writes after 20 of a prompt."""
    ids = torch.randint(3, 16, (1, 20), generator=torch.Generator().manual_seed(1))
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,  # which the config of MPT says not to
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(written.logits)
