"""Is the factor the one between measured and predicted KL of whole plans, on the scores' own text and decoder?"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from requested import changed

from kvprof.calibration.sequences import tokenize
from kvprof.calibration.text import open_text
from kvprof.errors import CalibrationError, InvalidFile, Mismatch, UsageError
from kvprof.evaluate import kl_factor as calibrate
from kvprof.evaluate.kl_factor import CalibrateRun, fit, run_calibrate
from kvprof.evaluate.logits import planned_logits, reference_logits
from kvprof.models.load import load_model, load_tokenizer
from kvprof.models.source import ModelSource
from kvprof.records.audit import PlanCheck, PredictedPlan
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan, Window
from kvprof.records.requests.check import CalibrateRequest
from kvprof.records.scores import DecodingSetup, LayerScores, Scores, TensorScores

Maker = Callable[..., BitPlan]
SETTINGS = CalibrateRequest(sequences=3, dtype="float32", device="cpu")
WINDOW = Window(sink_tokens=1, recent_tokens=4)
SAMPLES = tuple(0.001 * (1 + index) for index in range(5))
"""What the scores predict of a plan, sequence by sequence."""


@pytest.fixture
def scores(source: ModelSource, geometry: CacheGeometry, text: str) -> Scores:
    """Scores that read five packed sequences of 40 tokens; their numbers are never looked at here."""
    info = tokenize(open_text(text), load_tokenizer(source), 5, 40, 0, True).info
    return Scores(
        source="gradients",
        calibration=info,
        geometry=geometry,
        decoding=DecodingSetup(window=WINDOW, suffix_fraction=0.25, tokens=50),
        layers=tuple(
            LayerScores(layer=layer, key=TensorScores(gradient_norm=1.0), value=TensorScores(gradient_norm=1.0))
            for layer in range(2)
        ),
    )


@pytest.fixture
def path(scores: Scores, tmp_path: Path) -> Path:
    return scores.save(tmp_path / "out" / "gradients.json")


def predicted(name: str, plan: BitPlan, samples: tuple[float, ...] | None = SAMPLES) -> PredictedPlan:
    return PredictedPlan(name, plan, 2.5, 0.01 if samples is None else float(np.mean(samples)), samples)


def run(
    source: ModelSource, scores: Scores, path: Path, plans: list[PredictedPlan], settings: CalibrateRequest = SETTINGS,
    **more: object,
) -> CalibrateRun:  # fmt: skip
    return run_calibrate(source, scores, path, plans, settings, path.parent, **more)


def measured(source: ModelSource, text: str, plan: BitPlan, sequences: int = 3) -> list[float]:
    """The KL of each sequence's last quarter, token by token through the packed cache, in float64 by hand."""
    model = load_model(source, "float32", "cpu")
    found = []
    for ids in tokenize(open_text(text), load_tokenizer(source), sequences, 40, 0, True).sequences:
        full = reference_logits(model, ids).double().log_softmax(-1)[30:]
        planned = planned_logits(model, plan, ids, "exact").double().log_softmax(-1)[30:]
        found.append(float((full.exp() * (full - planned)).sum(-1).mean()))
    return found


def test_the_factor_is_the_geometric_mean_of_measured_over_predicted(
    source: ModelSource, scores: Scores, path: Path, text: str, make_plan: Maker
) -> None:
    plans = {"coarse": make_plan(1, 1, WINDOW), "fine": make_plan(3, 2, WINDOW)}
    result = run(source, scores, path, [predicted(name, plan) for name, plan in plans.items()])
    foreseen = np.mean(SAMPLES[:3])  # of the sequences that were measured
    ratios = []
    for check, plan in zip(result.plans, plans.values(), strict=True):
        expected = measured(source, text, plan)
        assert check.measured_kl_nats == pytest.approx(np.mean(expected), rel=0.01)
        assert check.measured_kl_stderr_nats == pytest.approx(np.std(expected, ddof=1) / math.sqrt(3), rel=0.05)
        assert check.predicted_kl_nats == pytest.approx(foreseen)
        ratios.append(np.mean(expected) / foreseen)
    found = result.found
    assert found.factor == pytest.approx(math.sqrt(ratios[0] * ratios[1]), rel=0.01)
    assert found.spread == pytest.approx(math.sqrt(max(ratios) / min(ratios)), rel=0.01)
    assert (found.plans, found.sequences) == (2, 3)
    about_text = (f"{text}: ", "most rows of", "the same sequence", "the text has only")
    assert all(remark.startswith(about_text) for remark in result.remarks)


def test_the_scores_file_gets_the_factor_and_stays_the_same_scores(
    source: ModelSource, scores: Scores, path: Path, make_plan: Maker
) -> None:
    plans = [predicted("plan", make_plan(1, 1, WINDOW))]
    first = run(source, scores, path, plans)
    written = Scores.load(path)
    assert written == first.scores
    assert written.kl_calibration == first.found
    assert written.digest == scores.digest
    assert written.model_copy(update={"kl_calibration": None}) == scores
    assert run(source, written, path, plans).found == first.found  # once more is not twice as much
    assert [file.name for file in path.parent.iterdir()] == ["gradients.json"]


def test_text_that_has_changed_is_compared_with_the_means(
    source: ModelSource, scores: Scores, path: Path, text: str, make_plan: Maker
) -> None:
    Path(text).write_text("\n".join(["mat at all no another mat cat saw the"] * 60))
    result = run(source, scores, path, [predicted("plan", make_plan(1, 1, WINDOW))])
    assert result.plans[0].predicted_kl_nats == pytest.approx(np.mean(SAMPLES))
    assert any("has changed since" in remark for remark in result.remarks)


def test_scores_without_samples_are_compared_by_their_means(
    source: ModelSource, scores: Scores, path: Path, make_plan: Maker
) -> None:
    result = run(source, scores, path, [predicted("plan", make_plan(1, 1, WINDOW), None)])
    assert result.plans[0].predicted_kl_nats == 0.01


def test_text_that_is_gone_is_an_error_that_names_it(
    source: ModelSource, scores: Scores, path: Path, text: str, make_plan: Maker
) -> None:
    Path(text).unlink()
    with pytest.raises(CalibrationError, match="cannot be read again") as raised:
        run(source, scores, path, [predicted("plan", make_plan(1, 1, WINDOW))])
    assert "text.txt: no such file" in str(raised.value)


def test_a_plan_s_window_gives_way_to_that_of_the_scores(
    source: ModelSource, scores: Scores, path: Path, make_plan: Maker
) -> None:
    own = run(source, scores, path, [predicted("plan", make_plan(1, 1, WINDOW))])
    wide = Window(sink_tokens=0, recent_tokens=30)
    other = run(source, scores, path, [predicted("plan", make_plan(1, 1, wide))])
    assert other.found == own.found
    assert any("1 sink and a window of 4, as the scores were" in remark for remark in other.remarks)


def test_plans_that_store_the_same_count_once(
    source: ModelSource, scores: Scores, path: Path, make_plan: Maker
) -> None:
    plans = [predicted(name, make_plan(1, 1, WINDOW)) for name in ("one", "two")] + [
        predicted("three", make_plan(2, 1))
    ]
    result = run(source, scores, path, plans)
    assert [check.name for check in result.plans] == ["one", "three"]
    assert any("1 of the 3 plans store what another one does" in remark for remark in result.remarks)


def test_more_sequences_than_the_scores_read_are_not_there(
    source: ModelSource, scores: Scores, path: Path, make_plan: Maker
) -> None:
    result = run(source, scores, path, [predicted("plan", make_plan(1, 1, WINDOW))], changed(SETTINGS, sequences=9))
    assert result.found.sequences == 5
    assert any("on all of them, not 9" in remark for remark in result.remarks)


def test_scores_that_do_not_say_what_they_read_are_calibrated_on_the_builtin_text(
    source: ModelSource, scores: Scores, path: Path, make_plan: Maker
) -> None:
    bare = scores.model_copy(update={"calibration": None, "decoding": None})
    bare.save(path)
    result = run(source, bare, path, [predicted("plan", make_plan(1, 1, WINDOW))])
    assert result.plans[0].text == "builtin (calibration)"
    assert any("do not say which text" in remark for remark in result.remarks)


@pytest.mark.parametrize("after", [0, 1, 4, 6])
def test_a_stopped_run_goes_on_to_the_same_factor(
    source: ModelSource,
    scores: Scores,
    path: Path,
    make_plan: Maker,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    after: int,
) -> None:
    plans = [predicted("coarse", make_plan(1, 1, WINDOW)), predicted("fine", make_plan(3, 2, WINDOW))]
    whole = run(source, scores, scores.save(tmp_path / "whole" / "gradients.json"), plans)

    def stop(done: int, total: int) -> None:
        assert total == 6
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, scores, path, plans, progress=stop)
    assert Scores.load(path).kl_calibration is None
    measure, forwards = calibrate.planned_logits, []

    def spy(*arguments: object) -> torch.Tensor:
        forwards.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(calibrate, "planned_logits", spy)
    resumed = run(source, scores, path, plans)
    assert resumed.found == whole.found
    assert len(forwards) == 6 - after
    assert any(f"{after} of 6 forwards" in remark for remark in resumed.remarks) == (after > 0)


def test_a_stopped_run_refuses_another_number_of_sequences(
    source: ModelSource, scores: Scores, path: Path, make_plan: Maker
) -> None:
    plans = [predicted("plan", make_plan(1, 1, WINDOW))]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, scores, path, plans, progress=stop)
    fewer = changed(SETTINGS, sequences=2)
    with pytest.raises(Mismatch, match="--restart"):
        run(source, scores, path, plans, fewer)
    assert run(source, scores, path, plans, fewer, restart=True).found.sequences == 2


def test_scores_that_were_measured_anew_meanwhile_are_left_as_they_are(
    source: ModelSource, scores: Scores, path: Path, make_plan: Maker
) -> None:
    def measure_anew(done: int, total: int) -> None:
        scores.model_copy(update={"source": "anew"}).save(path)

    with pytest.raises(Mismatch, match="measured anew in the meantime"):
        run(source, scores, path, [predicted("plan", make_plan(1, 1, WINDOW))], progress=measure_anew)
    assert Scores.load(path).source == "anew"


def test_what_quantizes_nothing_or_everything_within_the_window_is_refused_before_the_model_loads(
    source: ModelSource, scores: Scores, path: Path, make_plan: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match="full: in 40 tokens no query reads anything quantized"):
        run(source, scores, path, [predicted("full", make_plan(16, 16, WINDOW))])
    wide = scores.model_copy(
        update={
            "decoding": DecodingSetup(window=Window(sink_tokens=0, recent_tokens=64), suffix_fraction=0.5, tokens=9)
        }
    )
    with pytest.raises(UsageError, match="plan: in 40 tokens"):
        run(source, wide, path, [predicted("plan", make_plan(1, 1, WINDOW))])
    with pytest.raises(UsageError, match="--sequences 0"):
        run(source, scores, path, [predicted("plan", make_plan(1, 1))], changed(SETTINGS, sequences=0))
    with pytest.raises(UsageError, match="no plan to calibrate by"):
        run(source, scores, path, [])


def test_plans_and_scores_of_another_model_are_refused(
    source: ModelSource, scores: Scores, path: Path, make_plan: Maker
) -> None:
    plan = make_plan(1, 1, WINDOW)
    stranger = plan.model_copy(update={"model": plan.model.model_copy(update={"fingerprint": "sha256:another"})})
    with pytest.raises(Mismatch, match="stranger: the plan is for another model"):
        run(source, scores, path, [predicted("stranger", stranger)])
    other = scores.model_copy(update={"model": stranger.model})
    with pytest.raises(Mismatch, match="the scores is for another model"):
        run(source, other, path, [predicted("plan", plan)])


def test_a_plan_without_a_ratio_is_named() -> None:
    def check(predicted: float, measured_nats: float) -> PlanCheck:
        return PlanCheck(
            name="mine", digest="x", stored_bits=3.0, predicted_kl_nats=predicted, measured_kl_nats=measured_nats
        )

    with pytest.raises(InvalidFile, match="mine is predicted to cost nothing"):
        fit([check(0.0, 0.1)], 4)
    with pytest.raises(InvalidFile, match="mine measured no difference at all"):
        fit([check(0.1, 0.0)], 4)
    assert fit([check(0.1, 0.17)], 4).factor == pytest.approx(1.7)
    assert fit([check(0.1, 0.17)], 4).spread == 1.0
