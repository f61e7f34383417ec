"""Are the gradient norms those of plain autograd and of finite differences, one sequence at a time, whatever the batch?

The truth is a loss that the test computes itself in float64: the mean over a sequence's own targets, nothing added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tiny import MIXTURES, TINY, tiny_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvprof.calibration.sequences import CalibrationSet, batches
from kvprof.errors import NonFiniteGradient
from kvprof.models.inventory import take_inventory
from kvprof.models.layouts import find_projections
from kvprof.profile.gradients import SequenceNorms, gradient_norms
from kvprof.profile.scoring import SequenceResult, measure_sensitivity
from kvprof.records.scores import CalibrationInfo, Scores


def ragged(lengths: Sequence[int] = (17, 5, 24, 9)) -> CalibrationSet:
    """Random sequences of these lengths, over the tiny models' vocabulary."""
    generator = torch.Generator().manual_seed(1)
    sequences = tuple(tuple(torch.randint(1, 96, (length,), generator=generator).tolist()) for length in lengths)
    info = CalibrationInfo(
        dataset="random", sequences=len(lengths), sequence_length=max(lengths), tokens=sum(lengths), seed=1
    )
    return CalibrationSet(sequences, info, 0)


def precise_model(name: str) -> PreTrainedModel:
    """A tiny model in float64, as far as its own code lets it."""
    model = tiny_model(name).double()
    if name in MIXTURES:
        model.set_experts_implementation("eager")  # the grouped product of experts knows no float64
    return model


def token_mean_loss(model: PreTrainedModel, sequence: Sequence[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(sequence[1:]))


def projection_weights(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """The weights that hold K and V of each layer; the same one twice where they are fused."""
    modules = dict(model.named_modules())
    found = find_projections(modules, take_inventory(model.config).geometry)
    return [(modules[entry.key].weight, modules[entry.value].weight) for _, entry in sorted(found.items())]


def cached_rows(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """Which outputs of each projection reach the cached keys, and which the values: masks, asked of the model."""
    modules = dict(model.named_modules())
    found = find_projections(modules, take_inventory(model.config).geometry)
    outputs: dict[str, Tensor] = {}

    def hook(name: str):
        def keep(module: object, inputs: object, output: Tensor) -> Tensor:
            outputs[name] = output.detach().clone().requires_grad_(True)
            return outputs[name].clone()

        return keep

    names = {name for entry in found.values() for name in (entry.key, entry.value)}
    handles = [modules[name].register_forward_hook(hook(name)) for name in names]
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True)
    for handle in handles:
        handle.remove()

    def mask(states: Tensor, name: str) -> Tensor:
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0), dtype=states.dtype)
        (gradient,) = torch.autograd.grad((states * weights).sum(), outputs[name], retain_graph=True)
        return gradient.reshape(-1) != 0

    return [
        (mask(cache.layers[layer].keys, entry.key), mask(cache.layers[layer].values, entry.value))
        for layer, entry in sorted(found.items())
    ]


def autograd_norms(model: PreTrainedModel, sequence: Sequence[int], rows: list[tuple[Tensor, Tensor]]) -> SequenceNorms:
    """Gradient norms from one plain backward with requires_grad on the weights."""
    pairs = projection_weights(model)
    for pair in pairs:
        for weight in pair:
            weight.requires_grad_(True)
    token_mean_loss(model, sequence).backward()
    norms = []
    for pair, masks in zip(pairs, rows, strict=True):
        of_pair = []
        for weight, mask in zip(pair, masks, strict=True):
            gradient = weight.grad if weight.shape[0] == len(mask) else weight.grad.T  # Conv1D stores (in, out)
            of_pair.append(float(gradient[mask].norm()))
        norms.append((of_pair[0], of_pair[1]))
    for pair in pairs:
        for weight in pair:
            weight.requires_grad_(False)
            weight.grad = None
    return norms


def measured(model: PreTrainedModel, text: CalibrationSet, batch_size: int = 1, side: str = "right") -> dict:
    norms: dict[int, SequenceNorms] = {}
    for batch in batches(text.sequences, batch_size, padding_side=side):
        norms |= gradient_norms(model, take_inventory(model.config).geometry, batch)
    return norms


def assert_same(found: dict[int, SequenceNorms], expected: dict[int, SequenceNorms], rel: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for index, norms in expected.items():
        np.testing.assert_allclose(np.array(found[index]), np.array(norms), rtol=rel)


@pytest.mark.parametrize("name", sorted(TINY))
def test_norms_are_those_of_plain_autograd_sequence_by_sequence(name: str) -> None:
    model, text = precise_model(name), ragged()
    rows = cached_rows(model)
    layers = take_inventory(model.config).geometry.scored
    for layer, (key, value) in zip(layers, rows, strict=True):
        assert (int(key.sum()), int(value.sum())) == (layer.key_width, layer.value_width)
    expected = {index: autograd_norms(model, sequence, rows) for index, sequence in enumerate(text.sequences)}
    assert all(min(pair) > 0 for norms in expected.values() for pair in norms)
    assert_same(measured(model, text), expected)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", sorted(TINY))
def test_padding_batch_size_and_order_change_no_score(name: str, side: str) -> None:
    model, text = tiny_model(name), ragged()
    alone = measured(model, text)
    assert_same(measured(model, text, 4, side), alone)
    assert_same(measured(model, text, 3, side), alone)
    turned = CalibrationSet(text.sequences[::-1], text.info, 0)
    assert_same({3 - index: norms for index, norms in measured(model, turned, 2, side).items()}, alone)


@pytest.mark.parametrize("name", [name for name in MIXTURES if not name.startswith("deepseek")])
def test_a_mixture_s_balancing_loss_stays_out(name: str) -> None:
    model = precise_model(name)
    text = ragged()
    plain = measured(model, text)
    model.config.output_router_logits = True  # what makes transformers add the balancing loss
    assert_same(measured(model, text), plain, rel=1e-12)


def slope(model: PreTrainedModel, sequence: Sequence[int], weight: Tensor, direction: Tensor, step: float) -> float:
    """Central difference of the loss along a direction, of fourth order."""
    losses = []
    with torch.no_grad():
        before = weight.clone()
        for steps in (2, 1, -1, -2):
            weight.copy_(before + steps * step * direction)
            losses.append(float(token_mean_loss(model, sequence)))
        weight.copy_(before)
    return (8 * (losses[1] - losses[2]) - (losses[0] - losses[3])) / (12 * step)


@pytest.mark.parametrize(
    ("name", "step"),  # RMS norms and rotary embeddings round to float32 in the middle of a float64 model
    [("phi", 1e-3), ("bloom", 1e-3), ("gpt-neox", 1e-3), ("llama-mqa", 1e-2), ("qwen3", 1e-2), ("gemma2", 1e-2)],
)
def test_norm_is_the_loss_s_slope_along_the_gradient_and_no_other_direction_is_steeper(name: str, step: float) -> None:
    model, text = precise_model(name), ragged((20,))
    (norms,) = measured(model, text).values()
    rows = cached_rows(model)
    for layer, (pair, masks) in enumerate(zip(projection_weights(model), rows, strict=True)):
        for weight, mask, norm in zip(pair, masks, norms[layer], strict=True):
            weight.requires_grad_(True)
            (gradient,) = torch.autograd.grad(token_mean_loss(model, text.sequences[0]), weight)
            weight.requires_grad_(False)
            gradient = gradient * mask[:, None]
            along = slope(model, text.sequences[0], weight, gradient / gradient.norm(), step)
            assert norm == pytest.approx(along, rel=1e-4)
            for seed in range(3):
                direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight)
                direction = direction * mask[:, None] / (direction * mask[:, None]).norm()
                found = slope(model, text.sequences[0], weight, direction, step)
                assert found == pytest.approx(float((gradient * direction).sum()), rel=1e-3, abs=1e-4 * norm)
                assert abs(found) < norm


def test_norm_is_that_of_the_slopes_in_every_entry_of_the_matrix() -> None:
    model, text = precise_model("phi"), ragged((12,))
    (norms,) = measured(model, text).values()
    for weight, norm in zip(projection_weights(model)[1], norms[1], strict=True):
        squares = []
        for entry in range(weight.numel()):
            direction = torch.zeros_like(weight)
            direction.view(-1)[entry] = 1.0
            squares.append(slope(model, text.sequences[0], weight, direction, 1e-3) ** 2)
        assert norm == pytest.approx(math.sqrt(math.fsum(squares)), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox"])
def test_norms_are_those_of_one_backward_a_layer(name: str) -> None:
    model = tiny_model(name)
    rows = cached_rows(model)
    text = ragged((30,))
    expected = []
    for pair, masks in zip(projection_weights(model), rows, strict=True):
        for weight in pair:
            weight.requires_grad_(True)
        loss = token_mean_loss(model, text.sequences[0])
        gradients = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for weight in pair]
        expected.append(tuple(float(g[mask].norm()) for g, mask in zip(gradients, masks, strict=True)))
        for weight in pair:
            weight.requires_grad_(False)
    assert_same(measured(model, text), {0: expected}, rel=1e-4)


def state_of(model: PreTrainedModel) -> tuple:
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        for module in model.modules()
    ]
    flags = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    return hooks, flags, [module.training for module in model.modules()]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("stopped", [False, True])
def test_the_model_is_left_as_it_was_found(name: str, stopped: bool) -> None:
    model = tiny_model(name)
    before, weights = state_of(model), [parameter.clone() for parameter in model.parameters()]
    text = ragged()
    if stopped:
        head = model.get_output_embeddings()
        handle = head.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            measure_sensitivity(model, text, take_inventory(model.config))
        handle.remove()
    else:
        measure_sensitivity(model, text, take_inventory(model.config), batch_size=2)
    assert state_of(model) == before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))


def scores_of(model: PreTrainedModel, text: CalibrationSet, **how: object) -> Scores:
    return measure_sensitivity(model, text, take_inventory(model.config), **how)


def test_score_is_the_mean_over_sequences_with_its_standard_error() -> None:
    model, text = tiny_model("llama"), ragged()
    by_sequence = np.array([norms for _, norms in sorted(measured(model, text).items())])  # (sequence, layer, tensor)
    scores = scores_of(model, text)
    assert scores.source == "gradients"
    assert scores.calibration == text.info
    for layer, entry in enumerate(scores.layers):
        for column, tensor in enumerate((entry.key, entry.value)):
            norms = by_sequence[:, layer, column]
            assert tensor.gradient_norm == pytest.approx(norms.mean())
            assert tensor.gradient_norm_stderr == pytest.approx(norms.std(ddof=1) / math.sqrt(len(norms)))


def test_one_sequence_has_a_standard_error_of_zero() -> None:
    for entry in scores_of(tiny_model("llama"), ragged((11,))).layers:
        assert entry.key.gradient_norm_stderr == entry.value.gradient_norm_stderr == 0.0


def test_what_was_measured_before_is_not_measured_again() -> None:
    model, text = tiny_model("llama"), ragged()
    known: dict[int, SequenceResult] = {}
    whole = scores_of(model, text, finished=known.update)
    seen: list[int] = []
    done = {index: known[index] for index in (2, 0)}
    again = scores_of(model, text, done=done, finished=lambda norms: seen.extend(norms))
    assert sorted(seen) == [1, 3]
    assert again.model_dump_json() == whole.model_dump_json()


def test_a_half_precision_gradient_that_overflows_is_refused_with_the_dtype_that_holds_it() -> None:
    model, text = tiny_model("llama"), ragged((12,))
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
        for name, parameter in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "v_proj.weight", "down_proj.weight")):
                parameter.mul_(1e-3)  # a small residual stream: the norms that follow make its gradient large
    with pytest.raises(NonFiniteGradient, match=r"layer \d is not finite in float16") as raised:
        measured(model.half(), text)
    assert "--dtype bfloat16" in str(raised.value)
    finite = measured(model.bfloat16(), text)[0]
    assert all(math.isfinite(norm) for pair in finite for norm in pair)


def test_a_model_whose_loss_is_not_a_number_is_refused_without_advice_to_widen() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(NonFiniteGradient, match="weights are damaged"):
        measured(model, ragged((12,)))
