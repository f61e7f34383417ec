"""A whole report of one model: what to know first, then every section in the order in which one would ask.

Reads gathered files, returns a page; knows neither HTML nor Markdown.
"""

from __future__ import annotations

import shlex

from kvprof import __version__
from kvprof.records.geometry import bytes_text
from kvprof.report.page import Page
from kvprof.report.sections.audit import audit_section
from kvprof.report.sections.budgets import budgets_section
from kvprof.report.sections.cache import cache_section
from kvprof.report.sections.gradients import gradients_section
from kvprof.report.sections.losses import losses_section
from kvprof.report.sections.origin import origin_section
from kvprof.report.sections.plan import plan_section
from kvprof.report.sections.quality import quality_section
from kvprof.report.sections.spectra import spectra_section
from kvprof.report.sections.weights import weights_section
from kvprof.report.sentences import latent_reading
from kvprof.storage.folders import OUTPUTS
from kvprof.workspace.report_inputs import ReportFiles


def make_page(files: ReportFiles) -> Page:
    """Return the report on a model's files."""
    model = shlex.quote(files.model.id) if files.model.id else "MODEL"
    losses = "" if files.losses is None else f" --scores {shlex.quote(str(files.losses.path))}"
    place = "PLAN" if files.plan is None else shlex.quote(str(files.plan.path))
    out = "" if files.folder.parent == OUTPUTS else f" --out {shlex.quote(str(files.folder))}"
    evaluate = f"kvprof evaluate {place}{out}"
    sections = [
        cache_section(files, f"kvprof inspect {model}"),
        weights_section(files, f"kvprof norms {model}{out}"),
        spectra_section(files, f"kvprof spectra {model}{out}"),
        gradients_section(files, f"kvprof gradients {model}{out}"),
        losses_section(files, f"kvprof gradients {model}{out}"),
        plan_section(files, f"kvprof allocate --budget 2.5{losses}{out}"),
        budgets_section(files, f"kvprof frontier{losses}{out}", evaluate),
        quality_section(files, evaluate),
        audit_section(files, f"kvprof divergence {model}{out}"),
        origin_section(files),
    ]
    about = [files.model.architecture or "", f"{files.model.num_layers} layers", f"by kvprof {__version__}"]
    return Page(
        title=f"The KV cache of {files.model.id or 'a model'}",
        subtitle=", ".join(part for part in about if part),
        facts=_facts(files),
        sections=sections,
        remarks=[remark for remark in (latent_reading(files.geometry), *files.remarks) if remark is not None],
    )


def absent(files: ReportFiles) -> list[str]:
    """Return what a report of these files lacks, as the commands that measure it."""
    wanted = {
        "norms": files.norms,
        "spectra": files.spectra,
        "gradients": files.losses,
        "allocate": files.plan,
        "frontier": files.frontier,
        "evaluate": files.evaluation,
        "audit": files.audit,
    }
    return [f"kvprof {command}" for command, found in wanted.items() if found is None]


def _facts(files: ReportFiles) -> list[tuple[str, str]]:
    """Return what to know first: sizes, then the plan, then how good it is."""
    facts = []
    geometry = files.geometry
    if geometry is not None:
        grows = sum(map(geometry.bytes_per_token, geometry.growing))
        facts.append(("a token adds, unquantized", f"{bytes_text(grows)} ({geometry.dtype})"))
    plan = None if files.plan is None else files.plan.document
    if plan is not None and plan.budget is not None:
        if plan.budget.stored_bits:
            times = f"{16 / plan.budget.stored_bits:.2f}x fewer than 16"
            facts.append(("an element, as planned", f"{plan.budget.stored_bits:.4g} stored bits, {times}"))
        if plan.budget.bytes_per_token is not None:
            facts.append(("a token adds, as planned", bytes_text(plan.budget.bytes_per_token)))
    if plan is not None and plan.solver is not None and plan.solver.predicted_kl_nats is not None:
        facts.append(("predicted KL divergence", f"{plan.solver.predicted_kl_nats:#.3g} nats a token"))
    if files.evaluation is not None:
        result = files.evaluation.document.plan
        own = plan is not None and result.digest == plan.digest
        name = "measured KL divergence" if own else f"measured KL divergence of {result.name}"
        facts.append((name, f"{result.kl_nats:#.3g} nats a token"))
        facts.append(("the likeliest next token", f"the same after {result.top1_agreement:.1%}"))
    return facts
