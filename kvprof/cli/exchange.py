"""The commands `targets`, `export` and `import`: plans for other runtimes, and from other tools."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvprof.cli import completion
from kvprof.cli.options import TrustRemoteCode
from kvprof.cli.request import asks
from kvprof.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from kvprof.records.requests.plan import ImportRequest

TOOLS = ("kvtuner",)
"""Whose files can be imported."""


def targets() -> None:
    """List the runtimes that a plan can be made for.

    For each: its constraints, its formats, what `export` writes for it, and how that was checked.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's pool of threads would cost more than it saves

    from kvprof.records.replies import Runtime, Runtimes, StoredFormat
    from kvprof.report.console import print_result
    from kvprof.report.targets import show_targets
    from kvprof.targets.registry import TARGETS
    from kvprof.targets.versions import CHECKED

    found = Runtimes(
        targets=tuple(
            Runtime(
                name=target.name,
                grammar=target.words,
                formats=tuple(StoredFormat(name=name, stored_bits=bits) for name, bits in target.stored_bits()),
                writes=target.artefact,
                needs=target.since,
                checked=target.checked,
                checked_version=CHECKED[target.name].version,
                checked_on=CHECKED[target.name].date,
            )
            for target in TARGETS.values()
        )
    )
    show_targets(found)
    print_result(found)


def export(
    plan: Annotated[Path, typer.Argument(help="BitPlan file.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            "--target",
            help="Runtime; `kvprof targets` lists them.",
            show_default=False,
            autocompletion=completion.targets,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File or folder for the result.", show_default="beside the plan"),
    ] = None,
) -> None:
    """Write a plan in the syntax of another runtime.

    A plan that the runtime cannot carry out exactly is refused.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's pool of threads would cost more than it saves

    from kvprof.records.document import check_replaces
    from kvprof.records.plan import BitPlan
    from kvprof.records.replies import Exported
    from kvprof.report.console import print_note, print_plain, print_result
    from kvprof.storage.atomic import write_atomically
    from kvprof.targets.registry import export as write_for
    from kvprof.targets.registry import target_named

    target = target_named(to)
    artefact, place = write_for(BitPlan.load(plan), target, plan, out)
    check_replaces(place, None)
    write_atomically(place, artefact.text)
    print_plain(artefact.text.rstrip("\n"))
    for remark in artefact.remarks:
        print_note(remark)
    print_note(f"written to {place}")
    print_result(Exported(target=target.name, path=str(place), text=artefact.text, remarks=artefact.remarks))


@asks("plan.ImportRequest")
def import_(
    file: Annotated[Path, typer.Argument(help="The other tool's file.")],
    tool: Annotated[
        str,
        typer.Option(
            "--from", help="Tool that wrote it: `kvtuner`.", show_default=False, autocompletion=completion.among(TOOLS)
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Model of the plan: hub id, folder, .gguf file, or `demo`. The plan is checked against it and names "
            "it.",
            show_default="none",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the plan, or a file that ends in .json.",
            show_default="outputs/<model, or the file's name>",
        ),
    ] = None,
    *,
    request: ImportRequest,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make a plan from the file of another tool.

    KVTuner's files do not say how to run them. The defaults are those of its KIVI presets (`residual_length=32,
    q_group_size=32` in its `sh_gen_presets.py`): keys per channel, values per token.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's pool of threads would cost more than it saves

    from kvprof.api.exchange import imported_plan
    from kvprof.report.console import print_finished, print_plain
    from kvprof.report.plans import show_plan

    if tool not in TOOLS:
        raise UsageError(f"kvprof cannot import from {tool!r}: {did_you_mean(tool, TOOLS)}")
    command = shlex.join(["kvprof", *sys.argv[1:]])
    plan, place = imported_plan(request, file, model, out, trust_remote_code, command)
    written = plan.save(place)
    show_plan(plan)
    print_plain(f"from {file}")
    print_finished(plan, written)
