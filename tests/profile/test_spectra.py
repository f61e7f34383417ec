"""Are these the singular values of what the model caches? Held against transformers' own cache and NumPy's SVD."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from folders import edit_weights, save_folder, save_text
from requested import changed
from tiny import TINY, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kvprof.calibration.sequences import tokenize
from kvprof.calibration.text import open_text
from kvprof.errors import InvalidFile, KvprofError, Mismatch, ModelError, OutputError, UnknownLayout
from kvprof.models.inventory import take_inventory
from kvprof.models.load import load_tokenizer, resolve
from kvprof.models.source import ModelSource
from kvprof.profile import singular_values as measuring
from kvprof.profile import spectra as running
from kvprof.profile.lm_head import Head
from kvprof.profile.singular_values import cached_singular_values, singular_values
from kvprof.profile.spectra import run_spectra, summed_up
from kvprof.records.formats import TENSORS
from kvprof.records.requests.measure import SpectraRequest
from kvprof.records.spectra import Spectra
from kvprof.storage.journal import Journal

Truth = dict[tuple[int, str], np.ndarray]


def random_ids(length: int, seed: int = 1) -> list[int]:
    return torch.randint(1, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def cached(model: PreTrainedModel, ids: list[int]) -> dict[tuple[int, str], np.ndarray]:
    """Return the (H, T, D) keys and values of each layer, from a plain forward that fills a cache of every token."""
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return {
        (layer, tensor): states[0].double().numpy()
        for layer, kept in enumerate(cache.layers)
        for tensor, states in (("key", kept.keys), ("value", kept.values))
    }


def expected(model: PreTrainedModel, ids: list[int]) -> Truth:
    return {place: np.linalg.svd(states, compute_uv=False) for place, states in cached(model, ids).items()}


def found(model: PreTrainedModel, ids: list[int]) -> Truth:
    return cached_singular_values(model, take_inventory(model.config).geometry, ids)


@pytest.mark.parametrize("name", sorted(set(TINY) - {"falcon-grouped"}))
def test_they_are_those_of_every_head_in_transformers_own_cache(name: str) -> None:
    model, ids = tiny_model(name), random_ids(40)
    truth, measured = expected(model, ids), found(model, ids)
    assert list(measured) == [(layer, tensor) for layer in range(2) for tensor in TENSORS]
    for place, values in truth.items():
        assert measured[place].shape == values.shape
        np.testing.assert_allclose(measured[place], values, rtol=1e-9, atol=1e-12 * values.max())


def test_heads_that_a_cache_holds_once_for_each_query_head_count_once() -> None:
    model, ids = tiny_model("falcon-grouped"), random_ids(40)
    truth, measured = cached(model, ids), found(model, ids)
    for place, states_HTD in truth.items():
        assert len(states_HTD) == 4
        np.testing.assert_array_equal(states_HTD[::2], states_HTD[1::2])
        np.testing.assert_allclose(measured[place], np.linalg.svd(states_HTD[::2], compute_uv=False), rtol=1e-9)


@pytest.mark.parametrize("name", ["gemma3", "mistral-sliding"])
def test_of_a_sliding_window_all_tokens_count(name: str) -> None:
    model, ids = tiny_model(name), random_ids(40)
    measured, states_HTD = found(model, ids)[0, "key"], cached(model, ids)[0, "key"]
    window = np.linalg.svd(states_HTD[:, -16:], compute_uv=False)
    np.testing.assert_allclose(measured, np.linalg.svd(states_HTD, compute_uv=False), rtol=1e-9)
    assert (measured[:, 0] > 1.1 * window[:, 0]).all()


def test_of_a_fused_projection_they_are_those_of_its_rows() -> None:
    model, ids = tiny_model("gpt2"), random_ids(20)  # learned positions: nothing turns a key after its projection
    outputs = []
    handle = model.transformer.h[1].attn.c_attn.register_forward_hook(lambda *arguments: outputs.append(arguments[2]))
    measured = found(model, ids)
    handle.remove()
    both = outputs[0][0].double().numpy()  # (T, 3 x 32)
    for tensor, columns in (("key", slice(32, 64)), ("value", slice(64, 96))):
        states_HTD = both[:, columns].reshape(20, 4, 8).transpose(1, 0, 2)
        np.testing.assert_allclose(measured[1, tensor], np.linalg.svd(states_HTD, compute_uv=False), rtol=1e-9)


def test_keys_are_those_after_the_rotation() -> None:
    model, ids = tiny_model("llama"), random_ids(40)
    outputs = []
    handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *args: outputs.append(args[2]))
    measured = found(model, ids)[0, "key"]
    handle.remove()
    states_HTD = outputs[0][0].double().numpy().reshape(40, 2, 8).transpose(1, 0, 2)
    unturned = np.linalg.svd(states_HTD, compute_uv=False)
    norm = np.linalg.norm(unturned, axis=1)
    np.testing.assert_allclose(np.linalg.norm(measured, axis=1), norm, rtol=1e-6)  # a rotation keeps each token's norm
    assert np.abs(measured - unturned).max() > 0.01 * norm.max()


_SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "pad_token_id": 0}
_SMALL |= {"intermediate_size": 48, "num_hidden_layers": 4, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("name", "settings", "layers"),
    [
        (
            "FalconH1",
            {"head_dim": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 64},
            [0, 1, 2, 3],
        ),
        (
            "Jamba",
            {
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "num_experts": 2,
                "mamba_d_state": 4,
                "mamba_dt_rank": 4,
                "use_mamba_kernels": False,
            },
            [1, 3],
        ),
        (
            "Gemma3nText",
            {
                "head_dim": 8,
                "num_kv_shared_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "sliding_window": 64,
                "intermediate_size": [48] * 4,
                "activation_sparsity_pattern": [0.0] * 4,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": 96,
                "laurel_rank": 4,
                "altup_num_inputs": 2,
            },
            [0, 1],
        ),
    ],
)
def test_layers_without_keys_of_their_own_are_left_out(
    name: str, settings: dict[str, object], layers: list[int]
) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**_SMALL | settings)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), random_ids(30)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
    measured = found(model, ids)
    assert list(measured) == [(layer, tensor) for layer in layers for tensor in TENSORS]
    for (layer, tensor), values in measured.items():
        states = cache.layers[layer].keys if tensor == "key" else cache.layers[layer].values
        np.testing.assert_allclose(values, np.linalg.svd(states[0].double().numpy(), compute_uv=False), rtol=1e-9)


def test_a_model_in_half_precision_is_measured_as_it_caches() -> None:
    model, ids = tiny_model("llama").to(torch.bfloat16), random_ids(40)
    for place, values in expected(model, ids).items():
        np.testing.assert_allclose(found(model, ids)[place], values, rtol=1e-9)


def test_small_values_beside_a_large_one_keep_their_digits() -> None:
    generator = np.random.default_rng(0)
    left, right = (np.linalg.qr(generator.standard_normal((size, 8)))[0] for size in (50, 8))
    values = 10.0 ** -np.arange(0, 12, 1.5)
    for matrix in (left * values @ right.T, (left * values @ right.T).T):
        measured = singular_values(torch.from_numpy(matrix)[None])[0]
        np.testing.assert_allclose(measured, values, rtol=1e-4)  # a Gram matrix loses all beyond the fifth


@pytest.mark.parametrize("exponent", [-1000, -600, 600, 1015])
@pytest.mark.parametrize("tokens", [5, 40])
def test_values_of_any_size_are_those_of_one_times_it(tokens: int, exponent: int) -> None:
    matrices = np.random.default_rng(tokens).standard_normal((2, tokens, 8))
    true = np.linalg.svd(matrices, compute_uv=False)
    measured = singular_values(torch.from_numpy(np.ldexp(matrices, exponent)))
    np.testing.assert_allclose(np.ldexp(measured, -exponent), true, rtol=1e-12)
    (entry,) = summed_up([{(0, "key"): measured, (0, "value"): np.zeros((2, min(tokens, 8)))}])
    (usual,) = summed_up([{(0, "key"): true, (0, "value"): true}])
    np.testing.assert_allclose(np.ldexp(entry.key.mean, -exponent), usual.key.mean, rtol=1e-12)
    assert np.ldexp(entry.key.frobenius_norm, -exponent) == pytest.approx(usual.key.frobenius_norm, rel=1e-12)
    assert entry.value.frobenius_norm == 0.0


def test_a_norm_beyond_float64_is_refused() -> None:
    model, ids = tiny_model("llama").double(), random_ids(20)
    projection = model.model.layers[1].self_attn.v_proj
    with torch.no_grad():
        largest = projection.weight.new_tensor(float(found(model, ids)[1, "value"].max()))
        projection.weight.mul_(1.7e308 / largest)  # the spectral norm is finite, and the Frobenius norm is not
    with pytest.raises(
        KvprofError, match=r"the values of layer 1 reach \d\.?\d*e\+30[78]: their norm is beyond float64"
    ):
        found(model, ids)


def test_a_short_text_has_no_more_values_than_tokens() -> None:
    model = tiny_model("qwen3")
    assert {values.shape for values in found(model, random_ids(5)).values()} == {(2, 5)}
    assert {values.shape for values in found(model, random_ids(17)).values()} == {(2, 16)}


def test_a_layer_s_keys_and_values_are_let_go_before_the_next_layer_s_come(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, caches = tiny_model("llama"), [], []

    def watched(states: torch.Tensor) -> np.ndarray:
        for before in seen[: len(seen) // 2 * 2]:  # a layer's own key may wait for its value
            assert before() is None
        assert states._base is not None
        seen.append(weakref.ref(states._base))
        return singular_values(states)

    def run(model: PreTrainedModel, **inputs: object) -> Head:
        caches.append(inputs["past_key_values"])
        return Head(model, **inputs)

    monkeypatch.setattr(measuring, "singular_values", watched)
    monkeypatch.setattr(measuring, "Head", run)
    found(model, random_ids(20))
    assert len(seen) == 4
    assert [layer.keys for layer in caches[0].layers] == [None, None]


def test_the_model_is_left_as_it_was() -> None:
    model, ids = tiny_model("llama"), random_ids(20)
    with torch.no_grad():
        before = model(input_ids=torch.tensor([ids])).logits
        found(model, ids)
        assert torch.equal(model(input_ids=torch.tensor([ids])).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("projection", "tensor"), [("k_proj", "keys"), ("v_proj", "values")])
def test_what_is_not_finite_is_named_with_its_layer(projection: str, tensor: str) -> None:
    model = tiny_model("llama")
    getattr(model.model.layers[1].self_attn, projection).weight[3] = torch.inf
    with pytest.raises(KvprofError, match=f"the {tensor} of layer 1 are not finite in float32"):
        found(model, random_ids(20))


def test_a_model_with_a_cache_of_its_own_is_named() -> None:
    if not hasattr(transformers, "MiniMaxConfig"):
        pytest.skip("this transformers has no MiniMax")
    kinds = ["linear_attention", "full_attention"] * 2
    config = transformers.MiniMaxConfig(**_SMALL, head_dim=8, layer_types=kinds, num_local_experts=2)
    with pytest.raises(ModelError, match="MiniMaxForCausalLM brings a cache class of its own, MiniMaxCache"):
        found(AutoModelForCausalLM.from_config(config).eval(), random_ids(20))


def test_heads_are_averaged_over_sequences_before_the_band_is_taken() -> None:
    one = {(3, "key"): np.array([[8.0, 2.0], [2.0, 1.0]]), (3, "value"): np.array([[3.0, 4.0 / 3], [1.0, 0.0]])}
    other = {(3, "key"): np.array([[2.0, 0.0], [4.0, 3.0]]), (3, "value"): np.array([[1.0], [1.0]])}
    (entry,) = summed_up([one, other])
    assert entry.layer == 3
    assert (entry.key.heads, entry.key.mean) == (2, (4.0, 1.5))
    assert (entry.key.low, entry.key.high) == ((3.0, 1.0), (5.0, 2.0))
    assert entry.key.spectral_norm == 4.0
    assert entry.key.frobenius_norm == pytest.approx((68**0.5 + 5**0.5 + 2 + 5) / 4)
    assert entry.value.mean == pytest.approx((1.5, 1 / 3))  # one token only: a second value of 0
    assert entry.value.low == (1.0, 0.0)


SETTINGS = SpectraRequest(data=("text.txt",), sequences=5, sequence_length=24)


@pytest.fixture
def source(in_tmp: Path) -> ModelSource:
    save_folder(in_tmp / "model")
    save_text(in_tmp / "text.txt")
    return resolve("model")


def test_the_file_holds_means_over_the_text_s_own_sequences(source: ModelSource) -> None:
    run = run_spectra(source, SETTINGS, Path("out"))
    text = tokenize(open_text("text.txt", None, 0), load_tokenizer(source), 5, 24)
    assert len({len(ids) for ids in text.sequences}) > 1  # of several lengths, none padded
    model = AutoModelForCausalLM.from_pretrained("model").eval()
    truths = [expected(model, list(ids)) for ids in text.sequences]
    spectra = Spectra.load("out/spectra.json")
    assert spectra == run.spectra
    assert spectra.calibration == text.info
    assert [entry.layer for entry in spectra.layers] == [0, 1]
    for entry in spectra.layers:
        for tensor in TENSORS:
            several = [truth[entry.layer, tensor] for truth in truths]
            heads_HN = sum(np.pad(values, ((0, 0), (0, 8 - values.shape[1]))) for values in several) / 5
            spectrum = entry.tensor(tensor)
            assert spectrum.heads == 2
            np.testing.assert_allclose(spectrum.mean, heads_HN.mean(0), rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(spectrum.low, heads_HN.min(0), rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(spectrum.high, heads_HN.max(0), rtol=1e-6, atol=1e-9)
            assert spectrum.spectral_norm == pytest.approx(heads_HN[:, 0].mean(), rel=1e-6)
            norms = [np.linalg.norm(values, axis=1).mean() for values in several]
            assert spectrum.frobenius_norm == pytest.approx(sum(norms) / 5, rel=1e-6)
    assert not list(Path("out").glob("*.journal*"))


def test_texts_shorter_than_a_head_are_remarked_on(source: ModelSource) -> None:
    run = run_spectra(source, SETTINGS, Path("out"))
    lengths = [len(ids) for ids in tokenize(open_text("text.txt", None, 0), load_tokenizer(source), 5, 24).sequences]
    short = sum(length < 8 for length in lengths)
    said = any("fewer tokens than a head has dimensions (8)" in remark for remark in run.remarks)
    assert said == bool(short)
    cut = run_spectra(source, changed(SETTINGS, sequence_length=6), Path("cut"))
    assert any(remark.startswith("5 of 5 sequences have fewer tokens") for remark in cut.remarks)
    assert {len(entry.key.mean) for entry in cut.spectra.layers} == {6}


class Stopped(BaseException):
    """What a signal would raise."""


def test_a_stopped_run_goes_on_and_writes_the_same_bytes(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    run_spectra(source, SETTINGS, Path("whole"))

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        run_spectra(source, SETTINGS, Path("stopped"), progress=stop)
    assert not Path("stopped/spectra.json").exists()
    forwards = []
    measure = running.cached_singular_values
    monkeypatch.setattr(running, "cached_singular_values", lambda *given: forwards.append(1) or measure(*given))
    seen = []
    run = run_spectra(source, SETTINGS, Path("stopped"), progress=lambda *at: seen.append(at))
    assert len(forwards) == 2
    assert seen == [(3, 5), (4, 5), (5, 5)]
    assert run.remarks[0] == "went on with a stopped run: 3 of 5 sequences were measured before"
    assert Path("stopped/spectra.json").read_bytes() == Path("whole/spectra.json").read_bytes()
    assert not list(Path("stopped").glob("*.journal*"))


def stopped_run(source: ModelSource) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run_spectra(source, SETTINGS, Path("out"), progress=stop)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"sequence_length": 20}, "sequence_length"), ({"sequences": 4}, "sequences"), ({"dtype": "bfloat16"}, "dtype")],
)
def test_other_settings_do_not_go_on_with_a_stopped_run(
    source: ModelSource, changes: dict[str, object], named: str
) -> None:
    stopped_run(source)
    with pytest.raises(Mismatch, match=named):
        run_spectra(source, changed(SETTINGS, **changes), Path("out"))
    run = run_spectra(source, changed(SETTINGS, **changes), Path("out"), restart=True)
    assert not any("stopped run" in remark for remark in run.remarks)


def test_other_weights_do_not_go_on_with_a_stopped_run(source: ModelSource) -> None:
    stopped_run(source)
    edit_weights(Path("model"), lambda state: state["model.layers.0.self_attn.k_proj.weight"].neg_())
    with pytest.raises(Mismatch, match="model fingerprint"):
        run_spectra(source, SETTINGS, Path("out"))


def test_two_runs_do_not_write_one_journal(source: ModelSource) -> None:
    with Journal(Path("out/spectra.journal"), {}), pytest.raises(OutputError, match="another kvprof is writing"):
        run_spectra(source, SETTINGS, Path("out"))


@pytest.mark.parametrize(
    "line", [("7", []), ("0", []), ("0", [[[1.0]]] * 4), ("0", 3), ("zero", []), ("0", [None] * 4)]
)
def test_a_journal_of_something_else_is_refused(source: ModelSource, line: tuple[str, object]) -> None:
    stopped_run(source)
    path = Path("out/spectra.journal")
    head = path.read_text().splitlines()[0]
    with Journal(path, json.loads(head.split(" ", 1)[1])[1]) as log:
        assert set(log.done) == {"0", "1"}
        log.add(*line)
    with pytest.raises(InvalidFile, match="does not hold what this command measures"):
        run_spectra(source, SETTINGS, Path("out"))


def test_a_model_that_projects_no_keys_is_refused_before_it_is_loaded(in_tmp: Path) -> None:
    save_folder(in_tmp / "model")
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=96, state_size=4)
    config.save_pretrained(in_tmp / "model")
    with pytest.raises(UnknownLayout, match="no layer keeps keys and values of its own"):
        run_spectra(resolve("model"), SETTINGS, Path("out"))


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_a_streamed_model_has_the_same_spectra(name: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPROF_CACHE", str(in_tmp / "cache"))
    save_folder(in_tmp / "model", name)
    save_text(in_tmp / "text.txt")
    for folder, stream in (("whole", False), ("streamed", True)):
        run_spectra(resolve("model"), changed(SETTINGS, stream=stream), Path(folder))
    assert Path("whole/spectra.json").read_bytes() == Path("streamed/spectra.json").read_bytes()
