"""A model that attends through kvprof: the codes where they lie for a lone query, plain tensors for all others."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
)

from kvprof.errors import CacheError
from kvprof.models.inventory import take_inventory
from kvprof.records.plan import BitPlan
from kvprof.runtime import PlanCache
from kvprof.runtime.attention.reference import decoding_reads
from kvprof.runtime.kernels import torch_kernels
from kvprof.runtime.kernels.dispatch import kernels_named

errors = pytest.importorskip("triton.runtime.errors")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS: dict[str, Any] = {
    "key": {"bits": 3, "group_size": 16, "axis": "channel"},
    "value": {"bits": 2, "group_size": 32, "axis": "token"},
}


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return small_llama()


def small_llama(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=89, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(DEVICE).eval()


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`packed`, for each time that a query attended to packed codes."""
    from kvprof.runtime.kernels import triton_kernels

    seen: list[str] = []
    attend = triton_kernels.attend

    def counted(*args: Any) -> Tensor:
        seen.append("packed")
        return attend(*args)

    monkeypatch.setattr(triton_kernels, "attend", counted)
    monkeypatch.setattr(torch_kernels, "_said", set())
    return seen


def plan_for(model: PreTrainedModel, sinks: int = 4, recent: int = 8, **forms: Any) -> BitPlan:
    """A plan that gives every layer the same formats."""
    geometry = take_inventory(model.config).geometry
    given = FORMS | forms
    layers = [
        {"layer": layer.layer} | ({"latent": given["key"], "rope": given["value"]} if layer.is_latent else given)
        for layer in geometry.planned
    ]
    skipped = [{"layer": layer.layer, "reason": layer.skipped} for layer in geometry.layers if layer.skipped]
    return BitPlan.model_validate(
        {
            "schema": "kvprof.plan/1",
            "model": {"num_layers": geometry.num_layers},
            "quantizer": {},
            "window": {"sink_tokens": sinks, "recent_tokens": recent},
            "layers": layers,
            "skipped": skipped,
        }
    )


def decoded(model: PreTrainedModel, cache: PlanCache, ids: Tensor, prompt: int, mask: Tensor | None = None) -> Tensor:
    """The logits of a prompt's last token, and of each token after it, fed one by one."""
    logits = []
    with torch.inference_mode():
        for stop in (prompt, *range(prompt + 1, ids.shape[1] + 1)):
            start = 0 if stop == prompt else stop - 1
            options: dict[str, Any] = {}
            if mask is not None:
                options = {"attention_mask": mask[:, :stop], "position_ids": positions(mask)[:, start:stop]}
            logits.append(model(ids[:, start:stop], past_key_values=cache, **options).logits[:, -1])
    return torch.stack(logits, 1)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def random_ids(model: PreTrainedModel, tokens: int, batch: int = 1) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(3)).to(DEVICE)


# ---- the same words


def test_decoding_reads_the_codes_and_gives_the_logits_of_unpacked_ones(
    llama: LlamaForCausalLM, attended: list[str]
) -> None:
    plan, ids = plan_for(llama), random_ids(llama, 37)
    expected = decoded(llama, PlanCache.from_plan(plan, llama, kernels="torch"), ids, 33)
    assert attended == []
    cache = PlanCache.from_plan(plan, llama, kernels="triton")
    found = decoded(llama, cache, ids, 33)
    assert attended == ["packed"] * 4 * 2
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert cache.nbytes() == cache.plan.bytes_at(37)


def test_padding_on_the_left_changes_no_word(llama: LlamaForCausalLM, attended: list[str]) -> None:
    plan, ids = plan_for(llama, sinks=0), random_ids(llama, 32, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    expected = decoded(llama, PlanCache.from_plan(plan, llama, kernels="torch"), ids, 30, mask)
    found = decoded(llama, PlanCache.from_plan(plan, llama, kernels="triton"), ids, 30, mask)
    assert set(attended) == {"packed"}
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    unread = ids.clone()
    unread[0, :9] = (ids[0, :9] + 1) % 89
    again = decoded(llama, PlanCache.from_plan(plan_for(llama, sinks=0, key=full(), value=full()), llama, "triton"),
                    unread, 30, mask)  # fmt: skip
    plain = decoded(llama, PlanCache.from_plan(plan_for(llama, sinks=0, key=full(), value=full()), llama, "triton"),
                    ids, 30, mask)  # fmt: skip
    assert float((again - plain).abs().max()) < 1e-5 * float(plain.abs().max())


def full() -> dict[str, Any]:
    return {"bits": 16, "group_size": 32, "axis": "token"}


def test_several_queries_with_a_history_read_unpacked_codes(llama: LlamaForCausalLM, attended: list[str]) -> None:
    plan, ids = plan_for(llama), random_ids(llama, 40)
    results = []
    for name in ("torch", "triton"):
        cache = PlanCache.from_plan(plan, llama, kernels=name)
        with torch.inference_mode():
            llama(ids[:, :30], past_key_values=cache)
            results.append(llama(ids[:, 30:], past_key_values=cache).logits)
    assert attended == []
    assert torch.allclose(*results, rtol=1e-5, atol=1e-6)


def test_a_prompt_is_read_exactly(llama: LlamaForCausalLM) -> None:
    ids = random_ids(llama, 40)
    with torch.inference_mode():
        expected = llama(ids).logits
        found = llama(ids, past_key_values=PlanCache.from_plan(plan_for(llama), llama, kernels="triton")).logits
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_beams_copies_and_cropping_work_as_with_unpacked_codes(llama: LlamaForCausalLM, attended: list[str]) -> None:
    ids, texts = random_ids(llama, 30), []
    for name in ("torch", "triton"):
        empty = PlanCache.from_plan(plan_for(llama), llama, kernels=name)
        with torch.inference_mode():
            text = llama.generate(
                ids, past_key_values=copy.deepcopy(empty), max_new_tokens=3, num_beams=2, do_sample=False
            )
        texts.append(text)
    assert torch.equal(*texts)
    assert "packed" in attended


def test_a_copy_of_a_filled_cache_reads_its_own_pages(attended: list[str]) -> None:
    """Addresses of pages are told to the kernels once: a copy has pages of its own, and so has a cache that shrank."""
    llama = small_llama(layers=1)
    plan, ids = plan_for(llama), random_ids(llama, 530)
    cache = PlanCache.from_plan(plan, llama, kernels="triton")
    with torch.inference_mode():
        llama(ids[:, :528], past_key_values=cache)
        llama(ids[:, 528:529], past_key_values=cache)  # the addresses are known now
        twin = copy.deepcopy(cache)
        expected = llama(ids[:, 529:], past_key_values=cache).logits
        for layer in cache.layers:
            for tensor in layer.tensors():
                tensor.zero_()
        found = llama(ids[:, 529:], past_key_values=twin).logits
    assert attended == ["packed"] * 3
    assert torch.equal(found, expected)


# ---- who attends


def test_another_cache_works_as_before_on_a_hooked_model(llama: LlamaForCausalLM) -> None:
    ids = random_ids(llama, 20)
    with torch.inference_mode():
        expected = llama.generate(ids, past_key_values=DynamicCache(config=llama.config), max_new_tokens=4)
        PlanCache.from_plan(plan_for(llama), llama, kernels="triton")
        assert llama.config._attn_implementation == "kvprof"
        found = llama.generate(ids, past_key_values=DynamicCache(config=llama.config), max_new_tokens=4)
    assert torch.equal(found, expected)


def test_an_attention_that_knows_no_codes_is_given_tensors(llama: LlamaForCausalLM, attended: list[str]) -> None:
    plan, ids = plan_for(llama), random_ids(llama, 34)
    expected = decoded(llama, PlanCache.from_plan(plan, llama, kernels="torch"), ids, 30)
    cache = PlanCache.from_plan(plan, llama, kernels="triton")
    for name in ("sdpa", "eager"):
        llama.set_attn_implementation(name)
        cache.reset()
        assert torch.allclose(decoded(llama, cache, ids, 30), expected, rtol=1e-4, atol=1e-5)
    assert attended == []


def test_changing_attention_in_the_middle_changes_no_word(llama: LlamaForCausalLM, attended: list[str]) -> None:
    plan, ids = plan_for(llama), random_ids(llama, 36)
    expected = decoded(llama, PlanCache.from_plan(plan, llama, kernels="torch"), ids, 30)
    cache, found = PlanCache.from_plan(plan, llama, kernels="triton"), []
    with torch.inference_mode():
        llama(ids[:, :30], past_key_values=cache)
        for token, name in enumerate(("kvprof", "sdpa", "kvprof", "eager", "kvprof", "kvprof")):
            llama.set_attn_implementation(name)
            found.append(llama(ids[:, 30 + token : 31 + token], past_key_values=cache).logits[:, -1])
    assert attended == ["packed"] * 4 * 2
    assert torch.allclose(torch.stack(found, 1), expected[:, 1:], rtol=1e-4, atol=1e-5)


def test_reading_as_decoding_does_is_not_disturbed(llama: LlamaForCausalLM) -> None:
    plan, ids = plan_for(llama), random_ids(llama, 40)
    with torch.inference_mode(), decoding_reads(llama, plan):
        expected = llama(ids).logits
    PlanCache.from_plan(plan, llama, kernels="triton")
    with torch.inference_mode(), decoding_reads(llama, plan):
        found = llama(ids).logits
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", ["scale", "shape", "only the values"])
def test_a_model_that_works_on_its_keys_is_given_all_of_them(
    llama: LlamaForCausalLM, attended: list[str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    plan, ids = plan_for(llama), random_ids(llama, 34)
    update, lengths = PlanCache.update, []

    def changed(self: PlanCache, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = update(self, *args, **kwargs)
        if change == "shape":
            lengths.append(keys.shape[2] + values.size(2))
            return keys, values
        return (keys * 2 if change == "scale" else keys), values / 2

    monkeypatch.setattr(PlanCache, "update", changed)
    expected = decoded(llama, PlanCache.from_plan(plan, llama, kernels="torch"), ids, 30)
    half = len(lengths) // 2 if not lengths else len(lengths)
    found = decoded(llama, PlanCache.from_plan(plan, llama, kernels="triton"), ids, 30)
    assert lengths[:half] == lengths[half:]
    assert set(attended) == ({"packed"} if change == "shape" else set())
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_another_model_of_the_same_weights_is_given_all_of_them(llama: LlamaForCausalLM, attended: list[str]) -> None:
    other, plan, ids = copy.deepcopy(llama), plan_for(llama), random_ids(llama, 34)
    expected = decoded(llama, PlanCache.from_plan(plan, llama, kernels="torch"), ids, 33)
    cache = PlanCache.from_plan(plan, llama, kernels="triton")
    with torch.inference_mode():
        llama(ids[:, :33], past_key_values=cache)
        found = other(ids[:, 33:], past_key_values=cache).logits[:, -1]
    assert attended == []
    assert torch.allclose(found, expected[:, 1], rtol=1e-5, atol=1e-6)


def test_a_model_of_experts_reads_codes_too(attended: list[str]) -> None:
    """Such models hand options of their own down to the attention, which say nothing to it."""
    config = copy.deepcopy(tiny_model("mixtral").config)
    config.head_dim = 32
    torch.manual_seed(1)
    model = MixtralForCausalLM(config).to(DEVICE).eval()
    plan, ids = plan_for(model), random_ids(model, 34)
    expected = decoded(model, PlanCache.from_plan(plan, model, kernels="torch"), ids, 32)
    found = decoded(model, PlanCache.from_plan(plan, model, kernels="triton"), ids, 32)
    assert attended == ["packed"] * 4
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_plain_attention_stays_one(llama: LlamaForCausalLM) -> None:
    llama.set_attn_implementation("eager")
    ids = random_ids(llama, 12)
    expected = llama(ids, output_attentions=True).attentions
    PlanCache.from_plan(plan_for(llama), llama, kernels="triton")
    assert llama.config._attn_implementation == "kvprof_eager"
    assert torch.allclose(llama(ids, output_attentions=True).attentions[0], expected[0])


def test_a_cache_is_pickled_and_goes_on_unpacked(llama: LlamaForCausalLM) -> None:
    plan, ids = plan_for(llama), random_ids(llama, 36)
    expected = decoded(llama, PlanCache.from_plan(plan, llama, kernels="torch"), ids, 34)
    cache = PlanCache.from_plan(plan, llama, kernels="triton")
    decoded(llama, cache, ids[:, :35], 34)
    with torch.inference_mode():
        found = llama(ids[:, 35:], past_key_values=pickle.loads(pickle.dumps(cache))).logits[:, -1]
    assert torch.allclose(found, expected[:, -1], rtol=1e-5, atol=1e-6)


def test_every_architecture_decodes_alike(any_tiny: tuple[str, PreTrainedModel], attended: list[str]) -> None:
    """Most of these have heads too small for the kernels, and attend to unpacked codes through kvprof's attention."""
    model = copy.deepcopy(any_tiny[1])
    if not take_inventory(model.config).geometry.planned:
        pytest.skip("no layer takes bits")
    plan, ids = plan_for(model, key={"bits": 3, "group_size": 4, "axis": "channel"},
                         value={"bits": 2, "group_size": 8, "axis": "token"}), random_ids(model, 30)  # fmt: skip
    expected = decoded(model, PlanCache.from_plan(plan, model, kernels="torch"), ids, 26)
    found = decoded(model, PlanCache.from_plan(plan, model, kernels="triton"), ids, 26)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_caps_its_scores_decodes_alike(attended: list[str]) -> None:
    config = copy.deepcopy(tiny_model("gemma2").config)
    config.head_dim, config.sliding_window, config.layer_types = 32, 16, ["full_attention", "sliding_attention"]
    config.attn_logit_softcapping, config.query_pre_attn_scalar = 0.5, 1
    torch.manual_seed(1)
    model = Gemma2ForCausalLM(config).to(DEVICE).eval()
    plan, ids = plan_for(model), random_ids(model, 36)
    expected = decoded(model, PlanCache.from_plan(plan, model, kernels="torch"), ids, 32)
    found = decoded(model, PlanCache.from_plan(plan, model, kernels="triton"), ids, 32)
    assert model.config._attn_implementation == "kvprof_eager"  # SDPA knows no cap
    assert attended == ["packed"] * 4
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_attends_the_slow_way_says_so_once(
    llama: LlamaForCausalLM, attended: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    forms = {name: {"bits": 4, "group_size": 8, "axis": "channel"} for name in ("key", "value")}
    cache, ids = PlanCache.from_plan(plan_for(llama, **forms), llama, kernels="triton"), random_ids(llama, 36)
    for _ in range(2):
        cache.reset()
        decoded(llama, cache, ids, 32)
    assert caplog.messages == ["a query attends to unpacked keys and values: groups of 8 are no multiple of 16"]
    assert attended == []


def test_a_gradient_takes_the_plain_way(llama: LlamaForCausalLM, attended: list[str]) -> None:
    cache, ids = PlanCache.from_plan(plan_for(llama), llama, kernels="triton"), random_ids(llama, 36)
    with torch.no_grad():
        llama(ids[:, :35], past_key_values=cache)
    llama(ids[:, 35:], past_key_values=cache).logits.sum().backward()
    assert attended == []
    found = {name: weight.grad for name, weight in llama.named_parameters()}
    llama.zero_grad()
    other = PlanCache.from_plan(plan_for(llama), llama, kernels="torch")
    with torch.no_grad():
        llama(ids[:, :35], past_key_values=other)
    llama(ids[:, 35:], past_key_values=other).logits.sum().backward()
    for name, weight in llama.named_parameters():
        assert torch.allclose(found[name], weight.grad, rtol=1e-3, atol=1e-5), name


def test_a_gpu_that_is_too_small_for_a_kernel_attends_the_plain_way(
    llama: LlamaForCausalLM, attended: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any) -> Tensor:
        raise errors.OutOfResources(2**20, 101376, "shared memory")

    monkeypatch.setattr("kvprof.runtime.kernels.triton_kernels.attention._attend", refused)
    plan, ids = plan_for(llama), random_ids(llama, 36)
    expected = decoded(llama, PlanCache.from_plan(plan, llama, kernels="torch"), ids, 32)
    found = decoded(llama, PlanCache.from_plan(plan, llama, kernels="triton"), ids, 32)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert len(caplog.messages) == 1
    assert "shared memory" in caplog.text


# ---- which kernels


def test_kernels_are_chosen_by_name(llama: LlamaForCausalLM) -> None:
    assert kernels_named("torch", "cpu").name == "torch"
    assert kernels_named("auto", "cpu").name == "torch"
    assert kernels_named("auto", "cuda").name == "triton"
    with pytest.raises(CacheError, match=r"unknown kernels 'tritn': .*triton"):
        PlanCache.from_plan(plan_for(llama), llama, kernels="tritn")
    before = llama.config._attn_implementation
    PlanCache.from_plan(plan_for(llama), llama, kernels="torch")
    assert llama.config._attn_implementation == before


def test_without_a_gpu_or_the_interpreter_triton_says_what_it_needs(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvprof.runtime.kernels.triton_kernels.INTERPRETED", False)
    with pytest.raises(CacheError, match="need a GPU, the model is on cpu"):
        kernels_named("triton", "cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CacheError, match=r"need the package triton.\n  pip install"):
        kernels_named("triton", "cuda")
    assert kernels_named("auto", "cuda").name == "torch"


def test_a_saved_cache_goes_on_with_the_kernels_asked_for(
    llama: LlamaForCausalLM, attended: list[str], tmp_path: Path
) -> None:
    ids, cache = random_ids(llama, 36), PlanCache.from_plan(plan_for(llama), llama, kernels="torch")
    decoded(llama, cache, ids[:, :34], 33)
    cache.save(tmp_path / "cache.safetensors")
    loaded = PlanCache.load(tmp_path / "cache.safetensors", llama, kernels="triton")
    with torch.inference_mode():
        for token in (34, 35):
            expected = llama(ids[:, token : token + 1], past_key_values=cache).logits
            found = llama(ids[:, token : token + 1], past_key_values=loaded).logits
    assert attended == ["packed"] * 4
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
