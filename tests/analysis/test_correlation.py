"""Does the audit join what belongs together, and count as NumPy and SciPy do?"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from score_factories import geometry_json, model_json, plan_of

from kvprof import Scores
from kvprof.analysis.correlation import hold_against
from kvprof.errors import InvalidFile, Mismatch, UsageError
from kvprof.records.audit import Audit

DECODING = {"window": {"sink_tokens": 4, "recent_tokens": 128}, "suffix_fraction": 0.5, "tokens": 512}
LAYERS = 12


def make(source: str, fields: Any, layers: int = LAYERS, **more: Any) -> Scores:
    """Scores whose tensors have what `fields(layer, tensor)` says."""
    value = {
        "schema": "kvprof.scores/1",
        "source": source,
        "model": model_json(layers),
        "geometry": geometry_json(layers),
        "layers": [{"layer": n, "key": fields(n, "key"), "value": fields(n, "value")} for n in range(layers)],
        **more,
    }
    return Scores.from_json(value, source)


def losses(seed: int, names: dict[str, tuple[str, ...]]) -> Any:
    draw = random.Random(seed)
    table = {
        (n, tensor): {name: 10 ** draw.gauss(-3, 1) for name in names[tensor]}
        for n in range(LAYERS)
        for tensor in names
    }
    return lambda n, tensor: {"loss_increase": table[n, tensor]}


NAMES = {"key": ("int2g64", "int3g64", "full"), "value": ("int2g64", "rot2")}


@pytest.fixture
def divergence() -> Scores:
    return make("divergence", losses(1, NAMES), decoding=DECODING)


@pytest.fixture
def gradients() -> Scores:
    return make("gradients", losses(2, NAMES | {"value": ("int2g64", "rot2", "int4g64")}), decoding=DECODING)


def agreement(audit: Audit, label: str, group: str) -> Any:
    (found,) = [one for one in audit.agreements if (one.label, one.group) == (label, group)]
    return found


def of(scores: Scores, tensor: str, name: str) -> list[float]:
    return [entry.tensor(tensor).loss_increase[name] for entry in scores.layers]


def test_ranks_are_correlated_over_all_tensors_of_a_width_and_over_each_format(
    divergence: Scores, gradients: Scores
) -> None:
    audit = hold_against(divergence, {"gradients": gradients})
    groups = [one.group for one in audit.agreements]
    assert groups == ["2 bits", "keys int2g64", "values int2g64", "values rot2", "3 bits", "keys int3g64"]
    for group, tensor, name in (("keys int2g64", "key", "int2g64"), ("values rot2", "value", "rot2")):
        expected = spearmanr(of(gradients, tensor, name), of(divergence, tensor, name)).statistic
        found = agreement(audit, "loss_increase", group)
        assert (found.tensors, found.spearman) == (LAYERS, pytest.approx(expected))
    chosen = (("key", "int2g64"), ("value", "int2g64"), ("value", "rot2"))
    predicted, measured = (
        [loss for tensor, name in chosen for loss in of(scores, tensor, name)] for scores in (gradients, divergence)
    )
    whole = agreement(audit, "loss_increase", "2 bits")
    assert (whole.tensors, whole.spearman) == (3 * LAYERS, pytest.approx(spearmanr(predicted, measured).statistic))


def test_predicted_over_measured_is_spread_as_numpy_says(divergence: Scores, gradients: Scores) -> None:
    audit = hold_against(divergence, {"gradients": gradients})
    (found,) = [one for one in audit.ratios if one.group == "keys int3g64"]
    ratios = np.array(of(gradients, "key", "int3g64")) / np.array(of(divergence, "key", "int3g64"))
    expected = np.quantile(ratios, [0.1, 0.5, 0.9])
    assert [found.low, found.median, found.high] == pytest.approx(expected.tolist())
    worst = int(np.abs(np.log(ratios)).argmax())
    assert (found.worst_layer, found.worst_tensor, found.worst) == (worst, "key", pytest.approx(ratios[worst]))


def text_of(*fingerprints: str) -> dict[str, Any]:
    number = len(fingerprints)
    return {
        "dataset": "handmade", "sequences": number, "sequence_length": 8, "tokens": 8 * number, "seed": 0,
        "sequence_fingerprints": list(fingerprints),
    }  # fmt: skip


def sampled(seed: int, sequences: int) -> Any:
    draw = random.Random(seed)
    table = {
        (n, tensor): [10 ** draw.gauss(-3, 1) for _ in range(sequences)]
        for n in range(LAYERS)
        for tensor in ("key", "value")
    }
    return lambda n, tensor: {
        "loss_increase": {"int2g64": float(np.mean(table[n, tensor]))},
        "loss_increase_samples": {"int2g64": table[n, tensor]},
    }


@pytest.mark.parametrize(("read", "rows"), [(("c", "a"), [2, 0]), (("b",), [1]), (("d", "a"), [0, 1, 2])])
def test_a_prediction_is_held_against_what_was_measured_on_the_same_sequences(
    read: tuple[str, ...], rows: list[int]
) -> None:
    predicted, known = sampled(5, 3), len(rows) < 3
    theirs = make("gradients", predicted, decoding=DECODING, calibration=text_of("a", "b", "c"))
    mine = make("divergence", sampled(6, len(read)), decoding=DECODING, calibration=text_of(*read))
    audit = hold_against(mine, {"gradients": theirs})
    for point in audit.points:
        samples = predicted(point.layer, point.tensor)["loss_increase_samples"]["int2g64"]
        assert point.scores["loss_increase"] == pytest.approx(np.mean([samples[row] for row in rows]))
    said = "\n".join(audit.remarks)
    assert (f"the {len(read)} of 3 sequences that the divergence read" in said) == known
    assert ("not known to have read what the divergence read" in said) != known


def test_norms_have_ranks_and_no_ratio(divergence: Scores) -> None:
    norms = make("norms", lambda n, tensor: {"spectral_norm": float(n + 1), "frobenius_norm": 1.0})
    audit = hold_against(divergence, {"norms": norms})
    assert not audit.ratios
    expected = spearmanr(range(LAYERS), of(divergence, "key", "int3g64")).statistic
    assert agreement(audit, "spectral_norm", "keys int3g64").spearman == pytest.approx(expected)
    assert agreement(audit, "frobenius_norm", "keys int3g64").spearman is None  # a constant ranks nothing
    assert any("only ranks are compared" in remark for remark in audit.remarks)


def test_full_precision_and_formats_that_were_not_measured_stay_out(divergence: Scores, gradients: Scores) -> None:
    audit = hold_against(divergence, {"gradients": gradients})
    assert {point.format for point in audit.points} == {"int2g64", "int3g64", "rot2"}
    assert len(audit.points) == 4 * LAYERS


def test_a_sample_of_layers_is_compared_where_it_was_measured(gradients: Scores) -> None:
    full = losses(1, NAMES)
    sample = make("divergence", lambda n, tensor: full(n, tensor) if n in (2, 5, 7) else {}, decoding=DECODING)
    audit = hold_against(sample, {"gradients": gradients})
    assert {point.layer for point in audit.points} == {2, 5, 7}
    assert agreement(audit, "loss_increase", "keys int2g64").tensors == 3


def test_what_is_measured_as_zero_has_a_rank_and_no_ratio(gradients: Scores) -> None:
    table = losses(1, NAMES)
    silent = make(
        "divergence",
        lambda n, tensor: {"loss_increase": {"int2g64": 0.0}} if n == 0 else table(n, tensor),
        decoding=DECODING,
    )
    audit = hold_against(silent, {"gradients": gradients})
    (found,) = [one for one in audit.ratios if one.group == "keys int2g64"]
    assert found.tensors == LAYERS - 1
    assert agreement(audit, "loss_increase", "keys int2g64").tensors == LAYERS


def test_two_files_of_one_metric_are_told_apart_by_name(divergence: Scores, gradients: Scores) -> None:
    again = make("gradients", losses(3, NAMES), decoding=DECODING)
    audit = hold_against(divergence, {"first": gradients, "second": again})
    assert {one.label for one in audit.agreements} == {"loss_increase (first)", "loss_increase (second)"}
    assert {one.label for one in audit.ratios} == {"loss_increase (first)", "loss_increase (second)"}


def test_scores_of_another_decoder_are_named(divergence: Scores) -> None:
    other = make("gradients", losses(2, NAMES), decoding=DECODING | {"window": {"sink_tokens": 0, "recent_tokens": 32}})
    (remark,) = [one for one in hold_against(divergence, {"mine": other}).remarks if one.startswith("mine speaks")]
    assert "0 sinks, a window of 32 and the last 50% of each sequence" in remark


def test_scores_of_another_model_are_refused(divergence: Scores) -> None:
    other = make("gradients", losses(2, NAMES), model=model_json(LAYERS, "sha256:another"))
    with pytest.raises(Mismatch, match="file mine is for another model"):
        hold_against(divergence, {"mine": other})


def test_scores_that_are_no_measured_divergence_are_refused(divergence: Scores, gradients: Scores) -> None:
    with pytest.raises(UsageError, match="source is 'gradients'"):
        hold_against(gradients, {"divergence": divergence})


def test_scores_that_have_nothing_in_common_are_refused(divergence: Scores) -> None:
    other = make("gradients", lambda n, tensor: {"loss_increase": {"int8g64": 1e-6}})
    with pytest.raises(InvalidFile, match="nothing here speaks of"):
        hold_against(divergence, {"gradients": other})
    empty = make("divergence", lambda n, tensor: {})
    with pytest.raises(InvalidFile, match="no measured tensor"):
        hold_against(empty, {"gradients": other})


def test_an_audit_is_a_file_that_reads_back(divergence: Scores, gradients: Scores, tmp_path: Any) -> None:
    audit = hold_against(divergence, {"gradients": gradients})
    assert Audit.load(audit.save(tmp_path / "audit.json")) == audit


def test_plans_of_other_models_are_left_out_aloud(divergence: Scores, gradients: Scores) -> None:
    stranger = plan_of([("int2g64", "rot2")] * 3, geometry=geometry_json(3))
    audit = hold_against(divergence, {"gradients": gradients}, {"stranger": stranger})
    assert not audit.plans
    assert [remark for remark in audit.remarks if "stranger" in remark] == [
        "left out, as plans of another model: stranger"
    ]
