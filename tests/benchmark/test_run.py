"""A benchmark run: what its file says, how a stopped one goes on, and that what has no room has a reason instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from requested import changed
from small_device import small_device  # noqa: F401
from transformers import PreTrainedModel

from kvprof.allocate.unscored import uniform_plan
from kvprof.benchmark import cases as benchmark_cases
from kvprof.benchmark.cases import Cases
from kvprof.benchmark.run import run_benchmark
from kvprof.benchmark.subject import Subject, random_subject, real_subject
from kvprof.errors import CacheError, Mismatch, UsageError
from kvprof.models.identity import checkpoint_fingerprint
from kvprof.models.source import ModelSource
from kvprof.records.benchmark import Benchmark, BenchmarkCase, CacheName, DecodeRun
from kvprof.records.formats import parse_formats
from kvprof.records.geometry import CacheGeometry
from kvprof.records.plan import BitPlan, Window
from kvprof.records.requests.check import BenchmarkRequest
from kvprof.runtime import PlanCache

pytestmark = pytest.mark.usefixtures("small_device")

SETTINGS = BenchmarkRequest(context=(20, 40), batch=(1, 2), device="cpu", repeats=2, tokens=2)


@pytest.fixture
def subject(source: ModelSource) -> Subject:
    """The tiny Llama."""
    return real_subject(source)


def test_a_run_times_every_case_and_writes_it_down(
    subject: Subject, make_plan: Callable[..., BitPlan], geometry: CacheGeometry, tmp_path: Path
) -> None:
    plan = make_plan(3, 2)
    done: list[tuple[int, int]] = []
    run = run_benchmark(subject, plan, SETTINGS, tmp_path, "mine", progress=lambda *pair: done.append(pair))
    found = Benchmark.load(run.path)
    assert found == run.benchmark
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["benchmark.json"]
    assert [(case.context, case.batch) for case in found.cases] == [(20, 1), (20, 2), (40, 1), (40, 2)]
    assert (found.plan.name, found.plan.digest) == ("mine", plan.digest)
    # Keys of 3 bits in groups of 4, values of 2 in groups of 8: 3 + 32/4 and 2 + 32/8.
    assert found.plan.stored_bits == (11 + 6) / 2
    assert found.plan.ceiling == 16 / 8.5
    assert (found.device.type, found.kernels, found.dtype) == ("cpu", "torch", "float32")
    assert (found.planned_layers, found.skipped_layers, found.random_weights) == (2, 0, False)
    exact = plan.model_copy(update={"geometry": geometry.model_copy(update={"dtype": "float32"})})
    halved = plan.model_copy(update={"geometry": geometry.model_copy(update={"dtype": "float16"})})
    for case in found.cases:
        assert case.planned.bytes == exact.bytes_at(case.context, case.batch)
        at_16_bits = 2 * case.batch * case.context * 2 * 2 * 8 * 2
        assert {run.dtype: run.bytes for run in case.full} == {"bfloat16": at_16_bits, "float32": 2 * at_16_bits}
        assert case.ceiling == at_16_bits / halved.bytes_at(case.context, case.batch)
        assert [run.cache for run in case.decode] == ["PlanCache", "DynamicCache"]
        assert [run.cache_bytes for run in case.decode] == [case.planned.bytes, 2 * at_16_bits]
        assert case.append.share <= 1
        assert case.planned.copy_fraction == pytest.approx(
            case.planned.bytes_per_second / found.copy_bandwidth.bytes_per_second
        )
    assert found.largest_batch is None
    assert done[0] == (0, 16)
    assert done[-1] == (16, 16)


def test_a_stopped_run_goes_on_and_finished_cases_are_as_they_were(
    subject: Subject, make_plan: Callable[..., BitPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Cases.measure
    finished: list[BenchmarkCase] = []

    def stops(self: Cases, context: int, batch: int) -> BenchmarkCase:
        if len(finished) == 2:
            raise KeyboardInterrupt
        finished.append(measure(self, context, batch))
        return finished[-1]

    settings = changed(SETTINGS, context=(20, 30, 40), batch=(1,), attention_only=True)
    monkeypatch.setattr(Cases, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(subject, make_plan(3, 2), settings, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["benchmark.journal"]
    monkeypatch.setattr(Cases, "measure", measure)
    with pytest.raises(Mismatch, match="another tokens"):
        run_benchmark(subject, make_plan(3, 2), changed(settings, attention_only=False, tokens=3), tmp_path)
    found = run_benchmark(subject, make_plan(3, 2), settings, tmp_path).benchmark
    assert list(found.cases[:2]) == finished
    assert "went on with a stopped run: 2 of 3 cases were measured before" in found.remarks


def test_the_largest_batch_is_the_one_that_fits(
    subject: Subject, make_plan: Callable[..., BitPlan], tmp_path: Path
) -> None:
    settings = changed(SETTINGS, context=(40,), batch=(1,), memory="600000B")
    found = run_benchmark(subject, make_plan(2, 2), settings, tmp_path).benchmark.largest_batch
    assert found.context == 40
    for fitted in (found.planned, found.full):
        assert fitted.run.batch == fitted.batch > 0
        one = (fitted.cache_bytes + fitted.working_bytes) / fitted.batch
        taken = found.weight_bytes + fitted.batch * one
        assert taken <= 600_000 < taken + one
        assert fitted.run.tokens_per_second > 0
    assert found.planned.batch > found.full.batch
    assert found.batch_ratio == found.planned.batch / found.full.batch
    alone = changed(settings, attention_only=True)
    counted = run_benchmark(subject, make_plan(2, 2), alone, tmp_path).benchmark.largest_batch
    assert counted.planned.batch > 0
    assert "attention-only" in counted.planned.run.reason
    assert counted.throughput_ratio is None


def test_a_model_that_has_no_room_is_left_out_with_the_reason(
    subject: Subject, make_plan: Callable[..., BitPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_cases, "weight_bytes", lambda *_: 2**60)
    settings = changed(SETTINGS, context=(20,), batch=(1,))
    found = run_benchmark(subject, make_plan(3, 2), settings, tmp_path).benchmark
    for case in found.cases:
        assert case.planned.timing is not None
        assert all("for its weights, 1048576.00 TiB are needed" in run.reason for run in case.decode)


def test_a_context_that_has_no_room_is_left_out_with_the_reason(
    subject: Subject, make_plan: Callable[..., BitPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_cases, "free_bytes", lambda device: 200_000)
    settings = changed(SETTINGS, context=(20, 10**9), batch=(1,), attention_only=True)
    small, large = run_benchmark(subject, make_plan(3, 2), settings, tmp_path).benchmark.cases
    assert small.speedup is not None
    assert "are needed" in large.planned.reason
    assert (large.full, large.append, large.speedup) == ((), None, None)


def test_a_device_that_is_full_after_all_is_a_reason_too(
    subject: Subject, make_plan: Callable[..., BitPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("kvprof.benchmark.planned_attention.time_calls", full)
    monkeypatch.setattr("kvprof.benchmark.full_attention.time_calls", full)
    monkeypatch.setattr("kvprof.benchmark.decode.time_calls", full)
    settings = changed(SETTINGS, context=(20,), batch=(1,))
    (case,) = run_benchmark(subject, make_plan(3, 2), settings, tmp_path).benchmark.cases
    reasons = {run.reason for run in (case.planned, *case.full, *case.decode)}
    assert reasons == {"out of memory on the device"}


def test_what_a_reader_should_know_is_remarked_on(
    subject: Subject, make_plan: Callable[..., BitPlan], tmp_path: Path
) -> None:
    settings = changed(SETTINGS, context=(4, 100), batch=(1,), attention_only=True)
    plan = make_plan(3, 2, Window(sink_tokens=1, recent_tokens=8))
    remarks = " ".join(run_benchmark(subject, plan, settings, tmp_path).benchmark.remarks)
    assert "100 tokens are more than the 64 that the model was made for" in remarks
    assert "at 4 tokens nothing is quantized" in remarks
    assert "stopped run" not in remarks


def test_a_plan_of_other_weights_is_refused_and_a_plan_of_other_shapes_too(
    subject: Subject, source: ModelSource, geometry: CacheGeometry, make_plan: Callable[..., BitPlan], tmp_path: Path
) -> None:
    plan = make_plan(3, 2)
    strange = plan.model_copy(update={"model": plan.model.model_copy(update={"fingerprint": "sha256:other"})})
    with pytest.raises(Mismatch, match="fingerprint"):
        run_benchmark(subject, strange, SETTINGS, tmp_path)
    own = checkpoint_fingerprint(source, geometry)
    known = plan.model_copy(update={"model": plan.model.model_copy(update={"fingerprint": own})})
    quick = changed(SETTINGS, context=(9,), batch=(1,), attention_only=True)
    found = run_benchmark(subject, known, quick, tmp_path).benchmark
    assert found.model.fingerprint == own
    with pytest.raises(Mismatch, match="it has 2 layers"):
        run_benchmark(random_subject("smollm2-135m"), plan, SETTINGS, tmp_path)


def test_of_a_shapes_first_layers_the_plan_of_all_of_them_serves() -> None:
    whole, kept = random_subject("llama-3-8b"), random_subject("llama-3-8b", 2)
    entry = {"key": {"bits": 4, "group_size": 64, "axis": "channel"}, "value": {"bits": 2, "group_size": 64}}
    entry["value"]["axis"] = "token"
    plan = BitPlan.model_validate(
        {
            "model": {"num_layers": 32, "fingerprint": "sha256:real"},
            "quantizer": {},
            "window": {"sink_tokens": 0, "recent_tokens": 0},
            "geometry": whole.geometry,
            "layers": [{"layer": layer, **entry} for layer in range(32)],
        }
    )
    assert len(whole.fitted(plan).layers) == 32  # weights that are nobody's have no fingerprint to compare
    cut = kept.fitted(plan)
    assert [entry.layer for entry in cut.layers] == [0, 1]
    assert cut.model.num_layers == 2
    with pytest.raises(Mismatch, match="of the whole shape, or of the layers that are kept"):
        random_subject("smollm2-135m", 2).fitted(plan)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"kernels": "trition"}, UsageError, "did you mean 'triton'"),
        ({"context": (0,)}, UsageError, "--context 0"),
        ({"batch": (1, 0)}, UsageError, "--batch 0"),
        ({"repeats": 0}, UsageError, "--repeats 0"),
        ({"tokens": 0}, UsageError, "--tokens 0"),
        ({"dtype": "float23"}, UsageError, "did you mean 'float32'"),
        ({"device": "nowhere"}, UsageError, "--device nowhere"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    subject: Subject,
    make_plan: Callable[..., BitPlan],
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        run_benchmark(subject, make_plan(3, 2), changed(SETTINGS, **changes), tmp_path)
    assert not list(tmp_path.glob("benchmark*"))


def test_fused_kernels_are_refused_where_there_is_no_gpu(
    subject: Subject, make_plan: Callable[..., BitPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("kvprof.runtime.kernels.triton_kernels.INTERPRETED", False)
    with pytest.raises(CacheError, match="need a GPU"):
        run_benchmark(subject, make_plan(3, 2), changed(SETTINGS, kernels="triton"), tmp_path)
    assert not list(tmp_path.glob("benchmark*"))


def test_random_weights_decode_too(tmp_path: Path) -> None:
    subject = random_subject("smollm2-135m", 1)
    plan = uniform_plan(parse_formats("key:int4g64,value:rot2"), subject.info, subject.geometry)
    settings = changed(SETTINGS, context=(200,), batch=(1,))
    found = run_benchmark(subject, plan, settings, tmp_path).benchmark
    assert (found.random_weights, found.dtype, found.model.num_layers) == (True, "float32", 1)
    assert all(run.tokens_per_second for run in found.cases[0].decode)


def test_a_cache_in_full_precision_is_timed_with_the_models_own_attention(
    subject: Subject, make_plan: Callable[..., BitPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused kernels change by whom a model attends; so does this cache, as they would."""
    seen: list[tuple[str, str]] = []
    from_plan, decode = PlanCache.from_plan, benchmark_cases.time_decode

    def changes(plan: BitPlan, model: PreTrainedModel, kernels: str) -> PlanCache:
        assert kernels == "torch"
        model.set_attn_implementation("eager")
        return from_plan(plan, model, kernels)

    def watches(model: PreTrainedModel, name: CacheName, *rest: Any) -> DecodeRun:
        run = decode(model, name, *rest)
        seen.append((name, model.config._attn_implementation))
        return run

    monkeypatch.setattr(PlanCache, "from_plan", changes)
    monkeypatch.setattr(benchmark_cases, "time_decode", watches)
    run_benchmark(subject, make_plan(3, 2), changed(SETTINGS, batch=(1,)), tmp_path)
    assert seen == 2 * [("PlanCache", "eager"), ("DynamicCache", "sdpa")]
