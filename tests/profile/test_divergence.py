"""Is the measured divergence that of a decoder whose one tensor is quantized? Held against a decoding loop of its own.

The truth: token by token through transformers' own cache, whose old tokens the test rounds by NumPy before each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import save_folder, save_text
from requested import changed
from runtime.reference import rounded, tokens_in_codes
from scipy.special import rel_entr
from tiny import tiny_model
from transformers import DynamicCache, PreTrainedModel

from kvprof.errors import Mismatch, UnsupportedAttention, UsageError
from kvprof.models.inventory import take_inventory
from kvprof.models.load import resolve
from kvprof.models.source import ModelSource
from kvprof.profile import divergence
from kvprof.profile.divergence import divergences, run_divergence
from kvprof.profile.probes import Probe, choose_probes
from kvprof.records.formats import TENSORS
from kvprof.records.geometry import CacheGeometry, KVLayer
from kvprof.records.plan import Quantizer, TensorPlan, Window
from kvprof.records.requests.measure import DivergenceRequest
from kvprof.records.scores import Scores

WINDOW = Window(sink_tokens=2, recent_tokens=5)


def precise(name: str) -> PreTrainedModel:
    return tiny_model(name).double()


def random_ids(length: int, seed: int = 1) -> list[int]:
    return torch.randint(1, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def decoded(model: PreTrainedModel, ids: Sequence[int], probe: Probe | None, window: Window = WINDOW) -> np.ndarray:
    """Return each position's next-token distribution, (T, V), every token decoded alone."""
    layers = range(model.config.num_hidden_layers)
    exact: list[dict[str, list[torch.Tensor]]] = [{"key": [], "value": []} for _ in layers]
    found = []
    for token in ids:
        cache = DynamicCache()
        for layer in layers if exact[0]["key"] else ():
            states = {tensor: torch.cat(exact[layer][tensor], dim=2) for tensor in TENSORS}
            if probe is not None and probe.layer == layer:
                plan = TensorPlan(**probe.form.model_dump())
                coded = tokens_in_codes(states["key"].shape[2], plan, window)
                part = slice(window.sink_tokens, window.sink_tokens + coded)
                if coded:
                    old = states[probe.tensor][:, :, part].numpy()
                    states[probe.tensor][:, :, part] = torch.from_numpy(rounded(old, probe.form, Quantizer()))
            cache.update(states["key"], states["value"], layer)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1]
        for layer in layers:
            exact[layer]["key"].append(cache.layers[layer].keys[:, :, -1:])
            exact[layer]["value"].append(cache.layers[layer].values[:, :, -1:])
        found.append(logits.double().softmax(-1).numpy())
    return np.stack(found)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("fraction", [0.5, 0.25])
def test_each_tensor_s_divergence_is_that_of_a_decoder_which_rounds_its_old_tokens(name: str, fraction: float) -> None:
    model, ids = precise(name), random_ids(30)
    inventory = take_inventory(model.config)
    probes = choose_probes(inventory.geometry, None, "key,value", "key:int2g4,key:rot2,value:int2g8c,value:rot1")
    measured = dict(divergences(model, inventory, probes, ids, WINDOW, fraction))
    assert list(measured) == probes
    assert len(probes) == 8
    first = len(ids) - round(len(ids) * fraction)
    reference = decoded(model, ids, None)[first:]
    for probe, kl_nats in measured.items():
        expected = rel_entr(reference, decoded(model, ids, probe)[first:]).sum(-1).mean()
        assert expected > 1e-7
        assert kl_nats == pytest.approx(expected, rel=2e-3, abs=1e-9), probe


def test_full_precision_diverges_from_itself_by_nothing() -> None:
    model = tiny_model("llama")
    inventory = take_inventory(model.config)
    probes = choose_probes(inventory.geometry, None, "key,value", "full")
    assert [kl for _, kl in divergences(model, inventory, probes, random_ids(30), WINDOW, 0.5)] == [0.0] * 4


def test_a_model_whose_attention_cannot_be_replaced_is_named() -> None:
    model = tiny_model("xglm")
    inventory = take_inventory(model.config)
    probes = choose_probes(inventory.geometry, None, "key", "int2g4")
    with pytest.raises(UnsupportedAttention, match="attends in a way of its own"):
        list(divergences(model, inventory, probes, random_ids(30), WINDOW, 0.5))


def geometry(kinds: Sequence[str] = ("full",) * 4, head_dim: int = 64) -> CacheGeometry:
    heads = {"kv_heads": 2, "key_head_dim": head_dim, "value_head_dim": head_dim}
    slides = {"kind": "sliding", "window": 8, "skipped": "sliding window of 8 tokens"}
    extras = [{"kind": "full"} if kind == "full" else slides for kind in kinds]
    layers = [KVLayer(layer=layer, **heads, **extra) for layer, extra in enumerate(extras)]
    return CacheGeometry(dtype="float32", layers=tuple(layers))


@pytest.mark.parametrize(
    ("layers", "expected"), [(None, [0, 1, 2, 3]), ("1", [1]), ("0-2", [0, 1, 2]), ("3, 0-1,1", [0, 1, 3])]
)
def test_layers_are_chosen_as_they_are_written(layers: str | None, expected: list[int]) -> None:
    probes = choose_probes(geometry(), layers, "key,value", "int2g64")
    assert [(probe.layer, probe.tensor) for probe in probes] == [(n, tensor) for n in expected for tensor in TENSORS]


def test_layers_that_no_plan_covers_are_left_out_and_cannot_be_asked_for() -> None:
    mixed = geometry(("full", "sliding", "full"))
    assert {probe.layer for probe in choose_probes(mixed, None, "key", "int2g64")} == {0, 2}
    with pytest.raises(UsageError, match="layer 1: sliding window of 8 tokens"):
        choose_probes(mixed, "0-2", "key", "int2g64")
    with pytest.raises(UsageError, match="every layer of this model is skipped"):
        choose_probes(geometry(("sliding",)), None, "key", "int2g64")


def test_groups_of_channels_are_capped_and_each_format_is_measured_once() -> None:
    probes = choose_probes(geometry(head_dim=32), "0", "value,key", "int2g64,int2g128,value:rot2")
    assert [(probe.tensor, probe.form.name) for probe in probes] == [
        ("key", "int2g64"),
        ("key", "int2g128"),
        ("value", "int2g32"),
        ("value", "rot2"),
    ]


@pytest.mark.parametrize(
    ("layers", "tensors", "formats", "words"),
    [
        ("4", "key", "int2g64", "there is no layer 4; the last is 3"),
        ("2-1", "key", "int2g64", "runs backwards; write 1-2"),
        ("", "key", "int2g64", "cannot read ''"),
        ("all", "key", "int2g64", "cannot read 'all'"),
        ("-1", "key", "int2g64", "cannot read '-1'"),
        (None, "keys", "int2g64", "did you mean 'key'"),
        (None, "", "int2g64", "no tensor is called ''"),
        (None, "key", "int9g64", "'int9g64' is no format"),
        (None, "key,value", "key:int2g64", "names none for the values"),
    ],
)
def test_a_sample_that_cannot_be_is_refused_in_words(
    layers: str | None, tensors: str, formats: str, words: str
) -> None:
    with pytest.raises(UsageError) as raised:
        choose_probes(geometry(), layers, tensors, formats)
    assert words in str(raised.value)


def test_a_rotation_that_the_heads_cannot_have_is_refused() -> None:
    with pytest.raises(UsageError, match="a power of two"):
        choose_probes(geometry(head_dim=48), None, "key", "rot2")


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return resolve(str(save_folder(tmp_path / "model")))


@pytest.fixture
def settings(tmp_path: Path) -> DivergenceRequest:
    text = str(save_text(tmp_path / "text.txt", rows=60))
    return DivergenceRequest(
        formats="key:int2g4,value:int2g8", sink_tokens=1, recent_tokens=4, data=(text,), pack=True,
        sequences=3, sequence_length=40, dtype="float32", device="cpu",
    )  # fmt: skip


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[Probe]:
    """The probes that are measured."""
    seen: list[Probe] = []
    measure = divergence.divergences

    def spy(model: object, inventory: object, probes: Sequence[Probe], *rest: object) -> object:
        for probe, kl_nats in measure(model, inventory, probes, *rest):
            seen.append(probe)
            yield probe, kl_nats

    monkeypatch.setattr(divergence, "divergences", spy)
    return seen


def stop_after(forwards: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= forwards:
            raise KeyboardInterrupt

    return progress


def test_the_file_holds_what_was_measured_and_on_what(
    source: ModelSource, settings: DivergenceRequest, tmp_path: Path
) -> None:
    run = run_divergence(source, changed(settings, layers="1", tensors="value"), tmp_path / "out")
    scores = Scores.load(run.path)
    assert scores == run.scores
    assert (run.path.name, scores.source) == ("divergence.json", "divergence")
    assert scores.decoding.model_dump() == {
        "window": {"sink_tokens": 1, "recent_tokens": 4},
        "suffix_fraction": 0.5,
        "tokens": 3 * 20,
    }
    assert (scores.calibration.sequences, scores.calibration.tokens) == (3, 120)
    assert scores.model.fingerprint.startswith("sha256:")
    untouched, measured = scores.layers
    assert untouched.key.loss_increase is untouched.value.loss_increase is measured.key.loss_increase is None
    samples = measured.value.loss_increase_samples["int2g8"]
    assert len(samples) == 3
    assert measured.value.loss_increase["int2g8"] == pytest.approx(np.mean(samples), rel=1e-12)
    assert measured.value.loss_increase_stderr["int2g8"] == pytest.approx(np.std(samples, ddof=1) / np.sqrt(3))


def test_a_single_sequence_has_no_standard_error(
    source: ModelSource, settings: DivergenceRequest, tmp_path: Path
) -> None:
    scores = run_divergence(source, changed(settings, sequences=1), tmp_path / "out").scores
    assert scores.layers[0].key.loss_increase_stderr is None


def test_texts_can_be_mixed_and_each_keeps_its_own_mean(
    source: ModelSource, settings: DivergenceRequest, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n".join(["mat at all no another mat cat saw the"] * 60))
    mixed = changed(settings, data=[*settings.data, str(other)], sequences=4)
    scores = run_divergence(source, mixed, tmp_path / "out").scores
    value = scores.layers[0].value
    samples, source_of = value.loss_increase_samples["int2g8"], scores.calibration.source_of
    for place, share in enumerate(scores.calibration.sources):
        own = [sample for sample, of in zip(samples, source_of, strict=True) if of == place]
        assert len(own) == 2
        assert value.loss_increase_by_source[share.dataset]["int2g8"] == pytest.approx(np.mean(own))


@pytest.mark.parametrize("after", [0, 3, 4, 12])
def test_a_stopped_run_goes_on_to_the_same_file_and_measures_only_the_rest(
    source: ModelSource, settings: DivergenceRequest, tmp_path: Path, forwards: list[Probe], after: int
) -> None:
    whole = run_divergence(source, settings, tmp_path / "whole").path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run_divergence(source, settings, tmp_path / "out", progress=stop_after(after))
    assert not (tmp_path / "out" / "divergence.json").exists()
    forwards.clear()
    seen: list[tuple[int, int]] = []
    resumed = run_divergence(source, settings, tmp_path / "out", progress=lambda *at: seen.append(at))
    assert resumed.path.read_bytes() == whole
    assert len(forwards) == 12 - after
    assert seen == [(done, 12) for done in range(after, 13)]
    assert any(f"{after} of 12" in remark for remark in resumed.remarks) == (after > 0)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["divergence.json"]


def test_other_layers_and_formats_may_go_on_with_a_stopped_run(
    source: ModelSource, settings: DivergenceRequest, tmp_path: Path, forwards: list[Probe]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_divergence(source, settings, tmp_path / "out", progress=stop_after(4))
    forwards.clear()
    run_divergence(source, changed(settings, formats="key:int2g4,value:int3g8", layers="0"), tmp_path / "out")
    assert sorted((probe.tensor, probe.form.name) for probe in forwards) == (
        [("key", "int2g4")] * 2 + [("value", "int3g8")] * 3
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recent_tokens": 5}, "recent_tokens"),
        ({"suffix_fraction": 0.25}, "suffix_fraction"),
        ({"sequences": 2}, "sequences"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_a_stopped_run_refuses_what_would_change_its_numbers(
    source: ModelSource, settings: DivergenceRequest, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_divergence(source, settings, tmp_path / "out", progress=stop_after(2))
    with pytest.raises(Mismatch, match=f"another {named}:"):
        run_divergence(source, changed(settings, **change), tmp_path / "out")
    assert run_divergence(source, changed(settings, **change), tmp_path / "out", restart=True).path.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"suffix_fraction": 0.0}, "--suffix-fraction 0"),
        ({"suffix_fraction": 1.5}, "--suffix-fraction 1.5"),
        ({"sequences": 0}, "--sequences 0"),
        ({"sequence_length": 65}, "--sequence-length 65"),
        ({"recent_tokens": 39}, "no query reads a key in int2g4"),
        ({"formats": "key:int2g64,value:int2g8"}, "so 70 tokens are the least"),
        ({"layers": "2"}, "there is no layer 2"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_the_model_loads(
    source: ModelSource,
    settings: DivergenceRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, object],
    words: str,
) -> None:
    monkeypatch.setattr(divergence, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError) as raised:
        run_divergence(source, changed(settings, **change), tmp_path / "out")
    assert words in str(raised.value)


def test_the_least_number_of_tokens_that_is_named_is_enough(
    source: ModelSource, settings: DivergenceRequest, tmp_path: Path
) -> None:
    fitting = changed(settings, formats="key:int2g32,value:int2g8", sequence_length=38)
    scores = run_divergence(source, fitting, tmp_path / "out").scores  # 1 sink, 32 in a group, 4 recent, 1 to read them
    assert scores.layers[0].key.loss_increase["int2g32"] > 0
    with pytest.raises(UsageError, match="so 38 tokens are the least"):
        run_divergence(source, changed(fitting, sequence_length=37), tmp_path / "out")


def test_sequences_that_end_within_the_window_are_counted_aloud(
    source: ModelSource, settings: DivergenceRequest, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("the cat sat on a mat\n" + "the cat sat on a mat and saw another cat that sat on no mat at all\n")
    run = run_divergence(source, changed(settings, data=[str(rows)], pack=False), tmp_path / "out")
    assert any("1 of 2 sequences end before anything is quantized" in remark for remark in run.remarks)


def test_numbers_that_rounding_can_make_are_named(
    source: ModelSource, settings: DivergenceRequest, tmp_path: Path
) -> None:
    run = run_divergence(source, changed(settings, dtype="bfloat16"), tmp_path / "out")
    assert any("rounding logits to bfloat16" in remark for remark in run.remarks)
