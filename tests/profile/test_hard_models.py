"""Models at the edges: one layer, heads of one channel, one token, constant keys, weights of 1e-20 and 1e20, float16.

The truth is the same model in float64, which has room for all of it. What a dtype cannot hold is refused.
"""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvprof.calibration.sequences import CalibrationSet
from kvprof.errors import NonFiniteGradient
from kvprof.evaluate.logits import planned_logits, reference_logits
from kvprof.metrics import token_kl
from kvprof.models.inventory import take_inventory
from kvprof.profile.decoder import Decoder, formats_of
from kvprof.profile.scoring import measure_sensitivity
from kvprof.profile.singular_values import cached_singular_values
from kvprof.records.document import ModelInfo
from kvprof.records.formats import format_named
from kvprof.records.plan import BitPlan, LayerPlan, Quantizer, TensorPlan, Window
from kvprof.records.scores import CalibrationInfo, Scores

WINDOW = Window(sink_tokens=1, recent_tokens=2)
DECODER = Decoder({"key": ("int2g4", "int8g4"), "value": ("int2g4", "int8g4c")}, WINDOW, 0.5)


def text(lengths: tuple[int, ...] = (24, 9)) -> CalibrationSet:
    generator = torch.Generator().manual_seed(7)
    sequences = tuple(tuple(torch.randint(1, 96, (length,), generator=generator).tolist()) for length in lengths)
    info = CalibrationInfo(
        dataset="random", sequences=len(lengths), sequence_length=max(lengths), tokens=sum(lengths), seed=1
    )
    return CalibrationSet(sequences, info, 0)


def scores_of(model: PreTrainedModel, calibration: CalibrationSet | None = None) -> Scores:
    inventory = take_inventory(model.config)
    formats = formats_of(inventory.geometry, DECODER)
    return measure_sensitivity(model, calibration or text(), inventory, formats, DECODER)


def plan_of(model: PreTrainedModel, name: str = "int2g4", window: Window = WINDOW) -> BitPlan:
    geometry = take_inventory(model.config).geometry
    layers = []
    for shape in geometry.planned:
        key = format_named(name, "key", shape.key_head_dim).model_dump()
        value = format_named(name, "value", shape.value_head_dim).model_dump()
        layers.append(LayerPlan(layer=shape.layer, key=TensorPlan(**key), value=TensorPlan(**value)))
    return BitPlan(
        model=ModelInfo(num_layers=geometry.num_layers),
        quantizer=Quantizer(),
        window=window,
        geometry=geometry,
        layers=tuple(layers),
    )


def numbers(scores: Scores) -> list[float]:
    """Return all that is measured."""
    found = []
    for entry in scores.layers:
        for tensor in (entry.key, entry.value):
            assert tensor.gradient_norm is not None
            found.append(tensor.gradient_norm)
            found += [] if tensor.loss_increase is None else list(tensor.loss_increase.values())
    return found


def one_channel(layers: int = 1) -> PreTrainedModel:
    """A GPT-2 of four heads of one channel."""
    torch.manual_seed(1)
    config = GPT2Config(n_embd=4, n_layer=layers, n_head=4, n_positions=64, vocab_size=96, pad_token_id=0)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model.eval().requires_grad_(False)


def one_layer() -> PreTrainedModel:
    torch.manual_seed(2)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=96,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("make", [one_channel, one_layer])
def test_the_smallest_models_are_measured_as_in_float64(make: object) -> None:
    found, true = (numbers(scores_of(model)) for model in (make(), make().double()))
    assert found == pytest.approx(true, rel=2e-2, abs=1e-9)
    assert max(true) > 0


@pytest.mark.parametrize("make", [one_channel, one_layer])
def test_the_smallest_models_decode_alike_in_one_forward_and_token_by_token(make: object) -> None:
    model = make()
    ids = text().sequences[0]
    for name in ("int2g4", "int8g100", "rot2"):
        plan = plan_of(model, name)
        fast, exact = (planned_logits(model, plan, ids, route) for route in ("fast", "exact"))
        torch.testing.assert_close(fast, exact, rtol=1e-4, atol=1e-4)
        assert bool((token_kl(reference_logits(model, ids), fast) >= 0).all())


def test_a_single_token_is_read_in_full_precision() -> None:
    model = one_layer()
    ids = [5]
    full = reference_logits(model, ids)
    for route in ("fast", "exact"):
        found = planned_logits(model, plan_of(model, window=Window(sink_tokens=0, recent_tokens=0)), ids, route)
        torch.testing.assert_close(found, full, rtol=1e-5, atol=1e-5)
    assert token_kl(full, full).tolist() == [0.0]


def test_a_window_longer_than_the_text_and_a_group_longer_than_it_lose_nothing() -> None:
    model = tiny_model("llama")
    ids = text().sequences[0]
    full = reference_logits(model, ids)
    for name, window in (("int2g4", Window(sink_tokens=4, recent_tokens=10**6)), ("int1g1000", WINDOW)):
        plan = plan_of(model, name, window)
        if name == "int1g1000":  # the values' groups end with the head: those are kept whole
            whole = TensorPlan(bits=16, group_size=1, axis="token")
            plan = plan.model_copy(update={"layers": tuple(e.model_copy(update={"value": whole}) for e in plan.layers)})
        for route in ("fast", "exact"):
            torch.testing.assert_close(planned_logits(model, plan, ids, route), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
def test_keys_or_values_of_zero_lose_nothing_and_no_number_is_none(projection: str) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            getattr(layer.self_attn, projection).weight.zero_()
    scores = scores_of(model)
    assert all(math.isfinite(number) and number >= 0 for number in numbers(scores))
    for entry in scores.layers:
        tensor, other = (entry.key, entry.value) if projection == "k_proj" else (entry.value, entry.key)
        assert tensor.loss_increase is not None
        assert max(tensor.loss_increase.values()) == pytest.approx(0.0, abs=1e-12)
        if projection == "v_proj":  # no key moves an output that is zero anyway
            assert other.gradient_norm == pytest.approx(0.0, abs=1e-12)
    spectra = cached_singular_values(model, take_inventory(model.config).geometry, text().sequences[0])
    zero = "key" if projection == "k_proj" else "value"
    assert all((values == 0).all() for (_, tensor), values in spectra.items() if tensor == zero)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-10, 1e3, 1e4, 1e5, 1e6, 1e8, 1e10, 1e20, 1e30])
@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
def test_weights_of_any_size_are_measured_as_in_float64_or_refused(projection: str, size: float) -> None:
    def scaled(dtype: torch.dtype) -> PreTrainedModel:
        model = tiny_model("llama").to(dtype)
        with torch.no_grad():
            getattr(model.model.layers[0].self_attn, projection).weight.mul_(size)
        return model

    true, found = (measured_or_refused(scaled(dtype)) for dtype in (torch.float64, torch.float32))
    if found is None:
        assert projection == "k_proj"  # RMSNorm makes any value small again; scores have to be exponents
        assert size >= 1e10
    else:
        assert true is not None
        assert found == pytest.approx(true, rel=0.05, abs=1e-7 * max(true))


def measured_or_refused(model: PreTrainedModel) -> list[float] | None:
    """Return all that is measured of a model, or None where a gradient or a loss is not finite."""
    try:
        return numbers(scores_of(model))
    except NonFiniteGradient:
        return None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("times", [300.0, 30000.0, 100000.0])
def test_half_precision_at_the_edge_of_overflow_gives_no_number_that_is_none(dtype: torch.dtype, times: float) -> None:
    """Measuring computes in float32, decoding in half: of these values the largest is beyond float16, not bfloat16."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(times)
    half = model.to(dtype)
    found = measured_or_refused(half)
    assert found is not None
    assert all(math.isfinite(number) for number in found)
    ids = text().sequences[0]
    exact, full = planned_logits(half, plan_of(half), ids, "exact"), reference_logits(half, ids)
    overflows = dtype == torch.float16 and times == 100000.0
    assert bool(exact.isfinite().all()) == bool(full.isfinite().all()) == (not overflows)
