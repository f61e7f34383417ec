"""Measure what calibrating on one kind of text costs on others, and how many sequences a plan needs.

python tests/benchmarks/bench_text.py FOLDER [FILE ...]

Measures the demo model once on 64 sequences of the built-in text and 64 of its own, into FOLDER: stopped, it goes on
from there. Since scores keep each sequence's own losses, every mix of the two and every number of sequences is then a
choice of rows. Plans of 2.5 and 3 stored bits are made from each, and their KL measured on held-out text of both kinds
and on each FILE (rows are packed; texts.py writes some): 1,024 tokens of which the last 512 count. An hour on 2 cores.
Prints nothing that holds or does not, since it decides nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from kvprof import BitPlan, Scores
from kvprof.allocate.budget import bit_limit
from kvprof.allocate.rules import exact
from kvprof.calibration.mix import mix_texts
from kvprof.calibration.self_text import fill
from kvprof.evaluate.logits import planned_logits, reference_logits
from kvprof.evaluate.metrics import token_kl
from kvprof.models.load import load_model, load_tokenizer, resolve
from kvprof.profile.sensitivity import SensitivitySettings, run_sensitivity
from kvprof.records.formats import TENSORS
from kvprof.records.scores import LayerScores, TensorScores

BUDGETS = (2.5, 3)
MOST = 64
"""Sequences of each kind that are measured."""
TOKENS, FIRST, SEQUENCES = 1024, 512, 4
MIXES = {
    "16 builtin": (16, 0),
    "16 self": (0, 16),
    "2 + 2": (2, 2),
    "4 + 4": (4, 4),
    "8 + 8": (8, 8),
    "16 + 16": (16, 16),
    "32 + 32": (32, 32),
}
"""How many sequences of the built-in text and of the model's own a plan is made from."""


def main(folder: Path, files: Sequence[str]) -> int:
    source = resolve("demo")
    kinds = [measured(folder / data, data) for data in ("builtin", "self")]
    mixes = {name: of_sequences(kinds, numbers) for name, numbers in MIXES.items()}
    plans = {
        (budget, name): exact(scores, bit_limit(budget, "stored"))
        for budget in BUDGETS
        for name, scores in mixes.items()
    }
    model, tokenizer = load_model(source), load_tokenizer(source)
    assert kinds[0].model is not None
    fingerprint = str(kinds[0].model.fingerprint)
    print("KL, nats a token   bits" + "".join(f"{name:>12}" for name in MIXES))
    for data in ("builtin", "self", *files):
        split = "held-out" if data in ("builtin", "self") else None
        mixed = mix_texts([data], split, tokenizer, SEQUENCES, TOKENS, pack=True)
        text = fill(mixed, model, tokenizer, fingerprint)
        kl: dict[tuple[float, str], list[float]] = {key: [] for key in plans}
        for ids in text.sequences:
            reference = reference_logits(model, ids, FIRST)
            done: dict[str, float] = {}  # small mixes may make the same plan
            for key, plan in plans.items():
                if plan.recipe not in done:
                    done[plan.recipe] = float(token_kl(reference, planned(model, plan, ids)).mean())
                kl[key].append(done[plan.recipe])
        for budget in BUDGETS:
            numbers = (fmean(kl[budget, name]) for name in MIXES)
            print(f"{Path(data).stem:<18}{budget:5g}" + "".join(f"{number:12.5f}" for number in numbers), flush=True)
    return 0


def measured(folder: Path, data: str) -> Scores:
    """Return the scores of one kind of text, measured now or before."""
    if not (folder / "gradients.json").exists():
        print(f"measuring {MOST} sequences of {data} into {folder}", file=sys.stderr)
        run_sensitivity(resolve("demo"), SensitivitySettings(data=(data,), sequences=MOST), folder)
    return Scores.load(folder / "gradients.json")


def of_sequences(kinds: Sequence[Scores], numbers: Sequence[int]) -> Scores:
    """Return scores of the first sequences of each kind, as if only these had been measured."""

    def tensor(layer: int, name: str) -> TensorScores:
        found = [scores.layers[layer].tensor(name).loss_increase_samples for scores in kinds]
        rows = {
            form: [loss for losses, number in zip(found, numbers, strict=True) for loss in losses[form][:number]]
            for form in found[0]
        }
        return TensorScores(loss_increase={form: fmean(losses) for form, losses in rows.items()})

    layers = tuple(
        LayerScores(layer=entry.layer, **{name: tensor(entry.layer, name) for name in TENSORS})
        for entry in kinds[0].layers
    )
    return Scores(model=kinds[0].model, geometry=kinds[0].geometry, decoding=kinds[0].decoding, layers=layers)


def planned(model: object, plan: BitPlan, ids: Sequence[int]) -> object:
    return planned_logits(model, plan, ids, "fast", FIRST)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
