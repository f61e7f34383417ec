"""Does an evaluation measure what decoding with the plan would do, resume to the same file, and judge fairly?"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import edit_weights
from requested import changed
from tiny import tiny_model
from transformers import PreTrainedModel

from kvprof.calibration.sequences import tokenize
from kvprof.calibration.text import open_text
from kvprof.errors import CalibrationError, KvprofError, Mismatch, UnsupportedAttention, UsageError
from kvprof.evaluate import cached_evaluation as pieces
from kvprof.evaluate import evaluation, logits
from kvprof.evaluate.evaluation import Baseline, run_evaluation
from kvprof.evaluate.logits import planned_logits, reference_logits
from kvprof.evaluate.summary import SequenceResult, summarise
from kvprof.metrics import token_kl, token_nll
from kvprof.models.config import load_config
from kvprof.models.identity import checkpoint_fingerprint
from kvprof.models.inventory import take_inventory
from kvprof.models.load import load_model, load_tokenizer, resolve
from kvprof.models.source import ModelSource
from kvprof.records.evaluation import Evaluation
from kvprof.records.formats import Format
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan, LayerPlan, Quantizer, SkippedLayer, TensorPlan, Window
from kvprof.records.requests.check import EvaluateRequest
from kvprof.runtime import cache

Maker = Callable[..., BitPlan]


@pytest.fixture
def settings(text: str) -> EvaluateRequest:
    return EvaluateRequest(data=(text,), pack=True, sequences=4, sequence_length=40, dtype="float32", device="cpu")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bits of the first key of each planned forward that runs."""
    seen: list[int] = []
    measure = pieces.planned_logits

    def spy(model: object, plan: BitPlan, *rest: object) -> object:
        seen.append(plan.layers[0].key.bits)
        return measure(model, plan, *rest)

    monkeypatch.setattr(pieces, "planned_logits", spy)
    return seen


def stop_after(pieces: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= pieces:
            raise KeyboardInterrupt

    return progress


def plan_of(model: PreTrainedModel, recent_fraction: float) -> BitPlan:
    """A plan for a tiny model with another format in each of its planned layers."""
    found = take_inventory(model.config)
    forms = [
        (Format(bits=2, group_size=4, axis="channel"), Format(bits=3, group_size=8, axis="token", clip="mse")),
        (Format(bits=3, group_size=8, axis="channel"), Format(bits=1, group_size=4, axis="token")),
    ]
    layers = []
    for shape in found.geometry.planned:
        key, value = (
            TensorPlan(**form.model_dump(), recent_fraction=recent_fraction) for form in forms[shape.layer % 2]
        )
        layers.append(LayerPlan(layer=shape.layer, key=key, value=value))
    return BitPlan(
        model=found.model,
        quantizer=Quantizer(),
        window=Window(sink_tokens=2, recent_tokens=5),
        geometry=found.geometry,
        layers=tuple(layers),
        skipped=tuple(
            SkippedLayer(layer=shape.layer, reason=shape.skipped) for shape in found.geometry.layers if shape.skipped
        ),
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("recent_fraction", [0.0, 0.3])
def test_the_fast_and_the_exact_path_agree_token_by_token(name: str, recent_fraction: float) -> None:
    model = tiny_model(name)
    torch.manual_seed(1)
    ids = torch.randint(1, 96, (50,)).tolist()
    plan = plan_of(model, recent_fraction)
    reference = reference_logits(model, ids)
    fast, exact = (token_kl(reference, planned_logits(model, plan, ids, route)) for route in ("fast", "exact"))
    assert fast.max() > 1e-4
    assert fast.numpy() == pytest.approx(exact.numpy(), rel=0.01, abs=1e-7)


@pytest.mark.parametrize("route", ["fast", "exact"])
def test_logits_from_a_position_on_are_the_last_of_all(route: logits.Route) -> None:
    model, ids = tiny_model("llama"), list(range(1, 40))
    plan = plan_of(model, 0.0)
    whole, part = (planned_logits(model, plan, ids, route, first) for first in (0, 30))
    assert part.shape == (9, whole.shape[1])
    torch.testing.assert_close(part, whole[30:])
    torch.testing.assert_close(reference_logits(model, ids, 30), reference_logits(model, ids)[30:])


def test_the_logits_of_one_plan_are_gone_before_those_of_the_next_come(
    source: ModelSource,
    settings: EvaluateRequest,
    make_plan: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure = pieces.planned_logits
    made: list[weakref.ref[torch.Tensor]] = []

    def spy(*arguments: object) -> torch.Tensor:
        assert not any(one() is not None for one in made)
        found = measure(*arguments)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(pieces, "planned_logits", spy)
    run_evaluation(source, make_plan(2, 2), settings, tmp_path / "out", against=[("other", make_plan(3, 3))])
    assert len(made) == 2 * 4


def test_the_exact_path_looks_at_the_weights_once_and_not_for_every_cache(
    source: ModelSource,
    settings: EvaluateRequest,
    make_plan: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fingerprint = checkpoint_fingerprint(source, take_inventory(load_config(source), source.id).geometry)
    plan = make_plan(2, 2)
    stamped = plan.model_copy(update={"model": plan.model.model_copy(update={"fingerprint": fingerprint})})
    monkeypatch.setattr(cache, "live_fingerprint", lambda *_: pytest.fail("the weights were hashed again"))
    assert run_evaluation(source, stamped, changed(settings, exact=True, sequences=1), tmp_path / "out").path.exists()


def test_the_exact_path_gives_the_same_evaluation(
    source: ModelSource, settings: EvaluateRequest, make_plan: Maker, tmp_path: Path
) -> None:
    fast = run_evaluation(source, make_plan(2, 2), settings, tmp_path / "fast").evaluation
    exact = run_evaluation(source, make_plan(2, 2), changed(settings, exact=True), tmp_path / "exact").evaluation
    assert (fast.path, exact.path) == ("fast", "exact")
    assert exact.plan.kl_nats == pytest.approx(fast.plan.kl_nats, rel=0.01)
    assert exact.plan.perplexity == pytest.approx(fast.plan.perplexity, rel=1e-3)


def test_attention_that_cannot_be_replaced_is_measured_token_by_token_and_said(
    source: ModelSource,
    settings: EvaluateRequest,
    make_plan: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object) -> None:
        raise UnsupportedAttention("this model attends in a way of its own.")

    monkeypatch.setattr(logits, "decoding_reads", refuse)
    with caplog.at_level("INFO", "kvprof"):
        run = run_evaluation(source, make_plan(2, 2), changed(settings, sequences=1), tmp_path / "out")
    assert run.evaluation.path == "exact"
    assert "attends in a way of its own" in caplog.text
    assert "slower" in caplog.text


@pytest.mark.parametrize("exact", [False, True])
def test_a_plan_of_16_bits_everywhere_changes_nothing(
    source: ModelSource, settings: EvaluateRequest, make_plan: Maker, tmp_path: Path, exact: bool
) -> None:
    found = run_evaluation(source, make_plan(16, 16), changed(settings, exact=exact), tmp_path / "out").evaluation
    assert found.plan.kl_nats < 1e-7
    assert found.plan.top1_agreement == 1.0
    assert found.plan.perplexity == pytest.approx(found.reference_perplexity, rel=1e-5)
    assert (found.plan.stored_bits, found.plan.bytes_per_token) == (16, 2 * 2 * 2 * 8 * 2)
    assert [context.compression for context in found.plan.contexts] == [1.0, 1.0]


def test_the_numbers_are_those_of_a_loop_written_out(
    source: ModelSource, settings: EvaluateRequest, make_plan: Maker, tmp_path: Path
) -> None:
    plan, start = make_plan(2, 3), 10
    found = run_evaluation(source, plan, changed(settings, measure_from=start), tmp_path / "out").evaluation
    model = load_model(source, "float32", "cpu")
    text = tokenize(open_text(settings.data[0]), load_tokenizer(source), 4, 40, 0, True)
    kl, nll, reference_nll = [], [], []
    for ids in text.sequences:
        reference, planned = reference_logits(model, ids)[start:], planned_logits(model, plan, ids, "fast")[start:]
        kl.append(token_kl(reference, planned))
        nll.append(token_nll(planned[:-1], torch.tensor(ids[start + 1 :])))
        reference_nll.append(token_nll(reference[:-1], torch.tensor(ids[start + 1 :])))
    tokens, means = torch.cat(kl), torch.stack(kl).mean(1)
    assert found.measured_from == start
    assert found.text == text.info
    assert len(tokens) == 4 * 30
    assert found.plan.kl_nats == pytest.approx(float(tokens.mean()), rel=1e-9)
    assert found.plan.kl_stderr_nats == pytest.approx(float(means.std() / 2), rel=1e-9)
    assert found.plan.kl_p99_nats == pytest.approx(float(tokens.quantile(0.99)), rel=1e-9)
    assert found.plan.perplexity == pytest.approx(float(torch.cat(nll).mean().exp()), rel=1e-9)
    assert found.reference_perplexity == pytest.approx(float(torch.cat(reference_nll).mean().exp()), rel=1e-9)


def test_positions_are_powers_of_two_and_add_up(
    source: ModelSource, settings: EvaluateRequest, make_plan: Maker, tmp_path: Path
) -> None:
    plan = make_plan(2, 2, Window(sink_tokens=0, recent_tokens=16))
    found = run_evaluation(source, plan, settings, tmp_path / "out").evaluation.plan
    assert [(part.first, part.last) for part in found.by_position] == [(0, 15), (16, 31), (32, 39)]
    assert sum(part.tokens for part in found.by_position) == 4 * 40
    total = math.fsum(part.tokens * part.kl_nats for part in found.by_position)
    assert total / 160 == pytest.approx(found.kl_nats, rel=1e-9)
    assert found.by_position[0].kl_nats < 1e-7  # everything is in the window still
    assert found.by_position[2].kl_nats > 1e-4


def test_compression_is_against_16_bits_though_the_model_is_float32(geometry: CacheGeometry, make_plan: Maker) -> None:
    plan = make_plan(4, 2, Window(sink_tokens=0, recent_tokens=4))
    one = [SequenceResult((0.0,) * 40, (1,) * 40, 10.0)]
    found = summarise("plan", "plan", plan, geometry, one, one, 0)
    # 2 layers, K and V of 2 x 8 elements; of 40 tokens, 36 are codes: K 4 bits + 32/4, V 2 bits + 32/8.
    codes = 36 * 16 * (12 + 6) / 8 * 2
    window = 4 * 16 * 2 * 2 * 2
    assert geometry.dtype == "float32"
    assert found.contexts[0].bytes == codes + window
    assert found.contexts[0].bytes_at_16_bits == 40 * 16 * 2 * 2 * 2
    assert [context.tokens for context in found.contexts] == [40, 64]  # the most that the model was made for
    unlimited = geometry.model_copy(update={"positions": None})
    assert summarise("plan", "plan", plan, unlimited, one, one, 0).contexts[1].tokens == 32768
    assert (found.nominal_bits, found.stored_bits, found.bytes_per_token) == (3.0, 9.0, 64 * 9 / 8)


def test_a_plan_written_by_hand_without_a_geometry_can_be_evaluated(
    source: ModelSource, settings: EvaluateRequest, make_plan: Maker, tmp_path: Path
) -> None:
    bare = make_plan(2, 2).model_copy(update={"geometry": None})
    found = run_evaluation(source, bare, settings, tmp_path / "bare").evaluation.plan
    whole = run_evaluation(source, make_plan(2, 2), settings, tmp_path / "whole").evaluation.plan
    assert found.digest == bare.digest
    assert found.model_copy(update={"digest": whole.digest}) == whole


@pytest.mark.parametrize("after", [0, 1, 5, 11])
def test_a_stopped_run_goes_on_to_the_same_file_and_measures_only_the_rest(
    source: ModelSource,
    settings: EvaluateRequest,
    make_plan: Maker,
    tmp_path: Path,
    measured: list[int],
    after: int,
) -> None:
    command = (source, make_plan(2, 2), settings)
    rivals = [Baseline("uniform", (make_plan(3, 3), make_plan(4, 4), make_plan(1, 1)))]
    against = [("other", make_plan(8, 8))]
    whole = run_evaluation(*command, tmp_path / "whole", rivals, against)
    every = len(measured)
    assert every == 5 + 3 * 4  # all candidates on the first sequence, two of the three on the others
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(*command, tmp_path / "resumed", rivals, against, progress=stop_after(after))
    assert not (tmp_path / "resumed" / "evaluation.json").exists()
    done = len(measured) - every
    measured.clear()
    seen: list[tuple[int, int]] = []
    resumed = run_evaluation(*command, tmp_path / "resumed", rivals, against, progress=lambda *at: seen.append(at))
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    assert len(measured) == every - done
    assert seen[0][0] <= after
    assert seen[-1] == (4 + every, 4 + every)
    assert [number for number, _ in seen] == sorted(number for number, _ in seen)
    assert any("stopped run" in remark for remark in resumed.remarks) == (after > 0)
    assert [path.name for path in (tmp_path / "resumed").iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("sequences", 3, "sequences"),
        ("sequence_length", 30, "sequence_length"),
        ("seed", 1, "seed"),
        ("dtype", "bfloat16", "dtype"),
        ("measure_from", 5, "measure_from"),
        ("exact", True, "path"),
    ],
)
def test_a_stopped_run_refuses_another_setting_by_name(
    source: ModelSource,
    settings: EvaluateRequest,
    make_plan: Maker,
    tmp_path: Path,
    field: str,
    value: object,
    named: str,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(source, make_plan(2, 2), settings, tmp_path / "out", progress=stop_after(3))
    other = changed(settings, **{field: value})
    with pytest.raises(Mismatch, match=f"another {named}:"):
        run_evaluation(source, make_plan(2, 2), other, tmp_path / "out")
    assert run_evaluation(source, make_plan(2, 2), other, tmp_path / "out", restart=True).path.exists()


def test_another_plan_goes_on_with_what_a_stopped_run_measured(
    source: ModelSource, settings: EvaluateRequest, make_plan: Maker, tmp_path: Path, measured: list[int]
) -> None:
    plans = make_plan(2, 2), make_plan(3, 3)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(source, plans[0], settings, tmp_path / "out", progress=stop_after(4))
    measured.clear()
    run_evaluation(source, plans[1], settings, tmp_path / "out", against=[("first", plans[0])])
    assert (measured.count(2), measured.count(3)) == (4 - 2, 4)


def test_the_best_candidate_over_all_sequences_is_reported_under_its_formats(
    source: ModelSource, settings: EvaluateRequest, make_plan: Maker, tmp_path: Path
) -> None:
    rival = Baseline("uniform", (make_plan(1, 1), make_plan(6, 6), make_plan(2, 2)))
    found = run_evaluation(source, make_plan(3, 3), settings, tmp_path / "out", [rival], name="mine").evaluation
    assert [result.name for result in found.plans] == ["mine", "uniform int6g4/int6g8"]
    alone = run_evaluation(source, make_plan(6, 6), settings, tmp_path / "alone").evaluation
    assert found.plans[1].kl_nats == alone.plan.kl_nats
    assert found.plans[1].kl_excess_nats == pytest.approx(alone.plan.kl_nats - found.plan.kl_nats, rel=1e-9)
    assert found.comparable == ()  # it stores more


def test_the_same_plan_under_two_names_is_measured_once_and_is_no_win(
    source: ModelSource, settings: EvaluateRequest, make_plan: Maker, tmp_path: Path, measured: list[int]
) -> None:
    plan = make_plan(2, 2)
    found = run_evaluation(source, plan, settings, tmp_path / "out", against=[("plan", plan)]).evaluation
    assert len(measured) == 4
    assert [result.name for result in found.plans] == ["plan", "plan (2)"]
    assert found.unbeaten == (found.plans[1],)


def test_a_plan_for_another_model_is_refused_by_name(
    source: ModelSource, settings: EvaluateRequest, make_plan: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(2, 2)
    stamp = plan.model.model_copy(update={"fingerprint": "sha256:of-another"})
    stamped = plan.model_copy(update={"model": stamp})
    with pytest.raises(Mismatch, match=r"other: .*fingerprint is sha256:of-another"):
        run_evaluation(source, plan, settings, tmp_path / "out", against=[("other", stamped)])
    monkeypatch.setattr(evaluation, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(Mismatch, match=r"plan: .*4 KV heads of 8"):
        run_evaluation(source, plan_of(tiny_model("llama-mha"), 0.0), settings, tmp_path / "out")
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("field", "value"), [("sequences", 0), ("sequence_length", 65), ("sequence_length", 1), ("measure_from", 39)]
)
def test_settings_that_cannot_be_are_refused_before_the_model_loads(
    source: ModelSource,
    settings: EvaluateRequest,
    make_plan: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    value: int,
) -> None:
    monkeypatch.setattr(evaluation, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match=f"--{field.replace('_', '-')} {value}"):
        run_evaluation(source, make_plan(2, 2), changed(settings, **{field: value}), tmp_path / "out")


def test_rows_that_end_before_measuring_begins_are_left_out_and_counted(
    source: ModelSource, settings: EvaluateRequest, make_plan: Maker, tmp_path: Path
) -> None:
    rows = Path(settings.data[0])
    rows.write_text("the cat sat on a mat\nthe cat sat on a mat and saw another cat that sat on no mat at all\n")
    ragged = changed(settings, pack=False, measure_from=8)
    run = run_evaluation(source, make_plan(2, 2), ragged, tmp_path / "out")
    assert sum(part.tokens for part in run.evaluation.plan.by_position) == 17 - 8
    assert any("1 of 2 sequences end before position 8" in remark for remark in run.remarks)
    assert run.evaluation.plan.kl_stderr_nats is None
    with pytest.raises(CalibrationError, match="no sequence reaches position 20"):
        run_evaluation(source, make_plan(2, 2), changed(ragged, measure_from=20), tmp_path / "out")


@pytest.mark.parametrize(("dtype", "said"), [("bfloat16", True), ("float32", False)])
def test_a_small_kl_of_a_bfloat16_model_comes_with_a_warning(
    source: ModelSource, settings: EvaluateRequest, make_plan: Maker, tmp_path: Path, dtype: str, said: bool
) -> None:
    run = run_evaluation(source, make_plan(8, 8), changed(settings, dtype=dtype, sequences=1), tmp_path / "out")
    assert any("logits are rounded" in remark for remark in run.remarks) is said


def test_logits_that_are_not_finite_are_an_error_and_not_a_number(
    settings: EvaluateRequest, source: ModelSource, make_plan: Maker, tmp_path: Path
) -> None:
    plan = make_plan(2, 2)
    assert source.path is not None
    edit_weights(source.path, lambda state: state["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(KvprofError, match="logits of full precision are not finite in float32"):
        run_evaluation(resolve(str(source.path)), plan, settings, tmp_path / "out")
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_the_file_holds_what_the_run_returned(
    source: ModelSource, settings: EvaluateRequest, make_plan: Maker, tmp_path: Path
) -> None:
    run = run_evaluation(source, make_plan(2, 2), settings, tmp_path / "out")
    assert run.path == tmp_path / "out" / "evaluation.json"
    assert Evaluation.load(run.path) == run.evaluation
    assert run.evaluation.dtype == "float32"
    assert (run.evaluation.model.fingerprint or "").startswith("sha256:")
    assert run.evaluation.plan.digest == make_plan(2, 2).digest


def test_the_builtin_text_is_held_out_by_default(
    source: ModelSource, settings: EvaluateRequest, make_plan: Maker, tmp_path: Path
) -> None:
    builtin = changed(settings, data=("builtin",), sequences=2)
    assert run_evaluation(source, make_plan(2, 2), builtin, tmp_path / "out").evaluation.text.split == "held-out"


def test_texts_can_be_mixed_and_the_model_writes_its_own_held_out(
    source: ModelSource, settings: EvaluateRequest, make_plan: Maker, tmp_path: Path
) -> None:
    plan, (file,) = make_plan(2, 2), settings.data
    both = run_evaluation(source, plan, changed(settings, data=(file, "self")), tmp_path / "both").evaluation
    assert [(share.split, share.sequences) for share in both.text.sources] == [("all", 2), ("held-out", 2)]
    kls = []
    for data in (file, "self"):
        alone = run_evaluation(source, plan, changed(settings, data=(data,), sequences=2), tmp_path / "alone")
        kls.append(alone.evaluation.plan.kl_nats)
    assert both.plan.kl_nats == pytest.approx(sum(kls) / 2, rel=1e-9)


def test_the_error_of_a_mean_over_unequal_sequences_weighs_them_by_their_tokens(
    geometry: CacheGeometry, make_plan: Maker
) -> None:
    sequences = [SequenceResult((kl,) * n, (1,) * n, 1.0) for kl, n in ((0.1, 30), (0.4, 10), (0.2, 20))]
    found = summarise("plan", "plan", make_plan(2, 2), geometry, sequences, sequences, 0)
    mean = (0.1 * 30 + 0.4 * 10 + 0.2 * 20) / 60
    squares = sum((n * (kl - mean)) ** 2 for kl, n in ((0.1, 30), (0.4, 10), (0.2, 20)))
    assert found.kl_nats == pytest.approx(mean)
    assert found.kl_stderr_nats == pytest.approx(math.sqrt(3 / 2 * squares) / 60)
    assert (found.kl_excess_nats, found.kl_excess_stderr_nats) == (0.0, 0.0)


@pytest.mark.demo
def test_uniform_plans_of_the_demo_model_cost_what_they_are_known_to_cost(tmp_path: Path) -> None:
    """Against numbers measured once by other code: 512 tokens, a window of 32, no sinks, groups of 32."""
    source = resolve("demo")
    found = take_inventory(load_config(source), source.id)

    def uniform(bits_key: int, bits_value: int) -> BitPlan:
        key, value = (
            TensorPlan(bits=bits, group_size=32, axis=axis)
            for bits, axis in ((bits_key, "channel"), (bits_value, "token"))
        )
        return BitPlan(
            model=found.model,
            quantizer=Quantizer(),
            window=Window(sink_tokens=0, recent_tokens=32),
            geometry=found.geometry,
            layers=tuple(LayerPlan(layer=layer, key=key, value=value) for layer in range(30)),
        )

    def kl(sequences: int, *pairs: tuple[int, int]) -> list[float]:
        (first, *others), settings = pairs, EvaluateRequest(sequences=sequences, sequence_length=512)
        against = [(f"K{pair[0]} V{pair[1]}", uniform(*pair)) for pair in others]
        run = run_evaluation(source, uniform(*first), settings, tmp_path, against=against)
        return [result.kl_nats for result in run.evaluation.plans]

    # One sequence's KL at K2 V4 lies anywhere from 0.08 to 0.26: five are the fewest whose mean is near that of all.
    assert kl(5, (4, 2), (2, 4)) == pytest.approx([0.036, 0.152], rel=0.15)
    fine, four = kl(1, (8, 8), (4, 4))
    assert fine < 1e-4
    assert four < 0.008
