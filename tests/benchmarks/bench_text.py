"""Measure what calibrating on one kind of text costs on others, and how many sequences of which length a plan needs.

python tests/benchmarks/bench_text.py FOLDER [FILE ...]

Measures the demo model once on sequences of the built-in text and of its own, of 512 and of 1,024 tokens, into FOLDER:
stopped, it goes on from there. Since scores keep each sequence's own effects, every mix of the two and every number of
sequences is then a choice of rows. Plans of 2.5 and 3 stored bits are made from each, and their KL measured on held-out
text of both kinds and on each FILE (rows are packed; texts.py writes some): 1,024 tokens of which the last 512 count.
An hour on two cores. Prints nothing that holds or does not, since it decides nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from kvprof import BitPlan, Scores
from kvprof.allocate.budget import bit_limit
from kvprof.allocate.methods import exact
from kvprof.calibration.mixture import TextRequest, mix_texts
from kvprof.calibration.self_generated import fill
from kvprof.evaluate.logits import planned_logits, reference_logits
from kvprof.metrics import token_kl
from kvprof.models.load import load_model, load_tokenizer, resolve
from kvprof.profile.sensitivity import run_sensitivity
from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.requests.measure import GradientsRequest
from kvprof.records.sampled import TensorSamples, gradient_scores
from kvprof.records.scores import CalibrationInfo

BUDGETS = (2.5, 3)
KINDS = ("builtin", "self")
MEASURED = {512: 32, 1024: 8}
"""Sequences of each kind that are measured, of so many tokens."""
MIXES = {
    "8 b": (1024, 8, 0),
    "8 s": (1024, 0, 8),
    "2b + 2s": (1024, 2, 2),
    "4b + 4s": (1024, 4, 4),
    "8b + 8s": (1024, 8, 8),
    "8b + 8s, 512": (512, 8, 8),
    "32b + 32s, 512": (512, 32, 32),
}
"""Of which length, and how many sequences of the built-in text and of the model's own, a plan is made from."""
TOKENS, FIRST, SEQUENCES = 1024, 512, 6


def main(folder: Path, files: Sequence[str]) -> int:
    source = resolve("demo")
    kinds = {
        length: [measured(folder / f"{data}-{length}", data, length, number) for data in KINDS]
        for length, number in MEASURED.items()
    }
    mixes = {name: of_sequences(kinds[length], numbers) for name, (length, *numbers) in MIXES.items()}
    plans = {
        (budget, name): exact(scores, bit_limit(budget, "stored"))
        for budget in BUDGETS
        for name, scores in mixes.items()
    }
    fingerprint = str(next(iter(mixes.values())).model.fingerprint)
    model, tokenizer = load_model(source), load_tokenizer(source)
    print("KL, nats a token   bits" + "".join(f"{name:>16}" for name in MIXES))
    for data in (*KINDS, *files):
        split = "held-out" if data in KINDS else None
        mixed = mix_texts(TextRequest([data], SEQUENCES, TOKENS, split=split, pack=True), tokenizer)
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
            print(f"{Path(data).stem:<18}{budget:5g}" + "".join(f"{number:16.5f}" for number in numbers), flush=True)
    return 0


def measured(folder: Path, data: str, length: int, number: int) -> Scores:
    """Return the scores of one kind of text, measured now or before."""
    if not (folder / "gradients.json").exists():
        print(f"measuring {number} sequences of {data} into {folder}", file=sys.stderr)
        settings = GradientsRequest(data=(data,), sequences=number, sequence_length=length)
        run_sensitivity(resolve("demo"), settings, folder)
    return Scores.load(folder / "gradients.json")


def of_sequences(kinds: Sequence[Scores], numbers: Sequence[int]) -> Scores:
    """Return scores of the first sequences of each kind, as if only these had been measured."""
    (block_tokens,) = {scores.effects.block_tokens for scores in kinds}
    taken = list(zip(kinds, numbers, strict=True))

    def samples(layer: int, name: TensorName) -> TensorSamples:
        found = [(scores.layers[layer].tensor(name), number) for scores, number in taken]
        return TensorSamples(
            [own.gradient_norm for own, number in found for _ in range(number)],  # plans here are made by losses
            {
                form: [text for own, number in found for text in own.loss_effects[form][:number]]
                for form in found[0][0].loss_effects
            },
        )

    example = kinds[0]
    counted = [tokens for scores, number in taken for tokens in scores.effects.tokens[:number]]
    text = CalibrationInfo(
        dataset="a mix",
        sequences=len(counted),
        sequence_length=example.calibration.sequence_length,
        tokens=sum(counted),
        seed=0,
    )
    every = {
        (entry.layer, name): samples(place, name) for place, entry in enumerate(example.layers) for name in TENSORS
    }
    return gradient_scores(every, text, example.model, example.geometry, example.decoding, block_tokens, counted)


def planned(model: object, plan: BitPlan, ids: Sequence[int]) -> object:
    return planned_logits(model, plan, ids, "fast", FIRST)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
