"""What does llama.cpp itself lose by a type of keys, and what by kvprof's quantizer of that type? On the demo model.

    python tests/benchmarks/bench_llama_cpp.py q4_0 q5_0        # needs llama-cpp-python, which compiles for a while

KL divergence in nats a token of one held-out sequence, from position 64: llama.cpp's own logits against those with its
cache in f16, with and without its rotation of keys and values; kvprof's against its own in full precision.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import llama_cpp
import numpy as np
import torch

from kvprof.allocate.target import WHOLE_CACHE
from kvprof.allocate.unscored import uniform_plan
from kvprof.calibration.sequences import tokenize
from kvprof.calibration.text import BUILTIN, open_text
from kvprof.evaluate.logits import planned_logits, reference_logits
from kvprof.metrics import token_kl
from kvprof.models.conversion import demo_gguf
from kvprof.models.inventory import take_inventory
from kvprof.models.load import load_model, load_tokenizer, resolve
from kvprof.records.formats import parse_formats

TOKENS, FIRST = 384, 64


def llama_logits(ids: Sequence[int], key_type: str, rotates: bool) -> torch.Tensor:
    """Return llama.cpp's logits, token by token, with keys of a type and values in f16."""
    os.environ["LLAMA_ATTN_ROT_DISABLE"] = "0" if rotates else "1"
    model = llama_cpp.Llama(
        str(demo_gguf()),
        n_ctx=len(ids) + 8,
        n_batch=1,
        n_ubatch=1,
        verbose=False,
        logits_all=True,
        flash_attn=True,
        type_k=getattr(llama_cpp, f"GGML_TYPE_{key_type.upper()}"),
        type_v=llama_cpp.GGML_TYPE_F16,
    )
    model.eval(list(ids))
    return torch.tensor(np.array(model.scores[: len(ids)]))[FIRST:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=["q4_0", "q5_0"])
    model = load_model(resolve("demo"), "float32", "cpu")
    inventory = take_inventory(model.config, "demo")
    text = tokenize(open_text(BUILTIN, "held-out"), load_tokenizer(resolve("demo")), 1, TOKENS, pack=True)
    ids = text.sequences[0]
    full, ours = llama_logits(ids, "f16", rotates=True), reference_logits(model, ids, FIRST)
    print(f"f16 against kvprof's float32: {token_kl(ours, full).mean():.4f} nats a token")
    for name in parser.parse_args().types:
        for rotates, suffix in ((True, "_rot_gguf"), (False, "_gguf")):
            plan = uniform_plan(
                parse_formats(f"key:{name}{suffix},value:full"), inventory.model, inventory.geometry, window=WHOLE_CACHE
            )
            measured = token_kl(full, llama_logits(ids, name, rotates)).mean()
            predicted = token_kl(ours, planned_logits(model, plan, ids, "fast", FIRST)).mean()
            how = "" if rotates else " without its rotation"
            print(f"{name}{how}: llama.cpp {measured:.4f}, kvprof {predicted:.4f}", flush=True)


if __name__ == "__main__":
    main()
