"""What a Scores file may and may not say, hand-written ones included."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprof.errors import InvalidFile, UsageError
from kvprof.records.scores import Scores


def read(value: dict[str, Any]) -> Scores:
    return Scores.from_json(value, "scores.json")


def refusal(value: dict[str, Any]) -> str:
    with pytest.raises(InvalidFile) as caught:
        read(value)
    return str(caught.value)


def scored_layers(*layers: int) -> list[dict[str, Any]]:
    return [{"layer": layer, "key": {"spectral_norm": 1.0}, "value": {"spectral_norm": 2.0}} for layer in layers]


# Written by hand


def test_a_file_of_schema_and_layers_alone_is_valid(scores_json: dict[str, Any]) -> None:
    scores = read(scores_json)
    assert scores.metric("spectral_norm") == [(0, "key", 62.03), (0, "value", 3.44), (1, "key", 41.5), (1, "value", 4)]
    assert (scores.model, scores.geometry, scores.calibration, scores.source) == (None, None, None, None)


@pytest.mark.parametrize("field", ["model", "geometry", "calibration", "source", "kvprof_version"])
def test_a_field_may_be_null_as_well_as_absent(scores_json: dict[str, Any], field: str) -> None:
    assert read({**scores_json, field: None}) == read(scores_json)


def test_a_null_metric_is_an_absent_one(scores_json: dict[str, Any], tmp_path: Path) -> None:
    scores_json["layers"][0]["key"]["bias_norm"] = None
    path = read(scores_json).save(tmp_path / "scores.json")
    assert "bias_norm" not in path.read_text()


def test_the_example_of_the_design_is_valid() -> None:
    scores = read(
        {
            "schema": "kvprof.scores/1",
            "source": "norms",
            "kvprof_version": "0.1.0",
            "model": {"id": "m", "fingerprint": "sha256:0", "architecture": "LlamaForCausalLM", "num_layers": 1},
            "calibration": {
                "dataset": "builtin",
                "split": "calibration",
                "sequences": 16,
                "sequence_length": 512,
                "tokens": 8192,
                "seed": 0,
                "fingerprint": "sha256:1",
            },
            "geometry": None,
            "layers": [
                {
                    "layer": 0,
                    "key": {"spectral_norm": 62.03, "frobenius_norm": 132.29},
                    "value": {"spectral_norm": 3.44, "frobenius_norm": 15.57},
                }
            ],
        }
    )
    assert scores.metrics == ("spectral_norm", "frobenius_norm")


# Layers


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((1,), "layer 0 is missing"),
        ((0, 2), "layer 1 is missing"),
        ((0, 9_999), "layer 1 is missing"),
        ((0, 1, 1, 2), "layer 1 stands 2 times"),
        ((0, 0, 0), "layer 0 stands 3 times"),
        ((1, 0), "ascending"),
        ((), "empty"),
    ],
)
def test_layers_that_are_missing_or_repeated_are_named(
    scores_json: dict[str, Any], layers: tuple[int, ...], words: str
) -> None:
    assert words in refusal({**scores_json, "layers": scored_layers(*layers)})


def test_the_last_layers_are_missed_when_the_model_says_how_many_it_has(scores_json: dict[str, Any]) -> None:
    assert "layer 2 is missing" in refusal({**scores_json, "model": {"num_layers": 3}})
    assert "layer 1 has no K and V projections" in refusal({**scores_json, "model": {"num_layers": 1}})


def test_a_hybrid_model_is_scored_where_it_has_projections_of_its_own(
    scores_json: dict[str, Any], hybrid_geometry_json: dict[str, Any]
) -> None:
    value = {**scores_json, "geometry": hybrid_geometry_json}
    assert len(read({**value, "layers": scored_layers(0, 1, 4)}).layers) == 3
    assert "layer 1 is missing" in refusal({**value, "layers": scored_layers(0, 4)})
    assert "layer 4 is missing" in refusal({**value, "layers": scored_layers(0, 1)})
    assert "layer 2 has no K and V projections" in refusal({**value, "layers": scored_layers(0, 1, 2, 4)})
    assert "layer 7 has no K and V projections" in refusal({**value, "layers": scored_layers(0, 1, 4, 7)})


def test_a_geometry_of_another_number_of_layers_than_the_model_is_refused(
    scores_json: dict[str, Any], hybrid_geometry_json: dict[str, Any]
) -> None:
    value = {**scores_json, "layers": scored_layers(0, 1, 4), "geometry": hybrid_geometry_json}
    assert read({**value, "model": {"num_layers": 5}})
    assert "num_layers is 6" in refusal({**value, "model": {"num_layers": 6}})


# Numbers


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -1, -1e-300])
@pytest.mark.parametrize("tensor", ["key", "value"])
@pytest.mark.parametrize(
    ("metric", "place"),
    [
        ("spectral_norm", None),
        ("frobenius_norm", None),
        ("gradient_norm", None),
        ("gradient_norm_stderr", None),
        ("bias_norm", None),
        ("head_spectral_norm", 1),
        ("loss_increase", "int2g32"),
        ("loss_increase_stderr", "int2g32"),
    ],
)
def test_a_number_that_is_no_measurement_is_named_with_its_layer(
    scores_json: dict[str, Any], number: float, tensor: str, metric: str, place: str | int | None
) -> None:
    inner = {None: number, 1: [0.5, number], "int2g32": {"q4_0": 0.5, "int2g32": number}}[place]
    scores_json["layers"][1][tensor][metric] = inner
    message = refusal(scores_json)
    assert "layer 1: " in message
    assert metric in message
    assert tensor in message
    assert place is None or f"[{place}]" in message


def test_not_a_number_in_the_text_of_a_file_is_named_with_its_layer(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    text = '{"schema": "kvprof.scores/1", "layers": [{"layer": 0, "key": {"gradient_norm": NUMBER}, "value": {}}]}'
    for word in ("NaN", "Infinity", "-Infinity", "1e999"):
        path.write_text(text.replace("NUMBER", word))
        with pytest.raises(InvalidFile, match="layer 0: gradient_norm of the key"):
            Scores.load(path)


@pytest.mark.parametrize("wrong", ["1.5", True, [1.5], {"a": 1.5}, 10**400])
def test_a_metric_is_a_number_and_nothing_that_could_pass_for_one(scores_json: dict[str, Any], wrong: object) -> None:
    scores_json["layers"][1]["value"]["spectral_norm"] = wrong
    assert "layers[1].value.spectral_norm" in refusal(scores_json)


@given(st.lists(st.floats(min_value=0, allow_infinity=False), min_size=1, max_size=6))
def test_every_finite_number_survives_the_file_to_the_last_bit(numbers: list[float]) -> None:
    layers = [
        {"layer": layer, "key": {"gradient_norm": number}, "value": {"loss_increase": {"int2g32": number}}}
        for layer, number in enumerate(numbers)
    ]
    scores = read({"schema": "kvprof.scores/1", "layers": layers})
    again = Scores.model_validate_json(scores.to_text())
    assert again == scores
    assert [entry.key.gradient_norm for entry in again.layers] == numbers


def test_a_format_of_another_runtime_may_have_a_loss_increase(scores_json: dict[str, Any]) -> None:
    scores_json["layers"][0]["key"]["loss_increase"] = {"q4_0": 0.1, "int2g32": 0.2}
    assert read(scores_json).layers[0].key.loss_increase == {"q4_0": 0.1, "int2g32": 0.2}


def test_an_unknown_metric_is_refused_with_the_nearest_known_one(scores_json: dict[str, Any]) -> None:
    scores_json["layers"][1]["key"]["spectral_nrom"] = 1.0
    assert "unknown key layers[1].key.spectral_nrom: did you mean 'spectral_norm'?" in refusal(scores_json)


# What allocate asks


def test_a_metric_counts_when_every_layer_has_it_for_both_tensors(scores_json: dict[str, Any]) -> None:
    scores_json["layers"][0]["key"]["gradient_norm"] = 1.0
    assert read(scores_json).metrics == ("spectral_norm",)
    for layer in scores_json["layers"]:
        layer["key"]["gradient_norm"] = layer["value"]["gradient_norm"] = 0
    assert read(scores_json).metrics == ("gradient_norm", "spectral_norm")


def test_asking_for_a_metric_that_a_layer_lacks_names_the_layer_and_the_command(scores_json: dict[str, Any]) -> None:
    scores_json["layers"][0]["key"]["gradient_norm"] = 1.0
    with pytest.raises(InvalidFile, match=r"gradient_norm for the value of layer 0(.|\n)*kvprof gradients"):
        read(scores_json).metric("gradient_norm")
    with pytest.raises(InvalidFile, match=r"spectral_norm\)(.|\n)*kvprof norms"):
        read(scores_json).metric("frobenius_norm")


def test_asking_for_a_metric_that_does_not_exist_is_a_usage_error(scores_json: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="did you mean 'spectral_norm'") as caught:
        read(scores_json).metric("spectral")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("numbers", "flat"),
    [
        ((1.0, 1.0, 1.0), True),
        ((0.0, 0.0, 0.0), True),
        ((1e-30, 1e-30, 1e-30), True),
        ((100.0, 100.5, 99.6), True),
        ((100.0, 100.5, 98.0), False),
        ((1e-30, 2e-30, 3e-30), False),
        ((0.0, 0.0, 1.0), False),
        ((5.0,), False),
    ],
)
def test_a_metric_that_hardly_varies_is_flat_whatever_its_scale(numbers: tuple[float, ...], flat: bool) -> None:
    layers = [
        {"layer": layer, "key": {"spectral_norm": number}, "value": {"spectral_norm": 10.0**layer}}
        for layer, number in enumerate(numbers)
    ]
    assert read({"schema": "kvprof.scores/1", "layers": layers}).is_flat("spectral_norm", "key") is flat


# Losses of formats


def with_losses(*pairs: tuple[dict[str, float] | None, dict[str, float] | None], **fields: Any) -> Scores:
    layers = [
        {"layer": n, "key": {} if key is None else {"loss_increase": key},
         "value": {} if value is None else {"loss_increase": value}}
        for n, (key, value) in enumerate(pairs)
    ]  # fmt: skip
    return read({"schema": "kvprof.scores/1", "layers": layers, **fields})


def test_losses_count_as_a_metric_where_every_tensor_that_a_plan_covers_has_them() -> None:
    some = {"int2g64": 0.1}
    assert with_losses((some, some), (some, some)).metrics == ("loss_increase",)
    assert with_losses((some, some), (some, None)).metrics == ()
    assert with_losses((some, some), (some, {})).metrics == ()
    shape = {"kind": "full", "kv_heads": 1, "key_head_dim": 48, "value_head_dim": 64}
    slides = {"kind": "sliding", "window": 8, "skipped": "sliding window of 8 tokens"}
    geometry = {"dtype": "float16", "layers": [{"layer": 0, **shape}, {"layer": 1, **shape, **slides}]}
    scores = with_losses((some, some), (None, None), geometry=geometry)
    assert scores.metrics == ("loss_increase",)
    assert [entry.layer for entry in scores.planned] == [0]


def test_scores_that_leave_sliding_layers_are_still_the_same_scores(tmp_path: Path) -> None:
    losses = {"int2g8": 0.1}
    shape = {"kind": "full", "kv_heads": 1, "key_head_dim": 8, "value_head_dim": 8}
    layers = [{"layer": 0, **shape}, {"layer": 1, **shape, "kind": "sliding", "window": 8}]
    scores = with_losses((losses, losses), (losses, losses), geometry={"dtype": "float16", "layers": layers})
    before = scores.digest
    left = scores.leaving({0: "full", 1: "too short"})
    assert [entry.layer for entry in scores.planned] == [0, 1]
    assert [entry.layer for entry in left.planned] == [0]
    assert left.digest == scores.digest == before
    assert left.leaving({1: "too short"}).digest == before
    assert scores.leaving({0: "full"}) is scores
    scores.save(tmp_path / "scores.json")
    assert Scores.load(tmp_path / "scores.json").leaving({1: "too short"}).digest == before


def test_losses_are_no_number_a_tensor() -> None:
    with pytest.raises(UsageError, match="loss_increase is a number for each format"):
        with_losses(({"int2g64": 0.1}, {"int2g64": 0.1})).metric("loss_increase")


def test_formats_that_no_plan_can_have_are_known() -> None:
    losses = {"int2g64": 0.1, "MXFP4": 0.1, "rot2": 0.1, "int2": 0.1, "q4_0": 0.1}
    shape = {"layer": 0, "kind": "full", "kv_heads": 1, "key_head_dim": 48, "value_head_dim": 64}
    scores = with_losses((losses, {"rot3": 0.1}), geometry={"dtype": "float16", "layers": [shape]})
    assert scores.passed_over == ("MXFP4", "rot2", "int2", "q4_0")  # 48 is no power of two, and no multiple of 32
    assert with_losses((losses, {"rot3": 0.1})).passed_over == ("MXFP4", "rot2", "int2", "rot3")


@pytest.mark.parametrize("number", [-1e-9, math.inf, math.nan])
@pytest.mark.parametrize("samples", [True, False])
def test_an_impossible_loss_is_named_with_its_format(number: float, samples: bool) -> None:
    tensor: dict[str, Any] = {"loss_increase": {"int2g64": 0.1, "rot2": 0.2 if samples else number}}
    if samples:
        tensor["loss_increase_samples"] = {"int2g64": [0.1, 0.1], "rot2": [0.4, number]}
    words = refusal({"schema": "kvprof.scores/1", "layers": [{"layer": 0, "key": {}, "value": tensor}]})
    assert "layer 0: loss_increase" in words
    assert ("loss_increase_samples[rot2][1]" if samples else "loss_increase[rot2]") in words


# What is said beside a loss agrees with it


def beside(tensor: dict[str, Any], calibration: dict[str, Any] | None = None) -> dict[str, Any]:
    """Scores whose second layer says this of its keys."""
    plain = {"loss_increase": {"int2g64": 0.2, "rot2": 0.1}}
    layers = [{"layer": 0, "key": plain, "value": plain}, {"layer": 1, "key": {**plain, **tensor}, "value": plain}]
    return {"schema": "kvprof.scores/1", "calibration": calibration, "layers": layers}


def text(sequences: int, **fields: Any) -> dict[str, Any]:
    return {"dataset": "mix", "sequences": sequences, "sequence_length": 8, "tokens": 32, "seed": 0, **fields}


def share(dataset: str, sequences: int) -> dict[str, Any]:
    return {"dataset": dataset, "sequences": sequences, "tokens": 8 * sequences}


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ({"loss_increase_samples": {"int2g64": [0.1, 0.3], "rot2": [0.1]}}, "loss_increase_samples[rot2] of length 1"),
        ({"loss_increase_samples": {"int2g64": []}}, "loss_increase_samples[int2g64] of length 0"),
        ({"loss_increase_samples": {"int2g64": [0.1, 0.1]}}, "0.2 as loss_increase[int2g64]"),
        ({"loss_increase_samples": {"int3g64": [0.1, 0.1]}}, "loss_increase_samples[int3g64] but no"),
        ({"loss_increase_stderr": {"int3g64": 0.1}}, "loss_increase_stderr[int3g64] but no"),
        ({"loss_increase_by_source": {"a": {"int3g64": 0.1}}}, "loss_increase_by_source[a][int3g64] but no"),
    ],
    ids=["lengths", "empty", "mean", "samples of nothing", "stderr of nothing", "source of nothing"],
)
def test_what_contradicts_a_loss_is_refused_with_its_layer(tensor: dict[str, Any], words: str) -> None:
    message = refusal(beside(tensor))
    assert "layer 1: the key has" in message
    assert words in message


def test_samples_are_one_a_sequence_of_the_text() -> None:
    samples = {"loss_increase_samples": {"int2g64": [0.1, 0.3], "rot2": [0.1, 0.1]}}
    Scores.from_json(beside(samples, text(2)), "mine")
    assert "but there are 3 sequences" in refusal(beside(samples, text(3)))


def test_samples_whose_sum_is_too_large_still_have_a_mean() -> None:
    huge = {"loss_increase": {"int2g64": 1e308}, "loss_increase_samples": {"int2g64": [1e308, 1e308]}}
    Scores.from_json(beside(huge), "mine")


def test_sources_are_those_of_the_text() -> None:
    means = {"loss_increase_by_source": {"a": {"int2g64": 0.2}}}
    Scores.from_json(beside(means), "mine")
    Scores.from_json(beside(means, text(2, sources=[share("a", 1), share("b", 1)])), "mine")
    assert "by_source[a], which is none" in refusal(beside(means, text(2, sources=[share("b", 1), share("c", 1)])))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"source_of": [0, 1]}, "source_of stands without sources"),
        ({"source_of": [0], "sources": [share("a", 1), share("b", 1)]}, "source_of has length 1, but there are 2"),
        ({"sequence_fingerprints": ["0f"]}, "sequence_fingerprints has length 1, but there are 2"),
        ({"source_of": [0, 2], "sources": [share("a", 1), share("b", 1)]}, "names source 2, but there are 2"),
        ({"source_of": [0, 0], "sources": [share("a", 1), share("b", 1)]}, "gives a 2 sequences, sources 1"),
    ],
    ids=["alone", "short", "prints", "beyond", "counts"],
)
def test_a_mix_that_does_not_add_up_is_refused(fields: dict[str, Any], words: str) -> None:
    assert words in refusal(beside({}, text(2, **fields)))


def test_a_layer_is_found_by_its_number() -> None:
    scores = Scores.from_json(beside({}), "mine")
    assert scores.entry(1) == scores.layers[1]
    assert scores.entry(2) is None
