"""What is printed says what the records say, in plain text where nobody looks at colours."""

from __future__ import annotations

import pytest

from kvprof.records.formats import usual_format
from kvprof.records.geometry import CacheGeometry, KVLayer
from kvprof.records.inventory import Inventory, RedFlag
from kvprof.records.plan import BitPlan, ModelInfo
from kvprof.records.scores import LayerScores, Scores, TensorScores
from kvprof.report import plans, sentences, tables


def norms(keys: list[float], values: list[float], gain: float | None = None) -> Scores:
    return Scores(
        layers=tuple(
            LayerScores(
                layer=n,
                key=TensorScores(spectral_norm=key, frobenius_norm=2 * key, stable_rank=4.0, gain_rms=gain),
                value=TensorScores(spectral_norm=value, frobenius_norm=9.0, stable_rank=3.0),
            )
            for n, (key, value) in enumerate(zip(keys, values, strict=True))
        )
    )


@pytest.mark.parametrize(
    ("keys", "values", "words"),
    [
        ([5.0, 6.0], [1.0, 2.0], ["spectral K > V in 2 of 2", "Frobenius K > V in 2 of 2", "larger everywhere"]),
        ([5.0, 1.0], [1.0, 2.0], ["spectral K > V in 1 of 2", "Frobenius K > V in 1 of 2", "not universal"]),
        ([1.0, 1.0], [2.0, 2.0], ["spectral K > V in 0 of 2", "Frobenius K > V in 0 of 2", "against"]),
        ([5.0, 5.0], [5.0, 5.0], ["spectral K > V in 0 of 2"]),
        ([4.5, 4.5], [4.5, 4.5], ["spectral K > V in 0 of 2", "Frobenius K > V in 0 of 2", "not universal"]),  # ties
    ],
)
def test_the_verdict_counts_layers_in_each_norm(keys: list[float], values: list[float], words: list[str]) -> None:
    verdict = sentences.norm_verdict(norms(keys, values))
    assert all(word in verdict for word in words), verdict
    assert "\n" not in verdict


def test_a_norm_that_hardly_varies_is_remarked_on_and_one_that_does_is_not() -> None:
    remarks = sentences.score_remarks(norms([5.0, 5.04], [1.0, 2.0]))
    assert any("spectral_norm of the keys" in remark for remark in remarks)
    assert any("frobenius_norm of the values" in remark for remark in remarks)  # 9 everywhere
    assert not any("spectral_norm of the values" in remark for remark in remarks)


def test_gains_after_k_proj_are_remarked_on() -> None:
    assert any("normalised after k_proj" in remark for remark in sentences.score_remarks(norms([5.0], [1.0], gain=1.5)))
    assert not any("normalised" in remark for remark in sentences.score_remarks(norms([5.0], [1.0])))


def test_a_table_in_a_pipe_holds_no_control_codes(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show_scores(norms([5.0, 1.0], [1.0, 2.0]))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    rows = [line.split() for line in printed.splitlines() if line.split()[:1] in (["0"], ["1"])]
    assert rows[0] == ["0", "5.000", "1.000", "5.00", "K", "10.00", "9.000", "1.11", "K", "4.000", "3.000"]
    assert rows[1] == ["1", "1.000", "2.000", "0.500", "V", "2.000", "9.000", "0.222", "V", "4.000", "3.000"]


def test_an_inventory_names_every_skipped_layer_and_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    full = KVLayer(layer=0, kind="full", kv_heads=2, key_head_dim=8, value_head_dim=8)
    slides = KVLayer(
        layer=1, kind="sliding", kv_heads=2, key_head_dim=8, value_head_dim=8, window=16, skipped="sliding window"
    )
    state = KVLayer(layer=2, kind="recurrent", kv_heads=0, key_head_dim=0, value_head_dim=0, skipped="recurrent")
    inventory = Inventory(
        model=ModelInfo(id="m", architecture="A", num_layers=3),
        geometry=CacheGeometry(dtype="bfloat16", layers=(full, slides, state)),
        red_flags=(RedFlag(name="key_bias", layers=(0, 1), why="because"),),
    )
    tables.show_inventory(inventory)
    printed = capsys.readouterr().out
    assert "each token adds 64 bytes" in printed  # one growing layer: (16 + 16) x 2 bytes
    assert "4k context: 257.00 KiB" in printed  # 4096 x 64 + 16 x 64
    assert "layer 1: sliding window" in printed
    assert "layer 2: recurrent" in printed
    assert "red flag key_bias (every layer): because" in printed


def test_a_plan_prints_its_bits_and_costs_in_every_unit(capsys: pytest.CaptureFixture[str]) -> None:
    key, value = (usual_format(tensor, 3, 32).model_dump() for tensor in ("key", "value"))
    plan = BitPlan.from_json(
        {
            "schema": "kvprof.plan/1",
            "model": {"num_layers": 2},
            "budget": {"requested": 3, "unit": "nominal", "nominal_bits": 3.0, "stored_bits": 4.0},
            "quantizer": {},
            "window": {"sink_tokens": 1, "recent_tokens": 2},
            "layers": [{"layer": 0, "key": key, "value": value}],
            "skipped": [{"layer": 1, "reason": "sliding window of 16 tokens"}],
        },
        "plan.json",
    )
    plans.show_plan(plan)
    printed = capsys.readouterr().out
    assert "int3g32" in printed
    assert "sliding window of 16 tokens" in " ".join(printed.split())
    assert "3 nominal bits an element, 4 stored bits (4.00 times fewer than 16)" in printed
    assert "the first 1 tokens and the last 2" in printed
