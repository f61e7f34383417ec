"""An Evaluation file says what was measured, and one that contradicts itself is refused in a sentence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvprof.errors import InvalidFile, Mismatch
from kvprof.records.evaluation import Evaluation
from kvprof.records.geometry import CacheGeometry, KVLayer
from kvprof.records.kinds import load_any
from kvprof.report.evaluations import evaluation_lines, evaluation_verdict


def result_json(name: str = "mine", role: str = "plan", kl: float = 0.5, stored: float = 3.5) -> dict[str, Any]:
    return {
        "name": name,
        "role": role,
        "digest": "sha256:0",
        "nominal_bits": 2.5,
        "stored_bits": stored,
        "bytes_per_token": 100.0,
        "contexts": [{"tokens": 20, "bytes": 1000, "bytes_at_16_bits": 2000, "compression": 2.0}],
        "kl_nats": kl,
        "kl_stderr_nats": 0.01,
        "kl_p99_nats": 3 * kl,
        "top1_agreement": 0.75,
        "perplexity": 20.0,
        "by_position": [
            {"first": 0, "last": 15, "tokens": 16, "kl_nats": kl / 2, "top1_agreement": 0.75},
            {"first": 16, "last": 31, "tokens": 16, "kl_nats": kl * 1.5, "top1_agreement": 0.75},
        ],
    }


@pytest.fixture
def evaluation_json() -> dict[str, Any]:
    return {
        "schema": "kvprof.evaluation/1",
        "model": {"id": "m", "num_layers": 2},
        "dtype": "float32",
        "text": {"dataset": "builtin", "sequences": 1, "sequence_length": 32, "tokens": 32, "seed": 0},
        "path": "fast",
        "measured_from": 0,
        "reference_perplexity": 18.0,
        "plans": [result_json(), result_json("other", "rival", kl=0.6)],
    }


def test_a_file_comes_back_as_it_was_written(evaluation_json: dict[str, Any], tmp_path: Path) -> None:
    evaluation = Evaluation.from_json(evaluation_json, "e.json")
    path = evaluation.save(tmp_path / "e.json")
    assert Evaluation.load(path) == evaluation
    assert load_any(path) == evaluation
    assert json.loads(path.read_text())["schema"] == "kvprof.evaluation/1"


def spoil(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        *place, last = (int(part) if part.isdigit() else part for part in path.split("."))
        node: Any = document
        for part in place:
            node = node[part]
        node[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoil("plans.0.kl_nats", float("nan")), "plans[0].kl_nats: input should be a finite number"),
        (spoil("plans.0.kl_nats", -0.1), "plans[0].kl_nats"),
        (spoil("plans.0.kl_nats", 0.7), "kl_nats of mine is 0.7, but its positions add up to 0.5"),
        (spoil("plans.0.top1_agreement", 1.5), "top1_agreement"),
        (spoil("plans.0.top1_agreement", 0.5), "positions add up to 0.75"),
        (spoil("plans.0.perplexity", 0.2), "perplexity"),
        (spoil("plans.0.by_position", []), "by_position of mine is empty"),
        (spoil("plans.0.by_position.1.first", 15), "positions 15 to 31 are out of order"),
        (spoil("plans.0.contexts.0.compression", 3.0), "but 2000 / 1000 is 2"),
        (spoil("plans.0.role", "rival"), "must begin with the evaluated plan"),
        (spoil("plans.1.role", "plan"), "only one of role 'plan'"),
        (spoil("plans.1.name", "mine"), "the name mine stands 2 times"),
        (spoil("plans.1.by_position.1.tokens", 17), "different numbers of tokens"),
        (spoil("plans", []), "must begin with the evaluated plan"),
        (spoil("path", "quick"), "path"),
        (spoil("plans.0.kl_natz", 1.0), "did you mean 'kl_nats'?"),
    ],
)
def test_nonsense_is_refused_and_named(
    evaluation_json: dict[str, Any], change: Callable[[dict[str, Any]], None], words: str
) -> None:
    document = copy.deepcopy(evaluation_json)
    change(document)
    if "different" in words:  # else the mean breaks first
        for part in document["plans"][1]["by_position"]:
            part["kl_nats"] = 0.6
    with pytest.raises(InvalidFile) as raised:
        Evaluation.from_json(document, "e.json")
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("kl", "stored", "comparable", "unbeaten"),
    [(0.6, 3.5, 1, 0), (0.4, 3.5, 1, 1), (0.5, 3.5, 1, 1), (0.4, 3.4, 1, 1), (0.4, 3.6, 0, 0), (0.6, 3.6, 0, 0)],
)
def test_only_what_stores_no_more_bits_counts_and_a_tie_is_no_win(
    evaluation_json: dict[str, Any], kl: float, stored: float, comparable: int, unbeaten: int
) -> None:
    evaluation_json["plans"][1] = result_json("other", "against", kl, stored)
    evaluation = Evaluation.from_json(evaluation_json, "e.json")
    assert (len(evaluation.comparable), len(evaluation.unbeaten)) == (comparable, unbeaten)


def test_an_evaluation_of_another_model_is_a_mismatch(evaluation_json: dict[str, Any]) -> None:
    evaluation_json["model"]["fingerprint"] = "sha256:a"
    evaluation = Evaluation.from_json(evaluation_json, "e.json")
    shape = {"kind": "full", "kv_heads": 1, "key_head_dim": 8, "value_head_dim": 8}
    geometry = CacheGeometry(dtype="float32", layers=tuple(KVLayer(layer=n, **shape) for n in range(2)))
    evaluation.check_fits(geometry, "sha256:a")
    with pytest.raises(Mismatch, match="the evaluation is for another model"):
        evaluation.check_fits(geometry, "sha256:b")
    with pytest.raises(Mismatch, match="2 layers, this model 1"):
        evaluation.check_fits(CacheGeometry(dtype="float32", layers=geometry.layers[:1]))


def test_what_stores_more_is_neither_compared_with_nor_left_unsaid(evaluation_json: dict[str, Any]) -> None:
    evaluation_json["plans"].append(result_json("kvmix", "rival", kl=0.1, stored=3.625))
    evaluation = Evaluation.from_json(evaluation_json, "e.json")
    assert [result.name for result in evaluation.comparable] == ["other"]
    assert [result.name for result in evaluation.dearer] == ["kvmix"]
    assert not evaluation.unbeaten
    said = [line for line in evaluation_lines(evaluation) if "kvmix" in line]
    assert said == ["listed and not compared with, as they store more than mine: kvmix (3.625 bits)"]
    assert "better than the one other that stores no more bits" in evaluation_verdict(evaluation)
