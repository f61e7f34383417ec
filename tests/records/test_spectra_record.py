"""A Spectra file says what the cache holds, and one that contradicts itself is refused in a sentence."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvprof.errors import InvalidFile, Mismatch
from kvprof.records.geometry import CacheGeometry, KVLayer
from kvprof.records.kinds import KINDS, load_any
from kvprof.records.scores import Scores
from kvprof.records.spectra import Spectra, Spectrum


def spectrum(largest: float = 8.0) -> dict[str, Any]:
    """Return a spectrum of two heads of three dimensions, as a file has it."""
    mean = [largest, largest / 2, largest / 8]
    return {
        "heads": 2,
        "mean": mean,
        "low": [value * 0.5 for value in mean],
        "high": [value * 1.5 for value in mean],
        "spectral_norm": largest,
        "frobenius_norm": 1.01 * math.hypot(*mean),
    }


def document() -> dict[str, Any]:
    shape = {"kv_heads": 2, "key_head_dim": 3, "value_head_dim": 4}
    slides = {"kind": "sliding", "window": 16, "skipped": "sliding window of 16 tokens"}
    return {
        "schema": "kvprof.spectra/1",
        "kvprof_version": "0.1.0",
        "model": {"id": "a/model", "fingerprint": "sha256:0", "architecture": "A", "num_layers": 3},
        "calibration": {
            "dataset": "builtin",
            "split": "calibration",
            "sequences": 2,
            "sequence_length": 8,
            "tokens": 16,
            "seed": 0,
        },
        "geometry": {
            "dtype": "float32",
            "layers": [
                {"layer": 0, **shape, **slides},
                {
                    "layer": 1,
                    "kind": "recurrent",
                    "kv_heads": 0,
                    "key_head_dim": 0,
                    "value_head_dim": 0,
                    "skipped": "a state",
                },
                {"layer": 2, **shape, "kind": "full"},
            ],
        },
        "layers": [
            {"layer": 0, "key": spectrum(), "value": spectrum(2.0)},
            {"layer": 2, "key": spectrum(), "value": spectrum(9.0)},
        ],
    }


def written(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_a_file_is_read_and_written_alike(tmp_path: Path) -> None:
    spectra = Spectra.load(written(tmp_path / "given.json", document()))
    assert spectra.layers[0].tensor("key").mean == (8.0, 4.0, 1.0)
    assert spectra.layers[0].tensor("value").spectral_norm == 2.0
    path = spectra.save(tmp_path / "spectra.json")
    assert Spectra.load(path) == spectra
    assert json.loads(path.read_text())["schema"] == "kvprof.spectra/1"
    assert load_any(path) == spectra
    assert KINDS["spectra"] is Spectra


def test_a_file_by_hand_needs_layers_alone(tmp_path: Path) -> None:
    value = {"schema": "kvprof.spectra/1", "layers": document()["layers"]}
    assert Spectra.load(written(tmp_path / "hand.json", value)).geometry is None


def test_layers_with_larger_keys_are_told() -> None:
    assert Spectra.from_json(document(), "spectra.json").larger_keys == (0,)


def key(value: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = value["layers"][0]["key"]
    return found


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "negative": (lambda d: key(d)["low"].__setitem__(2, -1.0), "layers[0].key.low[2]"),
    "not a number": (lambda d: key(d)["mean"].__setitem__(0, "8"), "layers[0].key.mean[0]"),
    "rising": (lambda d: key(d)["mean"].__setitem__(1, 9.0), "mean[1] is 9.0, more than the 8.0 before it"),
    "outside": (lambda d: key(d)["mean"].__setitem__(2, 2.0), "mean[2] is 2.0, outside of low and high, 0.5 and 1.5"),
    "short band": (lambda d: key(d)["low"].pop(), "low has 2 singular values, mean has 3"),
    "empty": (lambda d: key(d).update(mean=[], low=[], high=[]), "mean is empty"),
    "other norm": (lambda d: key(d).update(spectral_norm=8.1), "spectral_norm is 8.1, but the largest mean is 8.0"),
    "small norm": (lambda d: key(d).update(frobenius_norm=8.5), "frobenius_norm is 8.5, but the means alone make 9."),
    "no heads": (lambda d: key(d).update(heads=0), "layers[0].key.heads"),
    "unknown key": (lambda d: key(d).update(spectral_nrom=8.0), "unknown key layers[0].key.spectral_nrom"),
    "no layers": (lambda d: d.update(layers=[]), "layers is empty"),
    "missing layer": (lambda d: d["layers"].pop(), "layer 2 is missing"),
    "surplus layer": (lambda d: d["layers"][1].update(layer=1), "layer 2 is missing"),
    "twice": (lambda d: d["layers"][1].update(layer=0), "layers must ascend, each once: 0 follows 0"),
    "beyond": (lambda d: d["layers"][1].update(layer=3), "there is no layer 3: model.num_layers is 3"),
    "other heads": (lambda d: key(d).update(heads=4), "the key has 3 singular values of 4 heads, but the geometry 2"),
    "wide": (
        lambda d: [key(d)[name].append(0.0) for name in ("mean", "low", "high")],
        "the key has 4 singular values of 2 heads, but the geometry 2 heads of 3",
    ),
    "other model": (lambda d: d["model"].update(num_layers=5), "model.num_layers is 5, but the geometry has 3"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_contradicts_itself_is_refused_where_it_stands(name: str, tmp_path: Path) -> None:
    value = copy.deepcopy(document())
    change, message = BROKEN[name]
    change(value)
    with pytest.raises(InvalidFile) as error:
        Spectra.load(written(tmp_path / "broken.json", value))
    assert message in str(error.value)
    assert "broken.json" in str(error.value)


def test_an_entry_of_a_recurrent_layer_is_refused() -> None:
    value = document()
    value["layers"].insert(1, {"layer": 1, "key": spectrum(), "value": spectrum()})
    with pytest.raises(InvalidFile, match="layer 1 has no K and V projections in this model"):
        Spectra.from_json(value, "spectra.json")


def test_scores_are_no_spectra_and_a_reader_of_scores_says_what_they_are(tmp_path: Path) -> None:
    path = written(tmp_path / "spectra.json", document())
    with pytest.raises(InvalidFile, match="kvprof show FILE prints what it is"):
        Scores.load(path)


def test_what_rounding_moves_is_borne() -> None:
    value = spectrum()
    value["low"] = value["high"] = list(value["mean"])
    value["spectral_norm"] = 8.0 * (1 + 1e-12)
    value["mean"][2] *= 1 + 1e-12
    value["frobenius_norm"] = math.hypot(*value["mean"]) * (1 - 1e-12)
    assert Spectrum.model_validate(value).heads == 2


@pytest.mark.parametrize(("share", "count"), [(0.5, 1), (0.75, 1), (0.8, 2), (0.98, 2), (0.99, 3), (1.0, 3)])
def test_the_effective_rank_counts_values_until_they_hold_the_share(share: float, count: int) -> None:
    assert Spectrum.model_validate(spectrum()).values_for(share) == count  # of 64, 16 and 1 in 81


def test_a_tensor_of_zeros_fills_no_direction() -> None:
    assert Spectrum.model_validate(spectrum(0.0)).values_for(0.9) == 0


def test_a_file_of_another_model_does_not_fit() -> None:
    spectra = Spectra.from_json(document(), "spectra.json")
    assert spectra.geometry is not None
    spectra.check_fits(spectra.geometry, "sha256:0")
    with pytest.raises(Mismatch, match="the spectra is for another model"):
        spectra.check_fits(spectra.geometry, "sha256:1")
    layer = KVLayer(layer=0, kind="full", kv_heads=2, key_head_dim=8, value_head_dim=8)
    with pytest.raises(Mismatch, match="it has 3 layers, this model 1"):
        spectra.check_fits(CacheGeometry(dtype="float32", layers=(layer,)))
