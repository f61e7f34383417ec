"""Time a token decoded through PlanCache against DynamicCache, behind 2,000 tokens of context on the demo model.

python tests/benchmarks/bench_decode.py

Two plans of 2.5 nominal bits: keys of 2 bits and values of 3 in groups of 32 (3.5 stored), and the same with rotated
values. Each cache decodes the same tokens one by one; the contexts grow by as many tokens as are timed. On one thread,
where processor time is what the clock shows on an idle machine; rounds are interleaved. The ratio is that of the
medians; minima stand beside them. The exit status is 1 where a claim does not hold.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from kvprof.calibration.sequences import tokenize
from kvprof.calibration.text import open_text
from kvprof.models.inventory import take_inventory
from kvprof.models.load import load_model, load_tokenizer, resolve
from kvprof.records.plan import BitPlan
from kvprof.runtime import PlanCache

QUICK = "--quick" in sys.argv  # a look whether it runs: too few tokens for the claim
CONTEXT = 300 if QUICK else 2000
TOKENS = 4 if QUICK else 40
TIMES_DYNAMIC = 2.5

KEYS = {"bits": 2, "group_size": 32, "axis": "channel"}
VALUES = {
    "int3g32": {"bits": 3, "group_size": 32, "axis": "token"},
    "rot3": {"scheme": "rotated", "bits": 3, "group_size": 64, "axis": "token"},
}


def main() -> int:
    torch.set_num_threads(1)
    source = resolve("demo")
    model = load_model(source, "float32", "cpu")
    text = tokenize(open_text(split="held-out"), load_tokenizer(source), 1, CONTEXT + TOKENS, pack=True)
    ids = torch.tensor(text.sequences[0])[None]
    caches: dict[str, Cache] = {"DynamicCache": DynamicCache(config=model.config)}
    for name, values in VALUES.items():
        caches[f"PlanCache, K int2g32, V {name}"] = PlanCache.from_plan(plan(model, values), model)
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    with torch.inference_mode():
        for cache in caches.values():
            for block in torch.split(ids[:, :CONTEXT], 500, dim=1):
                model(block, past_key_values=cache, logits_to_keep=1)
        for position in range(CONTEXT, CONTEXT + TOKENS):
            for name, cache in caches.items():
                start = time.process_time()
                model(ids[:, position : position + 1], past_key_values=cache)
                seconds[name].append(time.process_time() - start)

    theirs = statistics.median(seconds["DynamicCache"])
    print(f"{f'demo model, {CONTEXT} tokens of context':<36}{'median s':>10}{'least s':>9}{'times DynamicCache':>20}")
    holds = True
    for name, taken in seconds.items():
        print(f"{name:<36}{statistics.median(taken):10.4f}{min(taken):9.4f}{statistics.median(taken) / theirs:20.2f}")
    for name in list(caches)[1:]:
        ratio = statistics.median(seconds[name]) / theirs
        holds = holds and ratio <= TIMES_DYNAMIC
        verdict = "holds" if ratio <= TIMES_DYNAMIC else "does not hold"
        print(f"{name}: at most {TIMES_DYNAMIC} times DynamicCache a token: {ratio:.2f} - {verdict}")
    return 0 if holds else 1


def plan(model: PreTrainedModel, values: dict[str, object]) -> BitPlan:
    """The same formats in every layer, 4 sinks and a window of 128 tokens."""
    layers = range(take_inventory(model.config).geometry.num_layers)
    return BitPlan.model_validate(
        {
            "schema": "kvprof.plan/1",
            "model": {"num_layers": len(layers)},
            "quantizer": {},
            "window": {"sink_tokens": 4, "recent_tokens": 128},
            "layers": [{"layer": layer, "key": KEYS, "value": values} for layer in layers],
        }
    )


if __name__ == "__main__":
    sys.exit(main())
