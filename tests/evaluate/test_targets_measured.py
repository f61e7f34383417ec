"""Plans within llama.cpp's and ik_llama.cpp's grammars are as good, measured, as any pair of no more bytes."""

from __future__ import annotations

import itertools
from fractions import Fraction
from statistics import fmean

import pytest
from requested import allocate

from kvprof import BitPlan, Scores
from kvprof.allocate.methods import uniform
from kvprof.allocate.target import WHOLE_CACHE
from kvprof.allocate.unscored import uniform_plan
from kvprof.calibration.sequences import CalibrationSet, tokenize
from kvprof.calibration.text import open_text
from kvprof.evaluate.logits import planned_logits, reference_logits
from kvprof.metrics import token_kl
from kvprof.models.inventory import take_inventory
from kvprof.models.load import load_model, load_tokenizer, resolve
from kvprof.profile.decoder import Decoder, formats_of
from kvprof.profile.scoring import measure_sensitivity
from kvprof.records.formats import TENSORS, format_named, parse_formats
from kvprof.targets.registry import TARGETS

BUDGET = 5
TOKENS, FIRST = 384, 128
NOISE = 1.1
"""Two pairs of which one is predicted to lose a tenth less can hardly be told apart by a few sequences of this length:
q5_0/iq4_nl was predicted at 0.92 of q5_0/q4_0, and measured at 1.05 of it. Of three sequences to score and two to
measure, ik_llama.cpp's plan lost 1.10 of what a pair did; five and four tell them apart."""


def text_of(split: str, sequences: int) -> CalibrationSet:
    return tokenize(open_text("builtin", split), load_tokenizer(resolve("demo")), sequences, TOKENS, pack=True)


@pytest.mark.demo
def test_plans_within_a_grammar_lose_no_more_than_any_global_pair_of_no_more_bytes() -> None:
    model = load_model(resolve("demo"), "float32", "cpu")
    inventory = take_inventory(model.config)
    targets = {
        name: TARGETS[name].for_model(inventory.geometry, inventory.model.architecture)
        for name in ("llama.cpp", "ik_llama.cpp")
    }
    names = {
        tensor: tuple({one: None for target in targets.values() for one in target.formats_of(tensor) if one != "full"})
        for tensor in TENSORS
    }
    decoder = Decoder(names, TARGETS["llama.cpp"].window)
    scores: Scores = measure_sensitivity(
        model, text_of("calibration", 5), inventory, formats_of(inventory.geometry, decoder), decoder
    )
    held_out = text_of("held-out", 4).sequences
    references = [reference_logits(model, ids, FIRST) for ids in held_out]
    measured: dict[str, float] = {}

    def kl_of(plan: BitPlan) -> float:
        if plan.recipe not in measured:
            measured[plan.recipe] = fmean(
                float(token_kl(reference, planned_logits(model, plan, ids, "fast", FIRST)).mean())
                for ids, reference in zip(held_out, references, strict=True)
            )
        return measured[plan.recipe]

    every = {*names["key"], *names["value"]}
    stored: dict[str, Fraction] = {name: format_named(name, "key", 64).stored_bits(64) for name in every}
    for target, told in targets.items():
        known = [[name for name in told.formats_of(tensor) if name != "full"] for tensor in TENSORS]
        plan = allocate(scores, target=TARGETS[target], budget=BUDGET)
        assert plan.budget is not None
        assert plan.budget.stored_bits <= BUDGET
        pairs = [
            (key, value)
            for key, value in itertools.product(*known)
            if stored[key] + stored[value] <= 2 * Fraction(plan.budget.stored_bits)
        ]
        assert len(pairs) >= 5
        for key, value in pairs:
            rival = kl_of(uniform(scores, key, value, window=plan.window))
            assert kl_of(plan) <= NOISE * rival, (target, key, value)


IN_LLAMA_CPP = {"q4_0_rot_gguf": 0.055, "q4_0_gguf": 0.159, "q5_0_rot_gguf": 0.014, "q5_0_gguf": 0.050}
"""KL in nats a token that tests/benchmarks/bench_llama_cpp.py measured inside llama.cpp (llama-cpp-python 0.3.36): keys
alone quantized, with its rotation and, `LLAMA_ATTN_ROT_DISABLE=1`, without."""


@pytest.mark.demo
def test_what_is_evaluated_of_llama_cpps_keys_is_what_llama_cpp_itself_loses() -> None:
    model = load_model(resolve("demo"), "float32", "cpu")
    inventory = take_inventory(model.config, "demo")
    (ids,) = text_of("held-out", 1).sequences
    reference = reference_logits(model, ids, 64)
    for name, measured in IN_LLAMA_CPP.items():
        plan = uniform_plan(
            parse_formats(f"key:{name},value:full"), inventory.model, inventory.geometry, window=WHOLE_CACHE
        )
        found = float(token_kl(reference, planned_logits(model, plan, ids, "fast", 64)).mean())
        assert 0.75 < found / measured < 1.33, name
