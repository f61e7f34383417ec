"""Every picture by its name: the file that it is drawn from, the command that writes this file, and what draws it.

Does not know where files lie, nor where pictures go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvprof.records.audit import Audit
from kvprof.records.benchmark import Benchmark
from kvprof.records.document import Document
from kvprof.records.evaluation import Evaluation
from kvprof.records.formats import TENSORS
from kvprof.records.frontier import Frontier
from kvprof.records.plan import BitPlan
from kvprof.records.scores import LOSS_INCREASE, Scores
from kvprof.records.spectra import Spectra
from kvprof.report.plots.audit import audit_figure, audit_labels
from kvprof.report.plots.benchmark import benchmark_figure
from kvprof.report.plots.frontier import frontier_figure
from kvprof.report.plots.losses import losses_figure
from kvprof.report.plots.plan import plan_figure
from kvprof.report.plots.positions import positions_figure
from kvprof.report.plots.projections import gradients_figure, norms_figure
from kvprof.report.plots.spectra import layers_named, spectra_figure
from kvprof.report.plots.style import NothingToDraw, Page
from kvprof.report.series import ranked_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Setting:
    """What a picture is drawn with, besides its record."""

    page: Page
    name: str = ""
    """Of the record's file, without its ending."""
    layers: str | None = None
    """Of `spectra`, the layers that were asked for."""
    evaluations: Sequence[Evaluation] = ()
    """Of `frontier`, what was measured of the same model."""


Drawn = Iterator[tuple[str, "Figure"]]
"""Figures, each with what its file's name ends in; all but audits of several metrics have one, and end in nothing."""


@dataclass(frozen=True)
class Picture:
    """One of the pictures."""

    name: str
    kind: type[Document]
    file: str
    """In a model's folder; may be a pattern of several."""
    command: str
    """That writes the file; {model} stands for its argument."""
    draw: Callable[[Any, Setting], Drawn]
    needs: Sequence[str] = ()
    """Of Scores: the picture shows one of these metrics, where any tensor has it."""

    def shows(self, document: Document) -> bool:
        """Whether a document is what this picture is drawn from, and holds what it shows."""
        if not isinstance(document, self.kind):
            return False
        if not isinstance(document, Scores):
            return True
        tensors = [entry.tensor(tensor) for entry in document.layers for tensor in TENSORS]
        return any(own.has(metric) for metric in self.needs for own in tensors)


def _norms(scores: Scores, setting: Setting) -> Drawn:
    yield "", norms_figure(scores, setting.page)


def _spectra(spectra: Spectra, setting: Setting) -> Drawn:
    layers = None if setting.layers is None else layers_named(setting.layers, spectra)
    yield "", spectra_figure(spectra, layers, setting.page)


def _gradients(scores: Scores, setting: Setting) -> Drawn:
    yield "", gradients_figure(scores, setting.page)


def _losses(scores: Scores, setting: Setting) -> Drawn:
    yield "", losses_figure(scores, setting.page)


def _plan(plan: BitPlan, setting: Setting) -> Drawn:
    yield "", plan_figure(plan, setting.name, setting.page)


def _frontier(frontier: Frontier, setting: Setting) -> Drawn:
    measured = [result for evaluation in setting.evaluations for result in ranked_results(evaluation)]
    yield "", frontier_figure(frontier, measured, setting.page)


def _positions(evaluation: Evaluation, setting: Setting) -> Drawn:
    yield "", positions_figure(evaluation, setting.page)


def _audit(audit: Audit, setting: Setting) -> Drawn:
    labels = audit_labels(audit)
    if not labels:
        raise NothingToDraw("this audit has no predicted losses to hold against the measured ones: nothing to draw.")
    for number, label in enumerate(labels, start=1):
        yield "" if len(labels) == 1 else f"-{number}", audit_figure(audit, label, setting.page)


def _benchmark(benchmark: Benchmark, setting: Setting) -> Drawn:
    yield "", benchmark_figure(benchmark, setting.page)


PICTURES = {
    picture.name: picture
    for picture in (
        Picture(
            "norms", Scores, "norms.json", "kvprof norms{model}", _norms, needs=("spectral_norm", "frobenius_norm")
        ),
        Picture("spectra", Spectra, "spectra.json", "kvprof spectra{model}", _spectra),
        Picture("gradients", Scores, "gradients.json", "kvprof gradients{model}", _gradients, needs=("gradient_norm",)),
        Picture("losses", Scores, "gradients.json", "kvprof gradients{model}", _losses, needs=(LOSS_INCREASE,)),
        Picture("plan", BitPlan, "plan*.json", "kvprof allocate --budget 2.5", _plan),
        Picture("frontier", Frontier, "frontier.json", "kvprof frontier", _frontier),
        Picture("positions", Evaluation, "evaluation.json", "kvprof evaluate PLAN", _positions),
        Picture("audit", Audit, "audit.json", "kvprof divergence{model}`, then `kvprof audit", _audit),
        Picture("benchmark", Benchmark, "benchmark.json", "kvprof benchmark PLAN", _benchmark),
    )
}
"""All of them, in the order of the way from a model to a plan and what came of it."""
