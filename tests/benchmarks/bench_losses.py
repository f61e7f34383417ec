"""Time the predicted losses of all usual formats against a plain forward and backward of the same tokens.

python tests/benchmarks/bench_losses.py

On the demo model, one sequence of 1,024 tokens: 15 formats of keys, 10 of values, in 30 layers. The plain backward
leads to the activations alone, as there no weight asks for a gradient. On one thread, where processor time is what the
clock shows on an idle machine; minima of interleaved rounds. The exit status is 1 where the claim does not hold.
"""

from __future__ import annotations

import functools
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from kvprof.calibration.sequences import Batch, batches, tokenize
from kvprof.calibration.text import open_text
from kvprof.models.inventory import take_inventory
from kvprof.models.load import load_model, load_tokenizer, resolve
from kvprof.profile import loss_increase as losses
from kvprof.profile.decoder import usual_formats
from kvprof.profile.loss_increase import loss_effects
from kvprof.records.plan import USUAL_WINDOW, Quantizer
from kvprof.runtime.attention import reference as attention

QUICK = "--quick" in sys.argv  # a look whether it runs: too few tokens for the claim
TOKENS = 64 if QUICK else 1024
ROUNDS = 1 if QUICK else 2
TIMES_PLAIN = 3

spent: Counter[str] = Counter()


def main() -> int:
    torch.set_num_threads(1)
    source = resolve("demo")
    model = load_model(source, "float32", "cpu")
    text = tokenize(open_text(), load_tokenizer(source), 1, TOKENS)
    (batch,) = batches(text.sequences, 1)
    formats = {
        (layer.layer, tensor): usual_formats(layer, tensor)
        for layer in take_inventory(model.config).geometry.planned
        for tensor in ("key", "value")
    }
    attention.fake_quantize = watched("rounding", attention.fake_quantize)
    losses.format_effects = watched("effects of formats", losses.format_effects)
    losses._sampled_labels = watched("drawing labels", losses._sampled_labels)

    ours, plain, parts = [], [], Counter[str]()
    for _ in range(ROUNDS):
        spent.clear()
        ours.append(timed(lambda: loss_effects(model, batch, formats, USUAL_WINDOW, Quantizer(), 0.5, seed=0)))
        if ours[-1] == min(ours):
            parts = Counter(spent)
        plain.append(timed(lambda: forward_and_backward(model, batch)))
    parts["effects of formats"] -= parts["rounding"]  # which it calls
    parts["forward and backward, and the rest"] = min(ours) - parts.total()

    number = sum(map(len, formats.values()))
    print(f"demo model, {TOKENS} tokens, {number} pairs of a tensor and a format{'seconds':>12}{'times plain':>14}")
    for name, seconds in [("plain forward and backward", min(plain)), ("predicted losses", min(ours)), *parts.items()]:
        indent = "  " if name in parts else ""
        print(f"{indent + name:<58}{seconds:9.2f}{seconds / min(plain):14.2f}")
    times = min(ours) / min(plain)
    claim = f"at most {TIMES_PLAIN} times a plain forward and backward: {times:.2f}"
    print(f"{claim} - {'holds' if times <= TIMES_PLAIN else 'does not hold'}")
    return 0 if times <= TIMES_PLAIN else 1


def forward_and_backward(model: torch.nn.Module, batch: Batch) -> None:
    handle = model.get_input_embeddings().register_forward_hook(lambda *call: call[2].requires_grad_(True))
    try:
        model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss.backward()
    finally:
        handle.remove()


def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, counting the time spent in it."""

    @functools.wraps(function)
    def timing(*arguments: Any, **options: Any) -> Any:
        start = time.process_time()
        try:
            return function(*arguments, **options)
        finally:
            spent[name] += time.process_time() - start

    return timing


def timed(method: Callable[[], object]) -> float:
    start = time.process_time()
    method()
    return time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
