"""What is written for a runtime, read back as that runtime reads it, is the plan again.

The readers here know the runtimes' own syntax, from the sources that they name, and nothing of kvprof's.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from folders import save_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprof.allocate.assemble import assemble, tensors_of
from kvprof.allocate.constraints import FirstLastRest, Ranges, SomeInFull, Table
from kvprof.allocate.target import WHOLE_CACHE, Target
from kvprof.allocate.unscored import uniform_plan
from kvprof.errors import Inexpressible
from kvprof.models.inventory import take_inventory
from kvprof.models.load import load_model, load_tokenizer, resolve
from kvprof.records.document import ModelInfo
from kvprof.records.formats import TENSORS, format_named, parse_formats
from kvprof.records.geometry import CacheGeometry, KVLayer
from kvprof.records.plan import BitPlan, Provenance, Quantizer, Window
from kvprof.runtime import PlanCache
from kvprof.targets.kvtuner_import import kvtuner_plan, read_kvtuner
from kvprof.targets.registry import TARGETS, WRITERS, export

LAYERS = 8
HEAD_DIM = 128
KVTUNER = Path(__file__).parents[1] / "data" / "kvtuner_llama31_8b_kivi_4_1.yaml"

Words = dict[tuple[int, str], str]
"""A layer, its keys or values, and the word of the runtime that it was given."""


def geometry_of(dtype: str, num_layers: int = LAYERS) -> CacheGeometry:
    layers = (
        KVLayer(layer=layer, kind="full", kv_heads=2, key_head_dim=HEAD_DIM, value_head_dim=HEAD_DIM)
        for layer in range(num_layers)
    )
    return CacheGeometry(dtype=dtype, layers=tuple(layers))


def plan_of(
    names: Mapping[tuple[int, str], str],
    window: Window = WHOLE_CACHE,
    num_layers: int = LAYERS,
    dtype: str = "float16",
) -> BitPlan:
    geometry = geometry_of(dtype, num_layers)
    tensors = tensors_of({shape.layer: shape for shape in geometry.layers})
    return assemble(
        tensors,
        [format_named(names[tensor.layer, tensor.name], tensor.name, HEAD_DIM) for tensor in tensors],
        model=ModelInfo(id="org/model", num_layers=num_layers),
        geometry=geometry,
        quantizer=Quantizer(),
        window=window,
        solver=None,
        provenance=Provenance(),
    )


@st.composite
def sayable(draw: st.DrawFn, target: Target) -> dict[tuple[int, str], str]:
    """Draw what a target can be told."""
    constraints, layers = target.constraints, range(LAYERS)
    if isinstance(constraints, FirstLastRest):
        cells = {(layer, tensor): {} for layer in layers for tensor in TENSORS}
        sides = {}
        for tensor in TENSORS:
            first, last, rest = (draw(st.sampled_from(constraints.formats_of(tensor))) for _ in range(3))
            head = draw(st.integers(0, LAYERS))
            sides[tensor] = Ranges(first, head, last, draw(st.integers(0, LAYERS - head)), rest)
        return dict(constraints.assigned(Table(cells, LAYERS), sides))
    if isinstance(constraints, SomeInFull):
        word = draw(st.sampled_from(sorted(constraints.pairs)))
        full = draw(st.sets(st.sampled_from(layers))) | constraints.forced(word, LAYERS)
        pairs = [("full", "full") if layer in full else constraints.pairs[word] for layer in layers]
    elif hasattr(constraints, "pairs"):
        words = st.sampled_from(sorted(constraints.pairs))
        one = draw(words)
        pairs = [constraints.pairs[one if target.words.endswith("all layers") else draw(words)] for _ in layers]
    else:
        pair = st.tuples(*(st.sampled_from(target.formats_of(tensor)) for tensor in TENSORS))
        one = draw(pair)
        pairs = [one if target.name == "llama.cpp" else draw(pair) for _ in layers]
    return {(layer, tensor): pairs[layer][place] for layer in layers for place, tensor in enumerate(TENSORS)}


def flags(text: str) -> dict[str, list[str]]:
    """Read a command line: each flag with the words up to the next one."""
    found: dict[str, list[str]] = {}
    for word in shlex.split(text):
        if word.startswith("-") and not word[1:].isdigit():
            assert word not in found, f"{word} stands twice"
            found[word] = []
        else:
            list(found.values())[-1].append(word)
    return found


def everywhere(key: str, value: str) -> Words:
    return {(layer, tensor): word for layer in range(LAYERS) for tensor, word in (("key", key), ("value", value))}


# common/arg.cpp of llama.cpp: kv_cache_types
LLAMA_CPP_TYPES = {"f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"}


def read_llama_cpp(text: str) -> Words:
    found = flags(text)
    assert set(found) == {"-fa", "-ctk", "-ctv"}
    assert found["-fa"] == ["on"]  # quantized V cache requires flash_attn to be enabled
    (key,), (value,) = found["-ctk"], found["-ctv"]
    assert {key, value} <= LLAMA_CPP_TYPES
    return everywhere(key, value)


def read_ik_llama_cpp(text: str) -> Words:
    """common/common.cpp and llama_kv_cache_init of ik_llama.cpp, condition by condition."""
    found = flags(text)
    assert found.pop("-fa") == ["on"]
    words: Words = {}
    for tensor, flag in (("key", "-ctk"), ("value", "-ctv")):
        (base,) = found.pop(flag)
        ranges = {}
        for end in ("first", "last"):
            kind, count = found.pop(f"{flag}-{end}", ["f16,-1"])[0].split(",")
            ranges[end] = kind, int(count)
        for layer in range(LAYERS):
            this = base
            if ranges["first"][0] != base and ranges["first"][1] > 0 and layer < ranges["first"][1]:
                this = ranges["first"][0]
            if ranges["last"][0] != base and ranges["last"][1] > 0 and layer >= LAYERS - ranges["last"][1]:
                this = ranges["last"][0]
            assert this in LLAMA_CPP_TYPES | {"q6_0"}
            words[layer, tensor] = this
    assert not found
    return words


# vllm/config/cache.py: CacheDType; and TurboQuant's own bits of keys and values, its config.py
VLLM = {
    "fp8_e4m3": ("fp8_e4m3", "fp8_e4m3"),
    "fp8_e5m2": ("fp8_e5m2", "fp8_e5m2"),
    "nvfp4": ("nvfp4", "nvfp4"),
    "nvfp4_4over6": ("nvfp4_4over6", "nvfp4_4over6"),
    "int4_per_token_head": ("int4_per_token_head", "int4_per_token_head"),
    "int8_per_token_head": ("int8_per_token_head", "int8_per_token_head"),
    "fp8_per_token_head": ("fp8_per_token_head", "fp8_per_token_head"),
    "ultraquant_4bit": ("ultraquant_k4", "ultraquant_v4"),
    "turboquant_k8v4": ("fp8_e4m3", "turbo_v4"),
    "turboquant_4bit_nc": ("turbo_k4", "turbo_v4"),
    "turboquant_k3v4_nc": ("turbo_k3", "turbo_v4"),
    "turboquant_3bit_nc": ("turbo_k3", "turbo_v3"),
}


def read_vllm(text: str) -> Words:
    found = flags(text)
    (dtype,) = found["--kv-cache-dtype"]
    if dtype in ("auto", "float16", "bfloat16"):
        return everywhere("full", "full")
    skipped = {int(layer) for layer in found.get("--kv-cache-dtype-skip-layers", [])}
    if dtype.startswith(("turboquant", "ultraquant")):  # get_boundary_skip_layers
        skipped |= {0, 1, LAYERS - 2, LAYERS - 1}
    pairs = [("full", "full") if layer in skipped else VLLM[dtype] for layer in range(LAYERS)]
    return {(layer, tensor): pairs[layer][place] for layer in range(LAYERS) for place, tensor in enumerate(TENSORS)}


def read_modelopt(text: str) -> Words:
    """The layer map that Model-Optimizer's own tests of pull request 2272 expect."""
    quantization = json.loads(text)["quantization"]
    assert quantization["kv_cache_schema_version"] == 1
    algos = {"FP8": "fp8_e4m3", "NVFP4": "nvfp4"}
    words: Words = {}
    for module, entry in quantization["kv_cache_quantized_layers"].items():
        layer = int(re.fullmatch(r"model\.layers\.(\d+)\.self_attn", module)[1])
        words |= {(layer, tensor): algos[entry["quant_algo"]] for tensor in TENSORS}
    found = {entry["quant_algo"] for entry in quantization["kv_cache_quantized_layers"].values()}
    uniform = len(found) == 1 and len(words) == 2 * LAYERS
    assert quantization["kv_cache_quant_algo"] == (found.pop() if uniform else "MIXED_PRECISION" if found else None)
    return everywhere("full", "full") | words


def read_compressed_tensors(text: str) -> Words:
    """What `validate_kv_cache_scheme` of vLLM 0.33.0 wants of it."""
    config = json.loads(text)["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    scheme = config["kv_cache_scheme"]
    assert (scheme["type"], scheme["num_bits"], scheme["symmetric"], scheme["dynamic"]) == ("float", 8, True, False)
    assert scheme["strategy"] in ("tensor", "attn_head")
    return everywhere("fp8_e4m3", "fp8_e4m3")


def read_sglang(text: str) -> Words:
    ((flag, (word,)),) = flags(text).items()
    assert flag == "--kv-cache-dtype"
    # sglang/srt/arg_groups/fields/model.py of 0.5.23
    assert word in {"auto", "fp8_e5m2", "fp8_e4m3", "mxfp8", "bf16", "bfloat16", "nvfp4", "fp4_mx_block16"}
    name = {"auto": "full", "bfloat16": "full"}.get(word, word)
    return everywhere(name, name)


def read_lmdeploy(text: str) -> Words:
    ((flag, (word,)),) = flags(text).items()
    assert flag == "--quant-policy"
    names = {"0": "full", "4": "lmdeploy_int4", "8": "lmdeploy_int8", "16": "fp8_e4m3", "17": "fp8_e5m2"}
    if word == "42":  # lmdeploy/messages.py: K=4bit QJL4 + V=2bit MSE
        return everywhere("lmdeploy_turbo_k4", "lmdeploy_turbo_v2")
    return everywhere(names[word], names[word])


def read_tensorrt_llm(text: str) -> Words:
    ((key, ((field, word),)),) = ((key, value.items()) for key, value in yaml.safe_load(text).items())
    assert (key, field) == ("kv_cache_config", "dtype")
    full = dict.fromkeys(("auto", "float16", "bfloat16", "float32"), "full")
    name = ({"fp8": "fp8_e4m3", "nvfp4": "nvfp4"} | full)[word]
    return everywhere(name, name)


def read_mlx_vlm(text: str) -> Words:
    found = {flag: int(word) for flag, (word,) in flags(text).items()}
    assert found.pop("--quantized-kv-start") == 0
    name = f"mlx{found.pop('--kv-bits')}g{found.pop('--kv-group-size')}"
    assert not found
    return everywhere(name, name)


def run_module(text: str, module: str, **names: Any) -> dict[str, Any]:
    """Run a Python artefact whose runtime is not here: what it imports from it is given by name."""
    tree = ast.parse(text)
    imported = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == module]
    assert {alias.name for node in imported for alias in node.names} == set(names)
    tree.body = [node for node in tree.body if node not in imported and not isinstance(node, ast.ImportFrom)]
    tree.body = [node for node in tree.body if not (isinstance(node, ast.Import) and node.names[0].name == "mlx.core")]
    namespace = dict(names)
    exec(compile(tree, "artefact", "exec"), namespace)
    return namespace


def read_mlx_lm(text: str) -> Words:
    class KVCache:
        pass

    class QuantizedKVCache:
        def __init__(self, group_size: int = 64, bits: int = 8) -> None:  # mlx_lm/models/cache.py
            self.group_size, self.bits = group_size, bits

    names = {
        "KVCache": KVCache,
        "QuantizedKVCache": QuantizedKVCache,
        "make_prompt_cache": lambda model, max_kv_size=None: [KVCache() for _ in range(LAYERS)],
    }
    made = run_module(text, "mlx_lm.models.cache", **names)
    cache = made["planned_cache"](object())
    for one in cache:  # of other widths mlx-lm's own first zeros have another shape than what they take
        assert isinstance(one, made["PlannedKVCache"]) == (getattr(one, "bits", 4) in (3, 5, 6))
    words = [f"mlx{one.bits}g{one.group_size}" if isinstance(one, QuantizedKVCache) else "full" for one in cache]
    return {(layer, tensor): word for layer, word in enumerate(words) for tensor in TENSORS}


def read_exllamav3(text: str) -> Words:
    class CacheLayerQuant:
        def __init__(
            self, config: Any, attention: Any, cache_id: int, max_num_tokens: int, k_bits: int, v_bits: int
        ) -> None:  # exllamav3/cache/quant.py
            assert {k_bits, v_bits} <= set(range(2, 9))
            self.k_bits, self.v_bits = k_bits, v_bits

    made = run_module(text, "exllamav3.cache.quant", CacheLayer_quant=CacheLayerQuant)["PlannedCacheLayer"]
    words: Words = {}
    for layer in range(LAYERS):
        attention = type("Attention", (), {"layer_idx": layer})()
        one = made(None, attention, 7, 8192)
        words |= {(layer, "key"): f"exl3_{one.k_bits}", (layer, "value"): f"exl3_{one.v_bits}"}
    return words


def read_kvtuner_yaml(text: str) -> Words:
    rows = yaml.safe_load(text)
    return {(layer, tensor): f"int{row[f'nbits_{tensor}']}g32" for layer, row in rows.items() for tensor in TENSORS}


READERS: dict[str, Callable[[str], Words]] = {
    "ik_llama.cpp": read_ik_llama_cpp,
    "llama.cpp": read_llama_cpp,
    "vllm": read_vllm,
    "modelopt": read_modelopt,
    "compressed-tensors": read_compressed_tensors,
    "sglang": read_sglang,
    "lmdeploy": read_lmdeploy,
    "tensorrt-llm": read_tensorrt_llm,
    "mlx-vlm": read_mlx_vlm,
    "mlx-lm": read_mlx_lm,
    "exllamav3": read_exllamav3,
    "kvtuner": read_kvtuner_yaml,
}


def test_every_target_is_read_back() -> None:
    assert set(READERS) == set(WRITERS) == set(TARGETS) - {"transformers"}


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_an_artefact_read_by_its_runtime_is_the_plan_again(name: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["float16", "bfloat16", "float32"]))
    target = TARGETS[name].for_model(geometry_of(dtype))
    names = data.draw(sayable(target))
    plan = plan_of(names, target.window, dtype=dtype)
    found = READERS[name](WRITERS[name](plan).text)
    assert as_read(found, name) == {place: without_dtype(word) for place, word in names.items()}


def as_read(found: Words, name: str) -> Words:
    ggml = {"f16": "full"} if "llama" in name else {}
    return {place: ggml.get(word, word) for place, word in found.items()}


def without_dtype(name: str) -> str:
    """Return what a runtime calls a format: it has no word for the dtype of scales, nor for what comes before."""
    return re.sub("_(bf16|f32|rot|rot64|gguf|rot_gguf)$", "", name)


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_plan_is_either_told_exactly_or_refused_with_a_command(name: str, data: st.DataObject) -> None:
    target = TARGETS[name].for_model(geometry_of("float16"))
    choices = [tuple(dict.fromkeys([*target.formats_of(tensor), "full", "rot3"])) for tensor in TENSORS]
    names = {
        (layer, tensor): data.draw(st.sampled_from(choices[place]))
        for layer in range(LAYERS)
        for place, tensor in enumerate(TENSORS)
    }
    plan = plan_of(names, target.window)
    refused, text = "", ""
    try:
        text = WRITERS[name](plan).text
    except Inexpressible as error:
        refused = str(error)
    if refused:
        before, _, budget = refused.rpartition(" --budget ")
        assert before.endswith(f"kvprof allocate --target {name}")
        assert float(budget) > 0  # tests/cli/test_targets.py runs the command
        return
    assert as_read(READERS[name](text), name) == {place: without_dtype(word) for place, word in names.items()}


@pytest.mark.parametrize(
    ("target", "form", "stands_for"),
    [
        ("mlx-lm", "int4g64", "mlx4g64"),
        ("exllamav3", "int4g64", "exl3_4"),
        ("ik_llama.cpp", "int5g32", "q5_1"),
        ("llama.cpp", "q5_1", "q5_1_rot"),  # as an earlier kvprof scored it
    ],
)
def test_a_format_of_the_same_bytes_but_another_quantizer_is_told_with_a_remark(
    target: str, form: str, stands_for: str
) -> None:
    plan = plan_of(dict.fromkeys(everywhere(form, form), form))
    made = WRITERS[target](plan)
    assert any("another quantizer" in remark and f"{form} as {stands_for}" in remark for remark in made.remarks)
    assert set(READERS[target](made.text).values()) == {without_dtype(stands_for)}
    values = "q5_1_rot64" if target == "llama.cpp" else stands_for
    own = WRITERS[target](plan_of(everywhere(stands_for, values)))
    assert own.text == made.text
    assert not any("quantizer" in remark for remark in own.remarks)


def test_a_window_that_the_runtime_does_not_keep_is_said() -> None:
    plan = plan_of(everywhere("q4_0_rot", "q4_0_rot64"), Window(sink_tokens=4, recent_tokens=128))
    (remark,) = WRITERS["llama.cpp"](plan).remarks
    assert "first 4 and the last 128" in remark
    assert "quantizes every token" in remark


def test_unlike_keys_and_values_on_cuda_need_a_build_option() -> None:
    made = WRITERS["llama.cpp"](plan_of(everywhere("q8_0_rot", "q4_0_rot64")))
    assert made.text == "-fa on -ctk q8_0 -ctv q4_0\n"
    assert any("GGML_CUDA_FA_ALL_QUANTS=ON" in remark and "q8_0-q4_0" in remark for remark in made.remarks)
    assert not WRITERS["llama.cpp"](plan_of(everywhere("q8_0_rot", "q8_0_rot64"))).remarks


def heads_of(head_dim: int, architecture: str) -> tuple[set[str], set[str]]:
    """Return what llama.cpp, and what ik_llama.cpp, does to keys and values of a model before it rounds them."""
    layers = (
        KVLayer(layer=layer, kind="full", kv_heads=2, key_head_dim=head_dim, value_head_dim=head_dim)
        for layer in range(2)
    )
    geometry = CacheGeometry(dtype="float16", layers=tuple(layers))
    found = []
    for name in ("llama.cpp", "ik_llama.cpp"):
        target = TARGETS[name].for_model(geometry, architecture)
        found.append({one for tensor in TENSORS for one in target.formats_of(tensor) if one.startswith("q4_0")})
    return found[0], found[1]


def test_llama_cpp_turns_heads_of_64_and_a_llama_has_its_ggufs_order() -> None:
    assert heads_of(128, "Qwen3ForCausalLM") == ({"q4_0_rot", "q4_0_rot64"}, {"q4_0"})
    assert heads_of(64, "LlamaForCausalLM") == ({"q4_0_rot_gguf", "q4_0_rot64"}, {"q4_0_gguf", "q4_0"})
    assert heads_of(96, "LlamaForCausalLM") == ({"q4_0_gguf", "q4_0"}, {"q4_0_gguf", "q4_0"})
    assert heads_of(96, "Phi3ForCausalLM") == ({"q4_0"}, {"q4_0"})


def test_kvtuners_published_file_survives_the_way_there_and_back(tmp_path: Path) -> None:
    plan = kvtuner_plan(read_kvtuner(KVTUNER))
    made, place = export(plan, TARGETS["kvtuner"], tmp_path / "plan.json")
    assert yaml.safe_load(made.text) == yaml.safe_load(KVTUNER.read_text())
    place.write_text(made.text)
    again = kvtuner_plan(read_kvtuner(place))
    assert again.recipe == plan.recipe


def test_layers_that_the_plan_skips_stay_in_16_bits_in_vllm() -> None:
    names = everywhere("fp8_e4m3", "fp8_e4m3")
    plan = plan_of(names)
    skipped = [{"layer": 3, "reason": "sliding window of 512 tokens"}]
    content = json.loads(plan.to_text()) | {"skipped": skipped, "geometry": None}
    content["layers"] = [entry for entry in content["layers"] if entry["layer"] != 3]
    made = WRITERS["vllm"](BitPlan.from_json(content, "plan"))
    assert flags(made.text)["--kv-cache-dtype-skip-layers"] == ["3"]


def with_layers(plan: BitPlan, kinds: Mapping[int, str]) -> BitPlan:
    """Return a plan of a model in which some layers are of another kind and, but for sliding ones, have no bits."""
    content = json.loads(plan.to_text())
    content["skipped"] = [{"layer": layer, "reason": "16 bits"} for layer in kinds]
    content["layers"] = [entry for entry in content["layers"] if entry["layer"] not in kinds]
    for layer, kind in kinds.items():
        shape = content["geometry"]["layers"][layer]
        shape |= {"kind": kind, "window": 512} if kind == "sliding" else {"kind": kind, "skipped": kind}
        if kind == "recurrent":
            shape |= {"kv_heads": 0, "key_head_dim": 0, "value_head_dim": 0}
    return BitPlan.from_json(content, "plan")


def test_vllm_is_told_of_layers_that_have_a_cache_of_their_own_alone() -> None:
    """A number that is no attention layer is passed over in silence; one that shares has to be as its source is."""
    plan = with_layers(plan_of(everywhere("fp8_e4m3", "fp8_e4m3")), {2: "sliding", 3: "recurrent", 7: "shared"})
    made = WRITERS["vllm"](plan)
    assert flags(made.text)["--kv-cache-dtype-skip-layers"] == ["2"]
    assert any("layers 7 read the cache of another layer" in remark for remark in made.remarks)


def test_what_a_runtime_does_with_sliding_layers_is_planned_or_said() -> None:
    """mlx-vlm 0.7.10 raises; exllamav3 1.6.5 quantizes those of Gemma 3 and keeps those of Gemma 4 apart."""
    slides = with_layers(plan_of(everywhere("mlx4g64", "mlx4g64")), {2: "sliding"})
    path = Path("plan.json")
    with pytest.raises(Inexpressible, match="mlx-vlm quantizes no model with such layers"):
        export(slides, TARGETS["mlx-vlm"], path)
    plan = plan_of(everywhere("exl3_4", "exl3_4"))
    content = json.loads(plan.to_text())
    content["geometry"]["layers"][2] |= {"kind": "sliding", "window": 512}
    for architecture, is_said in (("Gemma3ForCausalLM", False), ("Gemma4ForConditionalGeneration", True)):
        content["model"]["architecture"] = architecture
        made = WRITERS["exllamav3"](BitPlan.from_json(content, "plan"))
        assert any("--layers full" in remark for remark in made.remarks) == is_said


def test_exllamav3_refuses_layers_with_a_cache_of_their_own_kind() -> None:
    """`cache_layer_type` of 1.6.5 puts CacheLayer_qsa_quant, which wants bits, in the place of the module's class."""
    content = json.loads(plan_of(everywhere("exl3_4", "exl3_4")).to_text())
    content["geometry"]["layers"][1]["indexer_width"] = 64
    with pytest.raises(Inexpressible, match="layer 1 has an indexer"):
        export(BitPlan.from_json(content, "plan"), TARGETS["exllamav3"], Path("plan.json"))


def test_modelopt_leaves_layers_of_16_bits_out_of_its_map_and_says_who_reads_it() -> None:
    names = everywhere("fp8_e4m3", "fp8_e4m3") | {(3, tensor): "full" for tensor in TENSORS}
    made = WRITERS["modelopt"](plan_of(names))
    assert read_modelopt(made.text) == names
    assert json.loads(made.text)["quantization"]["kv_cache_quant_algo"] == "MIXED_PRECISION"
    assert any("no released runtime reads the layer map" in remark and "56116" in remark for remark in made.remarks)


def test_turboquant_leaves_no_ends_alone_in_a_hybrid_model() -> None:
    """`get_boundary_skip_layers` of vLLM 0.33.0 returns none where `is_hybrid`."""
    names = everywhere("turbo_k4", "turbo_v4")
    made = WRITERS["vllm"](with_layers(plan_of(names), {3: "recurrent"}))
    assert made.text == "--kv-cache-dtype turboquant_4bit_nc\n"
    with pytest.raises(Inexpressible, match="either end of the model stay in 16 bits"):
        WRITERS["vllm"](plan_of(names))


@pytest.mark.parametrize(
    ("target", "dtype", "text", "said"),
    [
        ("vllm", "bfloat16", "--kv-cache-dtype bfloat16\n", None),
        ("vllm", "float16", "--kv-cache-dtype float16\n", None),
        ("vllm", "float32", "--kv-cache-dtype auto\n", "auto is FP8 where the checkpoint brings an FP8 cache"),
        ("sglang", "bfloat16", "--kv-cache-dtype bfloat16\n", None),
        ("sglang", "float16", "--kv-cache-dtype auto\n", "auto is FP8 where the checkpoint brings an FP8 cache"),
        ("tensorrt-llm", "bfloat16", "kv_cache_config:\n  dtype: bfloat16\n", "FP8 cache keeps it"),
    ],
)
def test_16_bits_everywhere_are_said_as_a_dtype_where_the_runtime_has_a_word(
    target: str, dtype: str, text: str, said: str | None
) -> None:
    made = WRITERS[target](plan_of(everywhere("full", "full"), dtype=dtype))
    assert made.text == text
    assert [said in remark for remark in made.remarks] == ([] if said is None else [True])


def test_the_script_for_transformers_has_twelve_lines_and_refuses_other_runtimes_formats(tmp_path: Path) -> None:
    plan = plan_of(everywhere("int4g64", "rot2"))
    made, place = export(plan, TARGETS["transformers"], tmp_path / "plans" / "plan.json", tmp_path / "run.py")
    assert place == tmp_path / "run.py"
    assert len(made.text.splitlines()) == 12
    assert "'/plans/plan.json'" in made.text
    compile(made.text, "run.py", "exec")
    with pytest.raises(Inexpressible, match=r"key of layer 0 has q4_0.*\n.*--target transformers"):
        export(plan_of(everywhere("q4_0", "q4_0")), TARGETS["transformers"], tmp_path / "plan.json")


def test_the_script_for_transformers_writes_what_the_planned_cache_writes(tmp_path: Path) -> None:
    source = resolve(str(save_folder(tmp_path / "model")))
    model, tokenizer = load_model(source, device="cpu"), load_tokenizer(source)
    inventory = take_inventory(model.config, source.id)
    formats = parse_formats("key:int2g8,value:rot2")
    window = Window(sink_tokens=1, recent_tokens=2)
    plan = uniform_plan(formats, inventory.model, inventory.geometry, window=window)
    path = plan.save(tmp_path / "plan.json")
    made, place = export(plan, TARGETS["transformers"], path)
    place.write_text(made.text)
    prompt = "the cat sat on a mat and saw another cat"
    done = subprocess.run(
        [sys.executable, str(place), *prompt.split()], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    inputs = tokenizer(prompt, return_tensors="pt")
    written = [
        model.generate(**inputs, past_key_values=cache, max_new_tokens=64)[0]
        for cache in (PlanCache.from_plan(plan, model), None)
    ]
    assert done.stdout.strip() == tokenizer.decode(written[0], skip_special_tokens=True)
    assert not torch.equal(*written)  # two bits can be told from none
