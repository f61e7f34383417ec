"""On the demo model: do predicted losses rank tensors, tell how much is lost, and make plans that nothing plain beats?

By the scores of the quickstart, which are the defaults; the bounds are those of independent measurements, with room.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest
from quickstart import Quickstart
from requested import allocate
from scipy.stats import spearmanr

from kvprof import BitPlan, Scores
from kvprof.evaluate.evaluation import run_evaluation
from kvprof.models.load import resolve
from kvprof.profile.divergence import run_divergence
from kvprof.records.requests.check import EvaluateRequest
from kvprof.records.requests.measure import DivergenceRequest

pytestmark = pytest.mark.demo

LAYERS = "0,1,7,11,13,16,18,20,22,27"
"""Of which some hardly matter, and some by a thousand times more."""


@pytest.fixture(scope="module")
def scores(quickstart: Quickstart) -> Scores:
    return Scores.load(quickstart.folder / "gradients.json")


def test_predicted_losses_rank_tensors_as_they_are_measured_and_tell_their_size(scores: Scores, tmp_path: Path) -> None:
    measured = run_divergence(resolve("demo"), DivergenceRequest(layers=LAYERS, sequences=1), tmp_path).scores
    assert measured.calibration is not None
    assert scores.calibration is not None
    same = scores.calibration.sequence_fingerprints.index(measured.calibration.sequence_fingerprints[0])
    pairs = [
        (entry.tensor(name).loss_increase["int2g64"], found.loss_increase_samples["int2g64"][same])
        for entry in measured.layers
        for name in ("key", "value")
        if entry.tensor(name).loss_increase
        and (found := scores.layers[entry.layer].tensor(name)).loss_increase_samples is not None
    ]
    assert len(pairs) == 20
    truth, predicted = zip(*pairs, strict=True)
    assert spearmanr(truth, predicted).statistic > 0.95
    assert 0.5 < median(guess / nats for nats, guess in pairs) < 1.2


def test_plans_lose_a_fraction_of_what_the_best_uniform_pairs_lose(scores: Scores, tmp_path: Path) -> None:
    """The pairs are the best known of at most 0.1 more stored bits than the plans, sinks and window the same."""
    plans = {str(budget): allocate(scores, budget=budget) for budget in (2.5, 3.0)}
    pairs = {
        name: allocate(scores, rule="uniform", formats=name)
        for name in ("key:int2g64c,value:rot2", "key:int3g64,value:rot2")
    }
    (first, *others), settings = (
        [*plans.items(), *pairs.items()],
        EvaluateRequest(sequences=1, sequence_length=1024, measure_from=512),
    )
    found = run_evaluation(resolve("demo"), first[1], settings, tmp_path, against=others, name=first[0]).evaluation
    result = {one.name: one for one in found.plans}
    for budget, pair, bound in (("2.5", "key:int2g64c,value:rot2", 0.024), ("3.0", "key:int3g64,value:rot2", 0.0075)):
        assert result[budget].stored_bits <= float(budget)
        assert result[pair].stored_bits <= float(budget) + 0.1
        assert result[budget].kl_nats < bound
        assert result[budget].kl_nats < 0.4 * result[pair].kl_nats
        assert 0.4 < _predicted(plans[budget]) / result[budget].kl_nats < 0.9  # by about 1.6, before any calibration
    assert result["2.5"].top1_agreement > 0.91  # of 512 tokens, so within 0.012; 0.940 of six such sequences


def _predicted(plan: BitPlan) -> float:
    assert plan.solver is not None
    assert plan.solver.objective is not None
    return plan.solver.objective
