"""What the terminal says of bytes: those that are on their way, and those that came."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from kvprof.report import console


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (99_949, "99.9 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (2_686_320_640, "2.69 GB"),
        (141_107_412_992, "141 GB"),
    ],
)
def test_bytes_have_three_digits(count: int, text: str) -> None:
    assert console.decimal_bytes(count) == text


def test_what_was_fetched_stands_beside_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_fetched(2_686_320_640, 141_107_412_992)
    assert capsys.readouterr().out == "fetched 2.69 GB of 141 GB (1.9 %)\n"


@pytest.mark.parametrize(("unit", "shown"), [("bytes", r"25\.0/80\.0 MB"), ("layers", r"25000000/80000000 layers")])
def test_a_bar_counts_bytes_as_a_download_and_all_else_in_pieces(
    unit: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=screen, force_terminal=True, width=120, color_system=None))
    with console.progress("norms", unit) as advance:
        advance(25_000_000, 80_000_000)
    assert re.search(shown, screen.getvalue())
