"""Time one sequence's gradients of the demo model against a bare PyTorch loop and against one backward a matrix.

python tests/benchmarks/bench_gradients.py

The bare loop asks autograd for the K and V weights' gradients in one forward and backward. The per-layer procedure runs
for each of 30 layers, one forward and a backward for W_k and for W_v alone. On one thread, where processor time is what
the clock shows on an idle machine; minima of interleaved rounds. The exit status is 1 where a claim does not hold.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from kvprof.calibration.sequences import Batch, batches, tokenize
from kvprof.calibration.text import open_text
from kvprof.models.inventory import take_inventory
from kvprof.models.load import load_model, load_tokenizer, resolve
from kvprof.profile.gradients import gradient_norms

QUICK = "--quick" in sys.argv  # a look whether it runs: too few tokens for the claims
TOKENS = 16 if QUICK else 128
ROUNDS = 2 if QUICK else 8
LAYER_ROUNDS = 1
TIMES_BARE = 1.15
TIMES_FASTER = 30


def main() -> int:
    torch.set_num_threads(1)
    source = resolve("demo")
    model = load_model(source, "float32", "cpu")
    geometry = take_inventory(model.config).geometry
    text = tokenize(open_text(), load_tokenizer(source), 1, TOKENS)
    (batch,) = batches(text.sequences, 1)
    weights = [(layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight) for layer in model.model.layers]

    def kvprof() -> list[tuple[float, float]]:
        return gradient_norms(model, geometry, batch)[0]

    def bare() -> list[tuple[float, float]]:
        for pair in weights:
            for weight in pair:
                weight.requires_grad_(True)
        loss_of(model, batch).backward()
        norms = [(float(key.grad.norm()), float(value.grad.norm())) for key, value in weights]
        for pair in weights:
            for weight in pair:
                weight.grad = None
                weight.requires_grad_(False)
        return norms

    def one_layer(index: int) -> tuple[float, float]:
        for weight in weights[index]:
            weight.requires_grad_(True)
        loss = loss_of(model, batch)
        gradients = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for weight in weights[index]]
        for weight in weights[index]:
            weight.requires_grad_(False)
        return float(gradients[0].norm()), float(gradients[1].norm())

    expected = bare()
    error = max(
        abs(found / true - 1)
        for found_pair, true_pair in zip(kvprof(), expected, strict=True)
        for found, true in zip(found_pair, true_pair, strict=True)
    )
    ours, theirs = [], []
    per_layer = [float("inf")] * len(weights)
    for number in range(ROUNDS):
        pair = [(ours, kvprof), (theirs, bare)]
        for seconds, method in pair if number % 2 else pair[::-1]:
            seconds.append(timed(method))
        # A share of the layers between the rounds, so that all three see the same machine.
        for index in range(number, len(weights), ROUNDS):
            for _ in range(LAYER_ROUNDS):
                per_layer[index] = min(per_layer[index], timed(lambda index=index: one_layer(index)))

    fastest, layers = min(ours), sum(per_layer)
    print(f"{'demo model, ' + str(TOKENS) + ' tokens':<34}{'seconds':>9}{'times kvprof':>14}")
    for name, seconds in (("kvprof", fastest), ("bare loop", min(theirs)), ("one backward a matrix, 60", layers)):
        print(f"{name:<34}{seconds:9.3f}{seconds / fastest:14.2f}")
    print(f"largest relative difference of a norm from the bare loop's: {error:.1e}")
    claims = {
        f"at most {TIMES_BARE} times the bare loop: {fastest / min(theirs):.3f}": fastest <= TIMES_BARE * min(theirs),
        f"at least {TIMES_FASTER} times faster than layer by layer: {layers / fastest:.1f}": layers
        >= TIMES_FASTER * fastest,
    }
    for claim, holds in claims.items():
        print(f"{claim} - {'holds' if holds else 'does not hold'}")
    return 0 if all(claims.values()) else 1


def loss_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss


def timed(method: Callable[[], object]) -> float:
    start = time.process_time()
    method()
    return time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
