"""Are KL, agreement and likelihood those of SciPy in float64, whatever the dtype and however the tokens are cut?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from torch import Tensor

from kvprof import metrics
from kvprof.metrics import token_kl, token_nll, top1_agreement


def logits(tokens: int = 37, vocabulary: int = 501, apart: float = 0.5) -> tuple[Tensor, Tensor]:
    """Two predictions as a model makes them, offsets and a long tail included."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * 4 + 15
    return reference, reference + apart * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)


def true_kl(reference: Tensor, planned: Tensor) -> np.ndarray:
    p, q = (np.exp(log_softmax(x.double().numpy(), axis=-1)) for x in (reference, planned))
    return rel_entr(p, q).sum(-1)


@pytest.mark.parametrize("apart", [3.0, 0.5, 0.01])
def test_kl_is_scipys(apart: float) -> None:
    reference, planned = logits(apart=apart)
    assert token_kl(reference, planned).numpy() == pytest.approx(true_kl(reference, planned), rel=1e-9)
    single = token_kl(reference.float(), planned.float())
    assert single.dtype == torch.float64
    assert single.numpy() == pytest.approx(true_kl(reference.float(), planned.float()), rel=1e-3, abs=1e-7)


def test_half_precision_logits_are_compared_in_single() -> None:
    reference, planned = (x.bfloat16() for x in logits(apart=1.0))
    assert token_kl(reference, planned).numpy() == pytest.approx(true_kl(reference, planned), rel=1e-4)


def test_a_tiny_kl_is_not_lost_in_the_rounding_of_the_normalisers() -> None:
    reference, planned = (x.float() for x in logits(apart=1e-4, vocabulary=20_000))
    found, true = token_kl(reference, planned), true_kl(reference, planned)
    assert true.max() < 1e-7
    assert np.abs(found.numpy() - true).max() < 1e-10  # the plain sum of p log(p/q) is off by 5e-7


def test_equal_logits_have_no_kl_and_a_shift_changes_none() -> None:
    reference, planned = (x.float() for x in logits())
    assert token_kl(reference, reference).max() == 0.0
    assert torch.allclose(token_kl(reference + 3, planned - 5), token_kl(reference, planned), atol=1e-5)


def test_a_token_that_one_side_rules_out_gives_no_nan() -> None:
    reference = torch.tensor([[0.0, -200.0, 0.0], [0.0, -torch.inf, 0.0]])
    planned = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert token_kl(reference, planned).tolist() == pytest.approx([np.log(1.5)] * 2, rel=1e-6)
    assert token_kl(planned, reference)[1] == torch.inf


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_show(wrong: float) -> None:
    reference, planned = logits(tokens=3)
    planned[1, 7] = wrong
    kl = token_kl(reference, planned)
    assert kl.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_logits_of_every_size_have_no_kl_to_themselves_and_never_less(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for size in (0.0, 1e-40, 1e-6, 1.0, 30.0, 90.0, 1e4, 6e4, 1e20, 1e37):
        if size > torch.finfo(dtype).max:
            continue
        one, noise = torch.randn(2, 40, 97, generator=generator, dtype=torch.float64).clamp_(-1, 1)
        reference, planned = (one * size).to(dtype), ((one + 1e-3 * noise).clamp(-1, 1) * size).to(dtype)
        for same in (reference, reference.masked_fill(noise > 0.5, -torch.inf)):
            assert token_kl(same, same.clone()).tolist() == [0.0] * 40
        found = token_kl(reference, planned)
        assert bool((found >= 0).all())
        log_p, log_q = (log_softmax(x.double().numpy(), axis=-1) for x in (reference, planned))
        true = (np.exp(log_p) * (log_p - log_q)).sum(-1)
        assert found.numpy() == pytest.approx(true, rel=1e-3, abs=1e-7)


def test_agreement_is_of_the_likeliest_token() -> None:
    reference = torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    planned = torch.tensor([[0.0, 9.0, 8.0], [0.0, 0.1, 0.0], [0.0, 0.0, 1.0]])
    assert top1_agreement(reference, planned).tolist() == [True, False, True]


def test_likelihood_is_scipys() -> None:
    planned, _ = logits()
    targets = torch.arange(37) * 7
    true = -log_softmax(planned.numpy(), axis=-1)[np.arange(37), targets.numpy()]
    assert token_nll(planned, targets).numpy() == pytest.approx(true, rel=1e-12)
    assert token_nll(planned.float(), targets).numpy() == pytest.approx(true, rel=1e-5)


@pytest.mark.parametrize("elements", [1, 501 * 5, 10**9])
def test_the_number_of_tokens_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    reference, planned = logits()
    targets = torch.arange(37)
    expected = token_kl(reference, planned), token_nll(planned, targets)
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", elements)
    assert torch.equal(token_kl(reference, planned), expected[0])
    assert torch.equal(token_nll(planned, targets), expected[1])
