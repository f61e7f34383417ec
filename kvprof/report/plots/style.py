"""How all pictures look, and how they are saved: colours, fonts, the paper's width, the same bytes each time.

Holds no state of matplotlib's: its settings are the picture's while one is drawn or saved, and the user's after. Does
not know what is drawn.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

from kvprof.errors import KvprofError
from kvprof.records.document import ModelInfo
from kvprof.records.evaluation import PlanResult
from kvprof.records.formats import TensorName
from kvprof.storage.atomic import replaced_when_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")

COLOURS: dict[TensorName, str] = {"key": "#0072B2", "value": "#D55E00"}
"""Blue and vermilion of Okabe and Ito: told apart by colour-blind eyes and in grey."""
MARKS: dict[TensorName, str] = {"key": "o", "value": "^"}
"""Shape as well as colour says which tensor it is."""
ACCENT = "#D55E00"
"""Of the plan that a picture is about."""
OTHERS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#606060")
"""Of what it is compared with: the rest of Okabe and Ito, and grey."""
OTHER_MARKS = "sD^vP*X<>h"
HEAT = "cividis"
"""Colours of numbers: alike for colour-blind eyes, and ever lighter in grey."""
HEAT_STEPS = 12
"""Of those colours, so many in a picture on a screen, each with a counterpart on a dark page."""
GREY = "#606060"
PALE = "#D8D8D8"

FULL_WIDTH = 7.0
"""Inches: both columns of a paper."""
FORMATS = ("png", "svg")
SVG_METADATA = {"Date": None, "Creator": None}
"""Nothing that differs from one run, or one release of matplotlib, to the next."""
TITLE_LETTER = 0.075
"""Inches that a letter of a title takes at most, in the mean of a line."""

_SETTINGS: Any = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
    "font.size": 8.0,
    "figure.titlesize": 8.5,
    "axes.titlesize": 8.0,
    "axes.labelsize": 8.0,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7.0,
    "legend.framealpha": 0.95,
    "legend.edgecolor": PALE,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.0,
    "grid.color": PALE,
    "grid.linewidth": 0.4,
    "hatch.linewidth": 0.5,
    "hatch.color": PALE,
    "svg.fonttype": "none",  # text stays text; laid out for the widest of these fonts, so that any other fits too
    "svg.hashsalt": "kvprof",
}


class MissingMatplotlib(KvprofError):
    """Pictures are drawn by a package that is not installed."""


class NothingToDraw(KvprofError):
    """A record has no number that the picture could show."""


@dataclass(frozen=True)
class Page:
    """What a picture is drawn for."""

    width: float | None = None
    """Inches; None for what suits the picture."""
    dpi: int = 200
    """Pixels an inch, of a PNG."""
    on_screen: bool = False
    """Whether the picture stands in a report, which has the title in its text and can be scrolled down."""

    def width_or(self, usual: float) -> float:
        """Return the width that was asked for, else the usual one."""
        return usual if self.width is None else self.width


PAPER = Page()

Draw = Callable[[Page], "Figure"]
"""What draws a picture, for a page that is not known yet."""


def in_paper_style(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Wrap what draws a figure: it has the pictures' settings, and its layout is settled when it is returned.

    The figure raises MissingMatplotlib where it cannot be drawn.
    """

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with picture_settings():
            figure = draw(*args, **kwargs)
            settle(figure)
            return figure

    return drawn


def new_figure(width: float, height: float, page: Page) -> Figure:
    """Return an empty figure of so many inches, known to no state of matplotlib's."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=page.dpi, layout="constrained")


def set_title(figure: Figure, text: str, page: Page) -> None:
    """Put a title above all panels, its lines broken where the picture's width makes it necessary.

    On a screen the title is the figure's label alone, for readers who cannot see the picture.
    """
    figure.set_label(" ".join(text.split()))
    if page.on_screen:
        return
    letters = max(10, int(figure.get_figwidth() / TITLE_LETTER))
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, letters)]
    figure.suptitle("\n".join(lines))


def settle(figure: Figure) -> None:
    """Lay a figure out for good: only then is it known where everything lies, and it stays there in every format."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG or SVG, by the file's name, whole or not at all; the same figure gives the same bytes.

    Raises OutputError.
    """
    kind = path.suffix.removeprefix(".").lower()
    metadata = SVG_METADATA if kind == "svg" else {"Software": None}
    with picture_settings(), replaced_when_whole(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=figure.dpi, metadata=metadata)
    return path


def heat_colours(steps: int) -> list[str]:
    """Return so many colours of the scale, as matplotlib writes them, from the least number to the largest."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps[HEAT].resampled(steps)(step)) for step in range(steps)]


def model_name(model: ModelInfo | None, length: int = 60) -> str:
    """Return a model's id, cut to what a title has room for."""
    return cut_text(model.id, length) if model is not None and model.id else "a model"


def cut_text(text: str, length: int) -> str:
    """Return a text of printable characters, its end cut off where it is longer than a picture has room for.

    A dollar sign, which would begin a formula, loses its meaning.
    """
    shown = "".join(mark if mark.isprintable() else "\N{REPLACEMENT CHARACTER}" for mark in text)
    shown = shown if len(shown) <= length else shown[: max(1, length - 1)] + "…"
    return shown.replace("$", r"\$")


class Look(NamedTuple):
    """The marks of one plan."""

    mark: str
    colour: str
    edge: str
    size: float
    """Points."""
    is_star: bool
    """Whether it is the evaluated plan, which lies on top."""
    is_filled: bool
    """Of marks that stand alone: every other baseline's is a ring, so that one is seen within another."""


def looks(results: Iterable[PlanResult]) -> Iterator[tuple[PlanResult, Look]]:
    """Yield each plan with its look; that of a baseline depends on how many baselines come before it."""
    baselines = 0
    for result in results:
        if result.role == "plan":
            yield result, Look("*", ACCENT, "black", 9, is_star=True, is_filled=True)
            continue
        colour = OTHERS[baselines % len(OTHERS)]
        yield result, Look(OTHER_MARKS[baselines % len(OTHER_MARKS)], colour, colour, 5, False, baselines % 2 == 0)
        baselines += 1


@contextmanager
def picture_settings() -> Iterator[None]:
    """Set matplotlib as pictures need it, whatever the user's own settings are; give those back at the end.

    Raises MissingMatplotlib.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError:
        raise MissingMatplotlib(
            "drawing a picture needs the package matplotlib.\n  Install it: pip install 'kvprof-bits[plot]'"
        ) from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield
