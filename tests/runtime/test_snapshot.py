"""A cache on disk: what goes on exactly where it was, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from handplans import bytes_within
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tiny_plans import FULL, build, plan_for, prompt, step
from torch import Tensor
from transformers import PreTrainedModel

from kvprof.errors import CacheError, InvalidFile, Mismatch, OutputError
from kvprof.records.plan import LayerChoice
from kvprof.runtime import snapshot
from kvprof.runtime.cache import PlanCache

Header = dict[str, str]
Tensors = dict[str, Tensor]


def filled(model: PreTrainedModel, tokens: int = 40, batch: int = 2, layers: LayerChoice = "all") -> PlanCache:
    cache = PlanCache.from_plan(plan_for(model, fraction=0.1, fingerprint=True, layers=layers), model)
    if tokens:
        step(model, prompt(tokens, batch), cache)
    return cache


def written(model: PreTrainedModel, ids: Tensor, cache: PlanCache) -> Tensor:
    ids = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False, eos_token_id=None)
    return torch.as_tensor(ids)


def read(path: Path) -> tuple[Header, Tensors]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata()), {name: file.get_tensor(name) for name in list(file.keys())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["llama", "falcon-grouped", "gemma3", "gemma4", "falcon-h1", "bamba", "lfm2", "inkling"]
)
def test_generation_goes_on_where_it_was(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Sliding layers are past their window, recurrent ones have their state."""
    model = build(name, dtype=dtype)
    cache = filled(model)
    path = cache.save(tmp_path / "chat.safetensors")
    loaded = PlanCache.load(path, model)
    assert loaded.get_seq_length() == 40
    assert loaded.nbytes() == cache.nbytes()
    assert loaded.plan == cache.plan
    ids = torch.cat([prompt(40, 2), prompt(3, 2, seed=4)], dim=1)
    assert torch.equal(written(model, ids, loaded), written(model, ids, cache))
    probe = prompt(5, 2, seed=5)
    assert torch.equal(step(model, probe, loaded), step(model, probe, cache))


@pytest.mark.parametrize("name", ["llama", "gemma3", "bamba", "inkling"])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_a_cache_of_few_tokens_or_none(name: str, tokens: int, tmp_path: Path) -> None:
    model = build(name)
    cache = filled(model, tokens)
    loaded = PlanCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    for ids in torch.split(prompt(40, 2), [30, 1, 9], dim=1):
        assert torch.equal(step(model, ids, loaded), step(model, ids, cache))


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
def test_what_was_recorded_can_still_be_taken_back(name: str, tmp_path: Path) -> None:
    model = build(name)
    cache = filled(model)
    never = copy.deepcopy(cache)
    cache.activate_past_recording()
    step(model, prompt(30, 2, seed=2), cache)
    loaded = PlanCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    step(model, prompt(1, 2, seed=3), loaded)
    loaded.crop(-31)
    assert torch.equal(step(model, prompt(5, 2, seed=4), loaded), step(model, prompt(5, 2, seed=4), never))


def test_a_loaded_cache_is_changed_before_its_first_token(tmp_path: Path) -> None:
    model = build("falcon-h1")
    cache = filled(model)
    loaded = PlanCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    for each in (cache, loaded):
        each.batch_select_indices(torch.tensor([1]))
        each.batch_repeat_interleave(3)
        each.reorder_cache(torch.tensor([2, 0, 1]))
    assert torch.equal(step(model, prompt(2, 3), loaded), step(model, prompt(2, 3), cache))


def test_a_loaded_cache_does_not_hold_on_to_its_file(tmp_path: Path) -> None:
    model = build("llama")
    path = filled(model).save(tmp_path / "cache.safetensors")
    loaded = PlanCache.load(path, model)
    path.write_bytes(b"")
    assert sum(bytes_within(layer) for layer in loaded.layers) == loaded.nbytes()
    step(model, prompt(1, 2), loaded)


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    cache = filled(build("llama"))
    header, tensors = read(cache.save(tmp_path / "cache.safetensors"))
    assert header["schema"] == "kvprof.cache/2"
    assert json.loads(header["plan"]) == json.loads(cache.plan.to_text())
    assert {fact["tokens"] for fact in json.loads(header["layers"])} == {40}
    assert sum(x.numel() * x.element_size() for x in tensors.values()) == cache.nbytes()


# Another model


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = filled(build("llama")).save(tmp_path / "cache.safetensors")
    for other in (build("llama", seed=1), build("qwen3"), build("gemma2"), build("llama", num_hidden_layers=3)):
        with pytest.raises(Mismatch, match="another model"):
            PlanCache.load(path, other)


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    path = filled(build("llama")).save(tmp_path / "cache.safetensors")
    with pytest.raises(Mismatch, match=r"in float32, the model is loaded in bfloat16.\n  Load the model"):
        PlanCache.load(path, build("llama", dtype=torch.bfloat16))


# Damage


@pytest.mark.parametrize("kept", [0, 4, 8, 500, 0.5, 0.99])
def test_a_truncated_file_is_refused(kept: float, tmp_path: Path) -> None:
    model = build("llama")
    path = filled(model).save(tmp_path / "cache.safetensors")
    raw = path.read_bytes()
    path.write_bytes(raw[: int(kept * len(raw)) if isinstance(kept, float) else kept])
    with pytest.raises(InvalidFile, match=r"cache.safetensors: truncated or corrupt"):
        PlanCache.load(path, model)


def test_what_is_no_file_of_a_cache_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    save_file({"x": torch.zeros(2)}, tmp_path / "weights.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "future.safetensors", metadata={"schema": "kvprof.cache/3"})
    (tmp_path / "text.safetensors").write_text('{"schema": "kvprof.cache/2"}')
    (tmp_path / "folder.safetensors").mkdir()
    for name, message in (
        ("weights", "its schema is None"),
        ("future", "its schema is 'kvprof.cache/3'"),
        ("text", "truncated or corrupt"),
        ("folder", "folder.safetensors: "),
        ("nowhere", "no such file"),
    ):
        with pytest.raises(InvalidFile, match=message):
            PlanCache.load(tmp_path / f"{name}.safetensors", model)


def facts(change: Callable[[list[Any]], object]) -> Callable[[Header, Tensors], None]:
    def edit(header: Header, _: Tensors) -> None:
        found = json.loads(header["layers"])
        changed = change(found)
        header["layers"] = json.dumps(found if changed is None else changed)

    return edit


def plan(change: Callable[[dict[str, Any]], object]) -> Callable[[Header, Tensors], None]:
    def edit(header: Header, _: Tensors) -> None:
        found = json.loads(header["plan"])
        change(found)
        header["plan"] = json.dumps(found)

    return edit


def first(part: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Header, Tensors], None]:
    def edit(_: Header, tensors: Tensors) -> None:
        name = next(name for name in sorted(tensors) if part in name)
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed.contiguous()

    return edit


DAMAGE: dict[str, Callable[[Header, Tensors], object]] = {
    "no plan": lambda header, _: header.pop("plan"),
    "no layers": lambda header, _: header.pop("layers"),
    "a plan that is no JSON": lambda header, _: header.update(plan="{"),
    "a plan that is a list": lambda header, _: header.update(plan="[]"),
    "a plan nested too deeply": lambda header, _: header.update(plan="[" * 100_000),
    "layers that are a number": facts(lambda _: 3),
    "layers that are a text": facts(lambda _: "ab"),
    "layers that are numbers": facts(lambda _: [1, 2]),
    "layers that are null": facts(lambda _: None if False else [None, None]),
    "a layer too few": facts(lambda found: found[:1]),
    "a layer too many": facts(lambda found: found + found[:1]),
    "an unknown fact": facts(lambda found: found[0].update(surprise=1)),
    "tokens as a text": facts(lambda found: found[0].update(tokens="40")),
    "a negative number of tokens": facts(lambda found: found[0].update(tokens=-40)),
    "fewer tokens": facts(lambda found: [fact.update(tokens=39) for fact in found] and None),
    "more tokens": facts(lambda found: [fact.update(tokens=2**40) for fact in found] and None),
    "one layer's tokens": facts(lambda found: found[1].update(tokens=39)),
    "no tokens": facts(lambda found: [fact.update(tokens=None) for fact in found] and None),
    "no sequences": facts(lambda found: [fact.update(batch=0) for fact in found] and None),
    "other sequences": facts(lambda found: [fact.update(batch=3) for fact in found] and None),
    "one layer's sequences": facts(lambda found: found[1].update(batch=1)),
    "other bits": plan(lambda found: found["layers"][0]["key"].update(bits=5)),
    "other groups": plan(lambda found: found["layers"][0]["key"].update(group_size=8)),
    "another scheme": plan(lambda found: found["layers"][0]["value"].update(scheme="asymmetric")),
    "other sinks": plan(lambda found: found["window"].update(sink_tokens=1)),
    "another window": plan(lambda found: found["window"].update(recent_tokens=9)),
    "a missing tensor": first("codes", lambda _: None),
    "a missing zero point": first("zero", lambda _: None),
    "a tensor too many": lambda _, tensors: tensors.update({"layers.0.key.extra": torch.zeros(1)}),
    "a layer of tensors too many": lambda _, tensors: tensors.update({"layers.9.keys": torch.zeros(1)}),
    "a tensor of nothing": lambda _, tensors: tensors.update({"x": torch.zeros(1)}),
    "codes of another shape": first("codes", lambda x: x[..., :-1]),
    "codes of another dtype": first("codes", lambda x: x.to(torch.int32)),
    "a scale of another shape": first("scale", lambda x: x[:, :-1]),
    "a scale without dimensions": first("scale", lambda x: x.flatten()[0]),
    "a scale of another dtype": first("scale", lambda x: x.float()),
    "a window of other heads": first("recent", lambda x: x[:, :1]),
    "a window without dimensions": first("recent", lambda x: x.flatten()),
    "a window in another dtype": first("recent", lambda x: x.half()),
    "a shorter window": first("recent", lambda x: x[:, :, :-1]),
}


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_an_altered_file_is_refused(damage: str, name: str, tmp_path: Path) -> None:
    """Of gemma3 the first layer slides, and has let go of its first tokens."""
    model = build(name)
    path = filled(model).save(tmp_path / "cache.safetensors")
    header, tensors = read(path)
    DAMAGE[damage](header, tensors)
    save_file(tensors, path, metadata=header)
    with pytest.raises(InvalidFile, match=r"cache.safetensors"):
        PlanCache.load(path, model)


RECORDED_DAMAGE: dict[str, Callable[[Header, Tensors], object]] = {
    "a window that begins within a group": first("0.key.recent", lambda x: x[:, :, 1:]),
    "no window": first("0.key.recent", lambda _: None),
    "more tokens than there were": first("0.key.recent", lambda x: x.repeat(1, 1, 2, 1)),
    "fewer tokens than a query sees": facts(lambda found: [fact.update(tokens=71) for fact in found] and None),
    "nothing recorded": facts(lambda found: [fact.update(recording=False) for fact in found] and None),
}


@pytest.mark.parametrize("damage", RECORDED_DAMAGE)
@pytest.mark.parametrize("tokens", [0, 40])
def test_an_altered_file_of_a_sliding_layer_that_records_is_refused(damage: str, tokens: int, tmp_path: Path) -> None:
    model = build("mistral-sliding")
    cache = filled(model, tokens)
    cache.activate_past_recording()
    step(model, prompt(30, 2, seed=2), cache)
    path = cache.save(tmp_path / "cache.safetensors")
    assert PlanCache.load(path, model).nbytes() == cache.nbytes()
    header, tensors = read(path)
    RECORDED_DAMAGE[damage](header, tensors)
    save_file(tensors, path, metadata=header)
    with pytest.raises(InvalidFile, match=r"cache.safetensors: truncated or corrupt"):
        PlanCache.load(path, model)


OWN_DAMAGE: dict[str, tuple[str, Callable[[Header, Tensors], object]]] = {
    "a sliding layer's keys too short": ("gemma3", first("0.keys", lambda x: x[:, :, 1:])),
    "a sliding layer's keys too long": ("gemma3", first("0.keys", lambda x: x.repeat(1, 1, 2, 1))),
    "a sliding layer's other heads": ("gemma3", first("0.values", lambda x: x[:, :1])),
    "a sliding layer's other dimensions": ("gemma3", first("0.values", lambda x: x[..., :3])),
    "a sliding layer's other dtype": ("gemma3", first("0.keys", lambda x: x.half())),
    "a sliding layer without values": ("gemma3", first("0.values", lambda _: None)),
    "keys that are flat": ("gemma3", first("0.keys", lambda x: x.flatten())),
    "a state of other sequences": ("bamba", first("conv", lambda x: x[:1])),
    "a state without dimensions": ("bamba", first("recurrent", lambda x: x.flatten()[0])),
    "a convolution of unknown width": ("bamba", facts(lambda found: found[0].update(convolutions={}))),
    "a convolution of a width that is a text": (
        "bamba",
        facts(lambda found: found[0].update(convolutions={"0": "four"})),
    ),
    "a missing state": ("bamba", first("recurrent", lambda _: None)),
    "a state too many": ("bamba", lambda _, tensors: tensors.update({"layers.0.conv.7": torch.zeros(2, 1, 1)})),
    "keys in a recurrent layer": ("bamba", lambda _, tensors: tensors.update({"layers.0.keys": torch.zeros(1)})),
    "keys in a shared layer": ("gemma4", lambda _, tensors: tensors.update({"layers.3.keys": torch.zeros(1)})),
}


@pytest.mark.parametrize("damage", OWN_DAMAGE)
def test_a_file_altered_in_transformers_own_layers_is_refused(damage: str, tmp_path: Path) -> None:
    name, alter = OWN_DAMAGE[damage]
    model = build(name)
    path = filled(model, layers="full").save(tmp_path / "cache.safetensors")
    header, tensors = read(path)
    alter(header, tensors)
    save_file(tensors, path, metadata=header)
    with pytest.raises(InvalidFile, match=r"cache.safetensors: truncated or corrupt"):
        PlanCache.load(path, model)


def test_any_single_flipped_byte_of_the_header_raises_no_other_error(tmp_path: Path) -> None:
    model = build("gemma3")
    path = filled(model, tokens=20, batch=1).save(tmp_path / "cache.safetensors")
    raw = path.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    for place in torch.randint(0, length, (150,), generator=torch.Generator().manual_seed(0)).tolist():
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0x15]) + raw[place + 1 :])
        try:
            PlanCache.load(path, model)
        except (InvalidFile, Mismatch):
            continue


# Writing


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_failed_save_leaves_the_file_that_was_there(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    path = filled(model, tokens=20).save(tmp_path / "cache.safetensors")
    before = path.read_bytes()

    def fails(_: Tensors, filename: Path, **__: object) -> None:
        filename.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(snapshot, "save_file", fails)
    with pytest.raises(OutputError, match=r"cannot write .*cache.safetensors: No space left on device"):
        filled(model).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["cache.safetensors"]
    assert path.read_bytes() == before


def test_a_cache_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    model = build("llama")
    cache = PlanCache.from_plan(plan_for(model, FULL), model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(model, prompt(5), cache)
    with pytest.raises(CacheError, match=r"bfloat16.*, the model is loaded in float32"):
        cache.save(tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_layer_of_an_unknown_kind_is_not_written(tmp_path: Path) -> None:
    class SomeLayer:
        pass

    cache = filled(build("llama"))
    cache.layers[1] = SomeLayer()
    with pytest.raises(CacheError, match="layer 1 is a SomeLayer, which kvprof cannot save"):
        snapshot.save_layers(cache.plan, cache.layers, tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())
