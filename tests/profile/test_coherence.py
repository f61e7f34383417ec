"""Do effects add up to the divergence that a model really has? Against its exact expectation over labels.

Truth is the Jacobian of all logits that count with respect to attention outputs, by automatic differentiation of the
model alone, and F = diag(p) - p p' of each position: half of dz' F dz is the divergence to second order, dz = J d. What
d is comes from loops of NumPy. Nothing of it knows gradients of a loss, labels, blocks or bandwidths.

Of 8,192 draws of the labels (tiny Llama, 24 positions that count), in shares of the exact divergence, mean and relative
standard deviation of a single draw (`python tests/profile/test_coherence.py` prints them):

                          positions apart     Bartlett, 4     Bartlett, 8         one sum
    key of layer 0           1.01 +- 0.34    1.01 +- 0.52    1.01 +- 0.69    1.00 +- 1.44
    value of layer 0         0.82 +- 0.22    0.85 +- 0.40    0.88 +- 0.58    1.01 +- 1.45
    key of layer 1           1.00 +- 0.34    0.99 +- 0.52    0.99 +- 0.67    1.00 +- 1.40
    value of layer 1         1.00 +- 0.24    1.00 +- 0.45    0.99 +- 0.62    0.98 +- 1.38
    all four                 0.87 +- 0.23    0.89 +- 0.41    0.91 +- 0.59    1.00 +- 1.43

Positions taken by themselves are the least noisy and miss up to a fifth; one sum misses nothing, but one draw of it
says little. The bandwidth chosen from 16 such sequences lies between 1 and 6: short as the text is, its bias stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from runtime.reference import rounded, tokens_in_codes
from tiny import tiny_model
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from kvprof.calibration.sequences import Batch
from kvprof.profile import loss_increase as losses
from kvprof.profile.loss_increase import loss_effects
from kvprof.records.formats import format_named
from kvprof.records.long_run import bandwidth_of, long_run
from kvprof.records.plan import Quantizer, TensorPlan, Window

Floats = NDArray[np.float64]
Key = tuple[int, str, str]

WINDOW = Window(sink_tokens=2, recent_tokens=5)
TOKENS, START = 48, 24
COUNTED = TOKENS - START
KEYS: tuple[Key, ...] = tuple(
    (layer, tensor, name) for layer in range(2) for tensor, name in (("key", "int3g8"), ("value", "rot2"))
)
PLANS: dict[str, tuple[Key, ...]] = {
    **{f"{tensor} of layer {layer}": ((layer, tensor, name),) for layer, tensor, name in KEYS},
    "keys": tuple(key for key in KEYS if key[1] == "key"),
    "layer 0": tuple(key for key in KEYS if key[0] == 0),
    "all four": KEYS,
}
CROSSING = ("value of layer 0", "layer 0", "all four")
"""Plans whose errors at one position go the way of those at others."""
BATCH, BATCHES = 256, 8
"""Draws of labels: rows of a batch, all of the same text, times seeds."""


@dataclass(frozen=True)
class Truth:
    """What is exact of one text: probabilities of the positions that count, (N, V), and what moves their logits.

    moved: for each key of KEYS, (i, t, V): how the logits of position t move with the change of position i's output.
    """

    probabilities: Floats
    moved: dict[Key, Floats]

    def products(self, keys: Sequence[Key]) -> Floats:
        """Return the expected products of the effects of positions i and j, of tensors stored together: (N, N)."""
        moved = sum(self.moved[key] for key in keys)
        mean = np.einsum("tv,itv->it", self.probabilities, moved)
        centred = moved - mean[:, :, None]
        return np.einsum("tv,itv,jtv->ij", self.probabilities, centred, centred)

    def divergence(self, keys: Sequence[Key]) -> float:
        """Return half of dz' F dz, in nats a token, dz of all positions and tensors at once."""
        moved_TV = sum(self.moved[key].sum(axis=0) for key in keys)
        fisher = [np.diag(row) - np.outer(row, row) for row in self.probabilities]
        return 0.5 * sum(one @ part @ one for one, part in zip(moved_TV, fisher, strict=True)) / COUNTED


def text() -> Tensor:
    """Return a text of few words: what is stored alike is changed alike, and changes add up."""
    return torch.randint(1, 5, (TOKENS,), generator=torch.Generator().manual_seed(6))


def precise() -> PreTrainedModel:
    return tiny_model("llama").double()


def exactly(model: PreTrainedModel, ids: Tensor) -> Truth:
    """Differentiate the model twice: a backward of a backward is the product of the Jacobian with a vector."""
    seen: dict[int, tuple[Tensor, ...]] = {}

    def recorder(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ keys.mT * scaling
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        output = (scores.masked_fill(~causal, -math.inf).softmax(-1) @ values).transpose(1, 2)
        output = output if output.requires_grad else output.requires_grad_(True)
        seen[module.layer_idx] = (query.detach(), key.detach(), value.detach(), output)
        return output, None

    AttentionInterface.register("recorder", recorder)
    model.set_attn_implementation("recorder")
    logits = model(input_ids=ids[None], use_cache=False).logits[0, START:]
    model.set_attn_implementation("eager")
    weights = torch.zeros_like(logits, requires_grad=True)
    outputs = [seen[layer][3] for layer in range(2)]
    backward = torch.autograd.grad(logits, outputs, weights, create_graph=True)
    moved = {}
    for layer, tensor, name in KEYS:
        query, key, value, output = seen[layer]
        changes = changed(query, key, value, tensor, name) - output.detach()[0].numpy()
        rows = []
        for at in range(START, TOKENS):
            direction = torch.zeros_like(output)
            direction[0, at] = torch.from_numpy(changes[at])
            (along,) = torch.autograd.grad(backward[layer], weights, direction, retain_graph=True)
            rows.append(along.numpy())
        moved[layer, tensor, name] = np.stack(rows)
    return Truth(logits.detach().softmax(-1).numpy(), moved)


def changed(query: Tensor, key: Tensor, value: Tensor, tensor: str, name: str) -> Floats:
    """Return what each query that counts reads from a cache with one tensor in a format: (T, heads, D)."""
    q, k, v = (states[0].numpy() for states in (query, key, value))
    form = format_named(name, tensor, 8)
    output = np.zeros((TOKENS, q.shape[0], q.shape[2]))
    for at in range(START, TOKENS):
        coded = tokens_in_codes(at, TensorPlan(**form.model_dump()), WINDOW)
        states = {"key": k.copy(), "value": v.copy()}
        inside = slice(WINDOW.sink_tokens, WINDOW.sink_tokens + coded)
        states[tensor][:, inside] = rounded(states[tensor][:, inside], form, Quantizer())
        for head in range(q.shape[0]):
            group = head // (q.shape[0] // k.shape[0])
            scores = states["key"][group, : at + 1] @ q[head, at] * q.shape[2] ** -0.5
            weights = np.exp(scores - scores.max())
            output[at, head] = weights @ states["value"][group, : at + 1] / weights.sum()
    return output


def formats() -> dict[Any, Any]:
    return {(layer, tensor): (format_named(name, tensor, 8),) for layer, tensor, name in KEYS}


def drawn(model: PreTrainedModel, ids: Tensor, rows: int, seed: int) -> dict[Key, Floats]:
    """Return effects of as many draws of the labels: (rows, N) of each key."""
    repeated = ids.repeat(rows, 1)
    batch = Batch(tuple(range(rows)), repeated, torch.ones_like(repeated), repeated)
    found = loss_effects(model, batch, formats(), WINDOW, Quantizer(), 0.5, seed)
    return {key: torch.stack(series).numpy() for key, series in found.items()}


@pytest.fixture(scope="module")
def truth() -> Truth:
    return exactly(precise(), text())


@pytest.fixture(scope="module")
def draws() -> dict[Key, Floats]:
    """Effects of every draw: (BATCH * BATCHES, N) of each key."""
    model, ids = precise(), text()
    parts = [drawn(model, ids, BATCH, seed) for seed in range(BATCHES)]
    return {key: np.concatenate([part[key] for part in parts]) for key in KEYS}


def bartlett(bandwidth: int) -> Floats:
    apart = np.abs(np.subtract.outer(np.arange(COUNTED), np.arange(COUNTED)))
    return np.maximum(0.0, 1 - apart / bandwidth)


def coherent(series: Floats) -> Floats:
    return 0.5 * series.sum(axis=-1) ** 2 / COUNTED


def position_by_position(series: Floats) -> Floats:
    return 0.5 * np.square(series).sum(axis=-1) / COUNTED


def windowed(bandwidth: int) -> Callable[[Floats], Floats]:
    return lambda series: 0.5 * np.square(long_run(series, bandwidth)).sum(axis=-1) / COUNTED


def assert_mean(estimates: Floats, expected: float) -> None:
    """The mean is the expected number, within 3.5 of its standard errors; and these are small enough to tell."""
    error = float(estimates.std(ddof=1)) / math.sqrt(len(estimates))
    assert abs(float(estimates.mean()) - expected) < 3.5 * error
    assert error < 0.06 * expected, "too few draws to tell"


def test_an_effect_is_how_its_position_moves_the_loss(truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any draw: with labels y, the effect of position i is the sum over t of (p_t - y_t) . dz_ti."""
    labels = torch.randint(1, 96, (COUNTED,), generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr(losses, "_sampled_labels", lambda *_: labels)
    found = drawn(precise(), text(), 1, 0)
    slopes = truth.probabilities - np.eye(96)[labels.numpy()]
    for key in KEYS:
        expected = np.einsum("tv,itv->i", slopes, truth.moved[key])
        np.testing.assert_allclose(found[key][0], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", PLANS)
def test_the_square_of_the_whole_sum_is_the_divergence_of_a_tensor_and_of_a_plan(
    name: str, truth: Truth, draws: dict[Key, Floats]
) -> None:
    series = sum(draws[key] for key in PLANS[name])
    exact = truth.divergence(PLANS[name])
    assert 0.5 * truth.products(PLANS[name]).sum() / COUNTED == pytest.approx(exact)
    assert_mean(coherent(series), exact)


def test_the_second_order_is_the_divergence_of_small_changes(truth: Truth) -> None:
    """The logits moved by a thousandth of dz: their KL divergence is a millionth of the exact number."""
    step = 1e-3 * sum(truth.moved[key].sum(axis=0) for key in KEYS)
    p = truth.probabilities
    after = p * np.exp(step)
    after /= after.sum(axis=1, keepdims=True)
    kl = float((p * (np.log(p) - np.log(after))).sum()) / COUNTED
    assert kl == pytest.approx(1e-6 * truth.divergence(KEYS), rel=1e-2)


@pytest.mark.parametrize("name", PLANS)
def test_squares_taken_position_by_position_lack_the_cross_terms_of_the_divergence(
    name: str, truth: Truth, draws: dict[Key, Floats]
) -> None:
    series, products = sum(draws[key] for key in PLANS[name]), truth.products(PLANS[name])
    alone = 0.5 * float(np.trace(products)) / COUNTED
    assert_mean(position_by_position(series), alone)
    crossing = 0.5 * float(products.sum() - np.trace(products)) / COUNTED
    assert truth.divergence(PLANS[name]) == pytest.approx(alone + crossing)
    if all(layer == 1 for layer, _, _ in PLANS[name]):
        assert crossing == pytest.approx(0.0, abs=1e-9 * alone)  # nothing mixes positions after the last attention
    elif name in CROSSING:
        assert crossing > 0.1 * alone


def test_losses_of_tensors_added_up_lack_what_the_tensors_share(truth: Truth, draws: dict[Key, Floats]) -> None:
    """What is exact of four tensors is not the sum of what is exact of each; the coherent sum of effects knows."""
    whole, apart = truth.divergence(KEYS), sum(truth.divergence([key]) for key in KEYS)
    assert abs(whole - apart) > 0.05 * apart
    found = coherent(sum(draws.values())) - sum(coherent(draws[key]) for key in KEYS)
    error = float(found.std(ddof=1)) / math.sqrt(len(found))
    assert abs(float(found.mean()) - (whole - apart)) < 3.5 * error


def test_the_bias_at_the_chosen_bandwidth_is_what_the_cross_terms_beyond_it_say(
    truth: Truth, draws: dict[Key, Floats]
) -> None:
    bandwidth = bandwidth_of([list(draws[key][:64]) for key in KEYS])  # as of a text of 64 such sequences
    assert 1 < bandwidth < COUNTED
    for keys in PLANS.values():
        products = truth.products(keys)
        kept = 0.5 * float((bartlett(bandwidth) * products).sum()) / COUNTED
        beyond = 0.5 * float(((1 - bartlett(bandwidth)) * products).sum()) / COUNTED
        assert truth.divergence(keys) - kept == pytest.approx(beyond)
        assert_mean(windowed(bandwidth)(sum(draws[key] for key in keys)), kept)


def table(model: PreTrainedModel, ids: Tensor) -> str:
    """Return mean and relative standard deviation of each estimate of each plan."""
    exact = exactly(model, ids)
    parts = [drawn(model, ids, BATCH, seed) for seed in range(100, 132)]
    lines = [f"bandwidths chosen: {[bandwidth_of([list(part[key][:16]) for key in KEYS]) for part in parts]}"]
    for name, keys in PLANS.items():
        series = np.concatenate([sum(part[key] for key in keys) for part in parts])
        cells = []
        for estimate in (position_by_position, windowed(4), windowed(8), coherent):
            shares = estimate(series) / exact.divergence(keys)
            cells.append(f"{shares.mean():5.2f} +- {shares.std():4.2f}")
        lines.append(f"    {name:<22}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(precise(), text()))
