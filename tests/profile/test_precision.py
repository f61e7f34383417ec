"""Scores of a model in half precision are those of the same model in float32, up to what rounding its weights means."""

from __future__ import annotations

import pytest
import torch

from kvprof.calibration.sequences import CalibrationSet, tokenize
from kvprof.calibration.text import open_text
from kvprof.models.inventory import take_inventory
from kvprof.models.load import load_model, load_tokenizer, resolve
from kvprof.profile.decoder import Decoder, formats_of
from kvprof.profile.scoring import measure_sensitivity
from kvprof.records.plan import Window
from kvprof.records.scores import Scores

DECODER = Decoder(
    {"key": ("int2g32", "int3g32", "rot3"), "value": ("int2g32", "rot2")}, Window(sink_tokens=4, recent_tokens=32)
)


def scores_of(dtype: str, text: CalibrationSet) -> Scores:
    model = load_model(resolve("demo"), dtype, "cpu")
    inventory = take_inventory(model.config)
    return measure_sensitivity(model, text, inventory, formats_of(inventory.geometry, DECODER), DECODER)


@pytest.mark.demo
def test_scores_in_bfloat16_are_within_five_in_a_hundred_of_float32() -> None:
    text = tokenize(open_text("builtin"), load_tokenizer(resolve("demo")), 2, 256, pack=True)
    whole, half = (scores_of(dtype, text) for dtype in ("float32", "bfloat16"))
    pairs = [
        (getattr(layer, tensor), getattr(other, tensor))
        for layer, other in zip(whole.layers, half.layers, strict=True)
        for tensor in ("key", "value")
    ]
    norms = torch.tensor([found.gradient_norm / expected.gradient_norm - 1 for expected, found in pairs])
    assert norms.abs().max() < 0.05
    # A loss is a sample of rounding errors, and few tokens make few samples: single ones may differ by more.
    losses = torch.tensor(
        [
            found.loss_increase[name] / loss - 1
            for expected, found in pairs
            for name, loss in expected.loss_increase.items()
        ]
    )
    assert losses.abs().median() < 0.05
