"""Spectra as a table: norms, ratios, effective ranks and shapes, in 80 columns."""

from __future__ import annotations

import math
import re

import pytest

from kvprof.records.spectra import LayerSpectra, Spectra, Spectrum
from kvprof.report.spectra import heads_text, larger_text, show_spectra, sparkline


def spectrum(values: list[float], spread: float = 1.0, heads: int = 2) -> Spectrum:
    return Spectrum(
        heads=heads,
        mean=tuple(values),
        low=tuple(value / spread for value in values),
        high=tuple(value * spread for value in values),
        spectral_norm=values[0],
        frobenius_norm=math.hypot(*values),
    )


def spectra(*pairs: tuple[Spectrum, Spectrum]) -> Spectra:
    return Spectra(layers=tuple(LayerSpectra(layer=n, key=key, value=value) for n, (key, value) in enumerate(pairs)))


def rows(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r" +\d+ ", line)]


def test_a_row_has_both_norms_their_ratios_the_ranks_and_the_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    show_spectra(spectra((spectrum([30.0, 40.0 / 1.5, 1.0]), spectrum([4.0, 3.0, 0.0]))))
    ((layer, *cells),) = rows(capsys)
    assert layer == "0"
    assert cells[:3] == ["30.00", "4.000", "7.50"]
    assert cells[3:6] == ["40.15", "5.000", "8.03"]
    assert cells[6:8] == ["2", "2"]
    assert cells[8][0] == "█"
    assert cells[9][-1] == "▁"


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e3, 123456.789, 1e9])
def test_rows_fit_eighty_columns_at_any_scale(scale: float, capsys: pytest.CaptureFixture[str]) -> None:
    values = [scale * (1 + 1 / 3) / (n + 1) for n in range(256)]
    show_spectra(spectra(*[(spectrum(values), spectrum([value / 3e3 for value in values]))] * 128))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(" ")]
    assert len(lines) > 128
    assert max(map(len, lines)) <= 80


def test_a_tensor_of_zeros_has_no_ratio_and_a_flat_shape(capsys: pytest.CaptureFixture[str]) -> None:
    show_spectra(spectra((spectrum([1.0, 0.5]), spectrum([0.0, 0.0])), (spectrum([0.0]), spectrum([0.0]))))
    first, second = rows(capsys)
    assert first[2:4] == ["0", "-"]
    assert set(first[-1]) == {"▁"}
    assert second[1:4] == ["0", "0", "-"]


def test_keys_are_counted_in_both_norms() -> None:
    larger, smaller = spectrum([4.0, 0.1]), spectrum([3.0, 3.0])  # by Frobenius norm the other way
    found = spectra((larger, smaller), (smaller, larger), (larger, larger))
    assert larger_text(found) == (
        "keys larger in 1 of 3 layers by spectral norm, in 1 of 3 by Frobenius norm; not by spectral norm: layers 1-2"
    )
    everywhere = spectra((larger, spectrum([1.0, 0.0])))
    assert larger_text(everywhere) == "keys larger in 1 of 1 layers by spectral norm, in 1 of 1 by Frobenius norm"


def test_how_far_heads_lie_apart_is_told_where_it_is_most() -> None:
    near, far, dead = spectrum([2.0]), spectrum([2.0], spread=2), spectrum([2.0])
    dead = dead.model_copy(update={"low": (0.0,)})
    assert heads_text(spectra((near, near), (far, near))).endswith("keys 4 times (layer 1), values 1 times (layer 0)")
    assert heads_text(spectra((near, dead))).endswith("values of layer 0 have a head of zeros")


def test_one_head_is_not_compared_with_others(capsys: pytest.CaptureFixture[str]) -> None:
    show_spectra(spectra((spectrum([2.0, 1.0], heads=1), spectrum([1.0, 1.0], heads=1))))
    assert "heads of a layer differ" not in capsys.readouterr().out


def test_a_sparkline_falls_by_decades() -> None:
    assert sparkline([1000.0, 100.0, 10.0, 1.0, 0.1, 0.0], top=1000.0) == "█▆▃▁▁▁"
    assert sparkline([1.0] * 100, top=1.0) == "██████"
    assert sparkline([1.0] * 100, top=1000.0) == "▁▁▁▁▁▁"
    assert sparkline([5.0], top=5.0) == "█"
    assert len(sparkline([3.0, 2.0], top=3.0)) <= 6
