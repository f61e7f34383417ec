"""Scores of a model in half precision are those of the same model in float32, up to what rounding it means."""

from __future__ import annotations

import pytest
import torch

from kvprof.calibration.sequences import batches, tokenize
from kvprof.calibration.text import open_text
from kvprof.models.inventory import take_inventory
from kvprof.models.load import load_model, load_tokenizer, resolve
from kvprof.profile.gradients import gradient_norms

SEQUENCES, TOKENS = 4, 128


def mean_norms(dtype: str) -> torch.Tensor:
    """Return the gradient norms of every tensor of the demo model, means over sequences of the built-in text."""
    model = load_model(resolve("demo"), dtype, "cpu")
    text = tokenize(open_text("builtin"), load_tokenizer(resolve("demo")), SEQUENCES, TOKENS, pack=True)
    geometry = take_inventory(model.config).geometry
    norms = [row for batch in batches(text.sequences, 1) for row in gradient_norms(model, geometry, batch).values()]
    return torch.tensor(norms).mean(0)


@pytest.mark.demo
def test_bfloat16_moves_no_gradient_norm_by_five_in_a_hundred() -> None:
    assert (mean_norms("bfloat16") / mean_norms("float32") - 1).abs().max() < 0.05
