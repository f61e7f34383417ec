"""Measure what calibrating on one kind of text costs on others, and what a mix costs anywhere.

python tests/benchmarks/bench_text.py [FILE ...]

Plans of the demo model at 3 stored bits, made from 16 sequences of the built-in text, of its own text, and of both;
their KL on held-out text of both kinds and on each file named (.txt, .jsonl ...; rows are packed), 1,024 tokens of
which the last 512 count. Takes half an hour; prints nothing that holds or does not, since it decides nothing.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import fmean

from kvprof.allocate.budget import bit_limit
from kvprof.allocate.rules import exact
from kvprof.calibration.mix import mix_texts
from kvprof.calibration.self_text import fill
from kvprof.evaluate.logits import planned_logits, reference_logits
from kvprof.evaluate.metrics import token_kl
from kvprof.models.load import load_model, load_tokenizer, resolve
from kvprof.profile.sensitivity import SensitivitySettings, run_sensitivity

MIXES = (("builtin",), ("self",), ("builtin", "self"))
BUDGET = 3
TOKENS, FIRST, SEQUENCES = 1024, 512, 2


def main(files: list[str]) -> int:
    source = resolve("demo")
    plans, fingerprint = {}, ""
    for mix in MIXES:
        with tempfile.TemporaryDirectory() as folder:
            scores = run_sensitivity(source, SensitivitySettings(data=mix), Path(folder)).scores
        assert scores.model is not None
        fingerprint = str(scores.model.fingerprint)
        plans["+".join(mix)] = exact(scores, bit_limit(BUDGET, "stored"))
        print(f"planned from {'+'.join(mix)}", file=sys.stderr)
    model, tokenizer = load_model(source), load_tokenizer(source)
    print(f"{'KL in nats a token, on':<32}" + "".join(f"{name:>14}" for name in plans))
    for data in ("builtin", "self", *files):
        split = "held-out" if data in ("builtin", "self") else None
        mixed = mix_texts([data], split, tokenizer, SEQUENCES, TOKENS, pack=True)
        text = fill(mixed, model, tokenizer, fingerprint)
        kl: dict[str, list[float]] = {name: [] for name in plans}
        for ids in text.sequences:
            reference = reference_logits(model, ids, FIRST)
            for name, plan in plans.items():
                kl[name].append(float(token_kl(reference, planned_logits(model, plan, ids, "fast", FIRST)).mean()))
        print(f"{Path(data).name:<32}" + "".join(f"{fmean(numbers):14.5f}" for numbers in kl.values()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
