"""A figure as SVG within a report: colours by name, so that a page has two schemes; ids of its own; numbers on hover.

Rewrites what matplotlib writes with an XML parser. Text stays text, in the page's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, SubElement, fromstring, tostring

from kvprof.report.console import clean
from kvprof.report.plots.hover import hovers_of, target_of
from kvprof.report.plots.style import HEAT_STEPS, SVG_METADATA, heat_colours, picture_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = {
    "#000000": "ink", "#ffffff": "page", "#0072b2": "key", "#d55e00": "value", "#606060": "grey", "#d8d8d8": "rule",
    "#f7f7f7": "panel", "#e8e8e8": "band", "#009e73": "green", "#cc79a7": "pink", "#56b4e9": "sky", "#e69f00": "amber",
}  # fmt: skip
"""Colours that pictures are drawn with, by their names in the page's style."""
INHERITED = ("fill", "stroke", "stroke-width", "stroke-linecap", "stroke-linejoin", "stroke-opacity", "fill-opacity")
"""Properties that say the same of a group as of each mark in it."""
UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
"""What XML has no way to write."""


def page_svg(figure: Figure, prefix: str, pixels: int) -> str:
    """Return a figure as an SVG element that can stand in an HTML page.

    prefix: of the element's ids, another one for each picture of a page. pixels: how wide it is where there is room.
    Raises ValueError for a colour without a name.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    with picture_settings():
        # Not by Figure.savefig, which draws everything twice; the layout is settled.
        FigureCanvasSVG(figure).print_svg(buffer, metadata=SVG_METADATA)  # type: ignore[no-untyped-call]
        names = NAMED | {colour: f"h{step}" for step, colour in enumerate(heat_colours(HEAT_STEPS))}
    root = fromstring(UNWRITABLE.sub("\N{REPLACEMENT CHARACTER}", buffer.getvalue().decode()))
    ids = {name: f"{prefix}{number}" for number, name in enumerate(_referenced(root))}
    width, height = (72 * inches for inches in figure.get_size_inches())
    svg = Element(
        "svg",
        {
            "viewBox": f"0 0 {_number(width)} {_number(height)}",
            "width": str(pixels),
            "height": _number(height * pixels / width),
            "role": "img",
            "aria-label": clean(str(figure.get_label())),
        },
    )
    svg.extend([part for child in root for part in _plain(child, ids, names)])
    marks = SubElement(svg, "g", {"class": "marks"})
    for hover in hovers_of(figure):
        target = target_of(hover, figure)
        if target is not None:
            left, top, right, bottom = target
            corners = f"M{left} {top} L{right} {top} L{right} {bottom} L{left} {bottom} z"
            SubElement(SubElement(marks, "path", d=_path(corners)), "title").text = clean(hover.text)
    return tostring(svg, encoding="unicode").replace(" />", "/>")


def _referenced(root: Element) -> list[str]:
    """Return the ids that anything in a picture refers to, in the order in which it does."""
    found: list[str] = []
    for element in root.iter():
        for name, value in element.attrib.items():
            found += [value[1:]] if name.endswith("href") else re.findall(r"url\(#([^)]+)\)", value)
    return list(dict.fromkeys(found))


def _plain(element: Element, ids: Mapping[str, str], names: Mapping[str, str]) -> Iterator[Element]:
    """Yield an element without what a page has no use for: namespaces, metadata, style sheets, groups of nothing."""
    tag = element.tag.rpartition("}")[2]
    if tag in ("metadata", "style"):
        return
    children = [part for child in element for part in _plain(child, ids, names)]
    made = Element(tag, dict(_attributes(element, ids, names)))
    made.extend(children)
    if tag in ("text", "tspan"):
        made.text = element.text if (element.text or "").strip() else None
    if tag in ("g", "defs") and not children:
        return
    if tag == "g":
        _hoist(made)
        if not made.attrib:
            yield from children
            return
    yield made


def _attributes(element: Element, ids: Mapping[str, str], names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, value in element.attrib.items():
        name = name.rpartition("}")[2]
        value = re.sub(r"url\(#([^)]+)\)", lambda found: f"url(#{ids[found[1]]})", value)
        if name == "id":
            if value in ids:
                yield name, ids[value]
        elif name == "href":
            yield name, f"#{ids[value[1:]]}"
        elif name == "fill":  # of a hatch's ground
            yield "style", ";".join(f"{key}:{found}" for key, found in _declarations(f"fill:{value}", names))
        elif name == "style":
            style = ";".join(f"{key}:{found}" for key, found in _declarations(value, names))
            if style:
                yield name, style
        elif name == "d":
            yield name, _path(value)
        elif not value.startswith("rotate(-0 "):
            yield name, _rounded(value)


def _declarations(style: str, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield a style's properties: colours as variables of the page, of a font no more than its size."""
    for declaration in style.split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font" or key == "font-size":
            size = re.search(r"[\d.]+px", value)
            assert size is not None, style
            yield "font-size", size[0]
        elif value.startswith("#"):
            if value not in names:
                raise ValueError(f"{value}: a picture of a report has a colour that the page's style has no name for.")
            yield key, f"var(--{names[value]})"
        elif key and key != "font-family":
            yield key, _rounded(value)


def _hoist(group: Element) -> None:
    """Say once, of a group, what all its children say each."""
    children = list(group)
    styles = [dict(part.split(":", 1) for part in child.get("style", "").split(";") if part) for child in children]
    shared = {key: value for key, value in styles[0].items() if key in INHERITED}
    for style in styles[1:]:
        shared = {key: value for key, value in shared.items() if style.get(key) == value}
    if len(children) < 2 or not shared or any(child.tag in ("defs", "text") for child in children):
        return
    for child, style in zip(children, styles, strict=True):
        rest = ";".join(f"{key}:{value}" for key, value in style.items() if key not in shared)
        child.attrib.pop("style", None)
        if rest:
            child.set("style", rest)
    own = group.get("style")
    group.set("style", ";".join([*([own] if own else []), *(f"{key}:{value}" for key, value in shared.items())]))


def _path(text: str) -> str:
    """Return a path to a tenth of a point; straight lines as steps, which make most of a page, in few letters."""
    parts = re.findall(r"([A-Za-z])([^A-Za-z]*)", text)
    if not {command for command, _ in parts} <= set("MLz"):
        return "".join(command + " ".join(_rounded(places).split()) for command, places in parts)
    written, last, at = "", "", (0, 0)
    for command, places in parts:
        if command == "z":
            written, last = written + "z", "z"
            continue
        x, y = (round(10 * float(place)) for place in places.split())
        step = (x - at[0], y - at[1])
        if command == "M":
            name, numbers = "M", [x, y]
        elif 0 in step:
            name, numbers = ("h", [step[0]]) if step[1] == 0 else ("v", [step[1]])
        else:
            name, numbers = "l", [*step]
        letters = (name if name != last else " ") + " ".join(f"{number / 10:g}" for number in numbers)
        written += letters.replace(" -", "-")
        last, at = name, (x, y)
    return re.sub(r"(?<!\d)0\.", ".", written)


def _rounded(text: str) -> str:
    return re.sub(r"-?\d+\.\d+", lambda found: _number(float(found[0])), text)


def _number(value: float) -> str:
    """Return a coordinate, to a hundredth of a point."""
    return f"{round(value, 2) + 0.0:.2f}".rstrip("0").rstrip(".")
