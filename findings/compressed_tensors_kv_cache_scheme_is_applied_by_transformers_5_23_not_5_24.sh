#!/usr/bin/env bash
# compressed-tensors 0.20.1: a checkpoint's kv_cache_scheme is applied under transformers 5.23.0, and is not under 5.24.0.
#
# Two guesses would be wrong. One: the scheme is a note for serving engines, which transformers passes over. Under 5.23 the
# keys and values that a DynamicCache holds are rounded to the checkpoint's scales (in the model's dtype: no memory saved),
# so that a run that was meant as the unquantized reference has a quantized cache already. Two: a minor release of
# transformers changes no numbers. compressed-tensors finds attention by a parameter named past_key_values, which 5.24 names
# cache. Nothing is raised; the scales stand in the table of unexpected weights, and the quality that one measures is that of
# a full cache. compressed-tensors 0.20.1 asks for transformers>=4.45.0, with no upper bound.
#
# Measured: distinct numbers among the 6,144 keys of each of 2 layers, as the cache holds them, of a checkpoint with an int8
# scheme. Seen (torch 2.13.0, CPU, float32): 226 and 211 under 5.23.0; 6,144 and 6,143 under 5.24.0. Fails unless they are
# at most 255 under 5.23.0 and more than 5,000 under 5.24.0.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
cat > "$work/count.py" <<'P'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, __version__

torch.manual_seed(0)
sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 256}
config = LlamaConfig(num_hidden_layers=2, **sizes)
ids = torch.randint(256, (1, 24))


@torch.no_grad()
def cached(model):
    cache = DynamicCache(config=model.config)
    model.eval()(ids, past_key_values=cache)
    return cache.layers


plain = LlamaForCausalLM(config)
folder = Path(sys.argv[1])
plain.save_pretrained(folder)
weights = load_file(folder / "model.safetensors")
for i, layer in enumerate(cached(plain)):
    weights[f"model.layers.{i}.self_attn.k_scale"] = (layer.keys.abs().max() / 127).reshape(1)
    weights[f"model.layers.{i}.self_attn.v_scale"] = (layer.values.abs().max() / 127).reshape(1)
save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
settings = json.loads((folder / "config.json").read_text())
settings["quantization_config"] = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "quantization_status": "compressed",
    "config_groups": {},
    "kv_cache_scheme": {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False},
}
(folder / "config.json").write_text(json.dumps(settings))
found = [len(layer.keys.unique()) for layer in cached(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))]
print(f"transformers {__version__}: {found[0]} and {found[1]} distinct numbers among {plain.config.head_dim * 4 * 24} keys")
raise SystemExit(0 if (max(found) <= 255 if sys.argv[2] == "applied" else min(found) > 5000) else 1)
P
for pair in 5.23.0:applied 5.24.0:not; do
    "$work/venv/bin/pip" install -q --no-compile torch==2.13.0 "transformers==${pair%:*}" accelerate==1.14.0 \
        compressed-tensors==0.20.1
    "$work/venv/bin/python" "$work/count.py" "$work/model-${pair#*:}" "${pair#*:}"
done
