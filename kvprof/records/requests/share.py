"""What `plot` is asked for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvprof.records.document import Integer, Number
from kvprof.records.requests.option import OUTPUT, Option
from kvprof.records.requests.request import ListedLayers, Request


class PlotRequest(Request):
    """`kvprof plot`: what its pictures look like. Null is what suits the picture."""

    kind: Annotated[Literal["png", "svg"] | None, Option("`png` or `svg`.", default="png")] = Field(
        None, alias="format"
    )
    width: Annotated[
        Annotated[Number, Field(ge=3, le=40)] | None,
        Option("Inches: 3.3 is one column of a paper, 7 both.", default="what suits the picture", shows_range=True),
    ] = None
    layers: Annotated[
        ListedLayers | None,
        Option("Layers to draw `spectra` of, such as 0-3,7.", default="a dozen, evenly spaced"),
    ] = None
    dpi: Annotated[
        Annotated[Integer, Field(ge=50, le=1200)] | None,
        Option("Pixels per inch of a PNG.", OUTPUT, default="200", shows_range=True),
    ] = None
