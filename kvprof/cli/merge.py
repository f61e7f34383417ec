"""The command `merge`: the shards of one measurement added up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvprof.cli.options import Out


def merge(
    shards: Annotated[
        list[Path], typer.Argument(metavar="SHARD", help="Files that `gradients --shard` wrote, every shard once.")
    ],
    out: Out = None,
) -> None:
    """Merge the shards of one measurement.

    The scores are the same as those of one run over the whole text.
    """
    from kvprof.errors import UsageError
    from kvprof.profile.shards import merge_shards
    from kvprof.records.scores import Scores
    from kvprof.report.console import print_result, print_written
    from kvprof.report.tables import show_scores
    from kvprof.storage.folders import output_folder

    if twice := sorted({str(path) for path in shards if shards.count(path) > 1}):
        raise UsageError(f"{twice[0]} is named twice.\n  Name each shard once.")
    scores = merge_shards({path: Scores.load(path) for path in shards})
    assert scores.model is not None
    path = output_folder(scores.model.id or "model", out) / "gradients.json"
    scores = scores.calibrated_as(path)
    scores.save(path)
    show_scores(scores, brief=True)
    print_written(path)
    print_result(scores)
