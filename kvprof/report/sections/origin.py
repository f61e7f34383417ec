"""Section: how to make all of this again: commands, versions, texts, digests.

Reads what every file says of its own making.
"""

from __future__ import annotations

import shlex
from typing import Any

from kvprof.records.evaluation import Evaluation
from kvprof.records.plan import BitPlan
from kvprof.records.scores import CalibrationInfo, Scores
from kvprof.report.page import Block, Commands, Paragraph, Section, Table
from kvprof.workspace.report_inputs import Found, ReportFiles

HEADING = "How can this be made again?"


def origin_section(files: ReportFiles) -> Section:
    """Return the section."""
    blocks: list[Block] = [
        Paragraph(
            "Every number above stands in one of these files. A digest changes with any number in a file; the model's "
            "fingerprint changes with its weights, and a text's with any of its tokens: equal ones are the same model, "
            "the same text.",
            "see",
        ),
        Table("The model", ("", ""), _model(files), left=(0, 1)),
    ]
    if files.all:
        rows = [_file(each) for each in files.all]
        blocks.append(Table("The files", ("file", "schema", "kvprof", "digest"), rows, left=(0, 1, 2, 3)))
    texts = [row for row in map(_text, files.all) if row is not None]
    if texts:
        headings = ("file", "text", "split", "sequences", "length", "tokens", "seed", "fingerprint")
        blocks.append(Table("The texts", headings, texts, left=(0, 1, 2, 7)))
    commands = _commands(files)
    if commands:
        blocks += [
            Paragraph("Commands, as the files have them or as what they say of themselves amounts to:", "note"),
            Commands(commands),
        ]
    return Section("origin", HEADING, blocks)


def _model(files: ReportFiles) -> list[tuple[str, str]]:
    model = files.model
    return [
        ("id", model.id or "not said"),
        ("architecture", model.architecture or "not said"),
        ("layers", str(model.num_layers)),
        ("fingerprint", model.fingerprint or "not said"),
    ]


def _file(found: Found[Any]) -> tuple[str, str, str, str]:
    document = found.document
    return str(found.path), document.kind, document.kvprof_version or "not said", document.digest


def _text_of(document: Any) -> CalibrationInfo | None:
    text = getattr(document, "calibration", None) or getattr(document, "text", None)
    return text if isinstance(text, CalibrationInfo) else None


def _text(found: Found[Any]) -> tuple[str, ...] | None:
    text = _text_of(found.document)
    if text is None:
        return None
    numbers = (text.sequences, text.sequence_length, text.tokens, text.seed)
    name = text.dataset
    if text.sources is not None and len(text.sources) > 1:
        name += f" ({', '.join(f'{source.dataset}: {source.sequences}' for source in text.sources)})"
    return found.path.name, name, text.split or "-", *map(str, numbers), text.fingerprint or "-"


def _commands(files: ReportFiles) -> list[str]:
    """Return the commands in the order in which one would give them."""
    model = shlex.quote(files.model.id) if files.model.id else "MODEL"
    lines = [f"kvprof norms {model}"] if files.norms is not None else []
    if files.spectra is not None:
        lines.append(f"kvprof spectra {model}{_text_options(files.spectra.document.calibration)}")
    for each in (files.gradients, files.losses):
        if each is not None:
            lines.append(f"kvprof gradients {model}{_text_options(each.document.calibration)}{_window(each.document)}")
    plan: BitPlan | None = None if files.plan is None else files.plan.document
    if plan is not None and plan.provenance is not None and plan.provenance.command:
        lines.append(plan.provenance.command)
    if files.frontier is not None and files.frontier.document.command:
        lines.append(files.frontier.document.command)
    if files.evaluation is not None:
        lines.append(_evaluate(files, files.evaluation.document))
    if files.audit is not None:
        lines.append(f"kvprof audit {shlex.quote(str(files.audit.path.parent))}")
    return list(dict.fromkeys(lines))


def _text_options(text: CalibrationInfo | None) -> str:
    if text is None:
        return ""
    sources = [(source.dataset, source.weight) for source in text.sources or ()] or [(text.dataset, 1.0)]
    data = [f"--data {shlex.quote(name + ('' if weight == 1 else f':{weight:g}'))}" for name, weight in sources]
    splits = {source.split for source in text.sources or ()} or {text.split}
    if len(splits) == 1 and text.split is not None:  # where texts were mixed, each has its usual one
        data.append(f"--split {shlex.quote(text.split)}")
    return f" {' '.join(data)} --sequences {text.sequences} --sequence-length {text.sequence_length} --seed {text.seed}"


def _window(scores: Scores) -> str:
    if scores.decoding is None:
        return ""
    window = scores.decoding.window
    return (
        f" --sink-tokens {window.sink_tokens} --recent-tokens {window.recent_tokens} "
        f"--suffix-fraction {scores.decoding.suffix_fraction:g}"
    )


def _evaluate(files: ReportFiles, evaluation: Evaluation) -> str:
    is_shown = files.plan is not None and files.plan.document.digest == evaluation.plan.digest
    place = shlex.quote(str(files.plan.path)) if files.plan is not None and is_shown else "PLAN"
    exact = " --exact" if evaluation.path == "exact" else ""
    return f"kvprof evaluate {place}{_text_options(evaluation.text)} --measure-from {evaluation.measured_from}{exact}"
