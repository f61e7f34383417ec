"""The colours of a report, for light and for dark pages, and the style sheet's lines that name them.

Keys are blue and values vermilion, after Okabe and Ito, which colour-blind eyes and grey printers tell apart; heat
goes along viridis, whose lightness alone says the order. On paper the light ones hold.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvprof.report.plots.style import HEAT_STEPS

COLOURS: dict[str, tuple[str, str]] = {
    "page": ("#ffffff", "#14171c"),
    "panel": ("#f5f6f8", "#1d2128"),
    "ink": ("#1a1d21", "#e7e9ec"),
    "soft": ("#545b64", "#a9b1bb"),
    "rule": ("#d5d9de", "#3a414b"),
    "band": ("#e6e8eb", "#2a3038"),
    "link": ("#0b5cad", "#7cb8f2"),
    "key": ("#0072b2", "#56a9e8"),
    "value": ("#c24e00", "#f0883e"),
    "green": ("#00805d", "#3fc79a"),
    "pink": ("#b0568a", "#e39cc4"),
    "sky": ("#2b8cc4", "#8fd0f7"),
    "amber": ("#a87400", "#f0b73c"),
    "grey": ("#6b7178", "#8d959f"),
    "flag": ("#a3261b", "#ff8f80"),
}
"""By its name in the style sheet: in the light scheme, in the dark one."""

_VIRIDIS = (
    "#440154",
    "#482878",
    "#3e4989",
    "#31688e",
    "#26828e",
    "#1f9e89",
    "#35b779",
    "#6dcd59",
    "#b4de2c",
    "#fde725",
)


def heat(dark: bool) -> list[str]:
    """Return the colours from the least loss to the largest; what is large stands out from the page."""
    steps = [_between(_VIRIDIS, step / (HEAT_STEPS - 1)) for step in range(HEAT_STEPS)]
    return steps if dark else steps[::-1]


def style_lines() -> str:
    """Return the rules that give every colour its value: light, dark where the reader's system is, or as chosen."""
    light, dark = (_variables(scheme) for scheme in (False, True))
    return (
        f":root{{color-scheme:light;{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-scheme=light])"
        f"{{color-scheme:dark;{dark}}}}}\n"
        f"@media screen{{:root[data-scheme=dark]{{color-scheme:dark;{dark}}}}}\n"
    )


def _variables(dark: bool) -> str:
    named = {name: pair[dark] for name, pair in COLOURS.items()}
    named |= {f"h{step}": colour for step, colour in enumerate(heat(dark))}
    return "".join(f"--{name}:{colour};" for name, colour in named.items())


def _between(colours: Sequence[str], share: float) -> str:
    """Return the colour at a share of the way along others."""
    place = share * (len(colours) - 1)
    first = min(int(place), len(colours) - 2)
    pairs = zip(_parts(colours[first]), _parts(colours[first + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - first)):02x}" for a, b in pairs)


def _parts(colour: str) -> list[int]:
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
