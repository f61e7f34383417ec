"""Recipes as a person writes them, right and wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvprof.errors import InvalidFile
from kvprof.records.recipe import PICTURES, Recipe, read_recipe
from kvprof.report.plots.catalogue import PICTURES as CATALOGUE


def read(folder: Path, text: str) -> Recipe:
    (folder / "mine.toml").write_text(text, encoding="utf-8")
    return read_recipe(folder / "mine.toml")


def test_a_single_value_or_table_stands_for_a_list_of_one(tmp_path: Path) -> None:
    one = read(tmp_path, '[text]\ndata = "self"\n[plans]\nbudgets = 2.5\n')
    several = read(tmp_path, '[text]\ndata = ["self"]\n[[plans]]\nbudgets = [2.5]\n')
    assert one == several


def test_an_empty_table_is_not_an_absent_one(tmp_path: Path) -> None:
    recipe = read(tmp_path, "[norms]\n")
    assert recipe.norms is not None
    assert recipe.gradients is None
    assert recipe.model == "demo"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[gradient]\n", ["unknown key gradient", "did you mean 'gradients'?"]),
        ("[gradients]\nsequence_lenght = 8\n", ["gradients.sequence_lenght", "did you mean 'sequence_length'?"]),
        ("[[plans]]\nbudget = 2.5\n", ["plans[0].budget", "did you mean 'budgets'?"]),
        ("[norms]\nsequences = 3\n", ["norms.sequences", "leave it out"]),
        ("[text]\nsequences = 0\n[norms]\n", ["text.sequences", "greater than or equal to 1", "found 0"]),
        ("[text]\nsequences = 2.0\n[norms]\n", ["text.sequences", "integer", "found 2.0"]),
        ('[text]\nsequences = "8"\n[norms]\n', ["text.sequences", "integer", "found '8'"]),
        ('[gradients]\npack = "yes"\n', ["gradients.pack", "boolean", "found 'yes'"]),
        ('[[plans]]\nbudgets = [2.5, "3"]\n', ["plans[0].budgets[1]", "number", "found '3'"]),
        ("[[plans]]\nbudgets = [nan]\n", ["plans[0].budgets[0]", "finite"]),
        ('[[plans]]\nmetric = "loss_incrase"\n', ["plans[0].metric", "did you mean 'loss_increase'?"]),
        ('[gradients]\nformats = "int9g3"\n', ["gradients.formats", "'int9g3' is no format", "int3g64"]),
        ('dtype = "float64"\n[norms]\n', ["dtype", "'float32'", "found 'float64'"]),
        ('[[plans]]\nname = "../plan"\n', ["plans[0].name", "../plan"]),
        ("plans = 3\n", ["plans[0]", "a table of keys and values", "found 3"]),
        ("text = 5\n[norms]\n", ["text", "a table of keys and values"]),
        ("model = 3\n[norms]\n", ["model", "string", "found 3"]),
        ("model = 1979-05-27\n[norms]\n", ["model", "string"]),
        ("[evaluate]\n", ["[evaluate] has no plan", "[[plans]]"]),
        ('[norms]\n[[rivals]]\nrule = "kvmix"\n', ["nobody measures [[rivals]]", "[evaluate]"]),
        ("[audit]\n", ["[divergence]"]),
        ('description = "nothing"\n', ["asks for nothing", "[gradients]"]),
        ("", ["asks for nothing"]),
        (
            "[[plans]]\nbudgets = 3\n[evaluate]\nsequence_length = 64\nmeasure_from = 63\n",
            ["evaluate.measure_from", "63", "64"],
        ),
        ("[[plans]]\nbudgets = 3\n[evaluate]\ncheck = true\nrivals = false\n", ["nothing to compare", "rivals"]),
        ('[[plans]]\nbudgets = 3\nunit = "stord"\n', ["plans[0].unit", "found 'stord'", "did you mean 'stored'?"]),
        ('[norms]\n[plot]\nformat = "pgn"\n', ["plot.format", "found 'pgn'", "did you mean 'png'?"]),
        ('[norms]\n[plot]\npictures = ["nroms"]\n', ["plot.pictures[0]", "'nroms'", "did you mean 'norms'?"]),
        ('[divergence]\ntensors = "key,valeu"\n', ["divergence.tensors", "did you mean 'value'?"]),
        ('[divergence]\nlayers = "3-1"\n', ["divergence.layers", "write 1-3"]),
        ("[gradients]\nsequence_length = 1\n", ["gradients.sequence_length", "greater than or equal to 2"]),
        ("[frontier]\nfrom = 5\nto = 2\n", ["frontier", "from 5 to 2"]),
        ("[norms]\n[norms]\n", ["not valid TOML", "line 2"]),
        ("norms", ["not valid TOML"]),
        ("x = " + "[" * 5000, ["nested too deeply"]),
        ("#" * (2**20 + 1), ["no recipe has more than"]),
        ("[[plans]]\nbudgets = [" + "2.5, " * 101 + "]\n", ["plans[0].budgets", "100"]),
    ],
)
def test_what_is_wrong_with_a_recipe_is_one_message_with_place_and_value(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    with pytest.raises(InvalidFile) as caught:
        read(tmp_path, text)
    said = " ".join(str(caught.value).split())
    assert said.startswith(f"{tmp_path / 'mine.toml'}: ")
    for word in words:
        assert word in said


def test_pictures_of_a_recipe_are_those_that_there_are() -> None:
    assert list(CATALOGUE) == list(PICTURES)


@pytest.mark.parametrize("content", [b"\xff\xfe[\x00", b"model = '\x00'"])
def test_what_is_no_text_is_no_recipe(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(InvalidFile, match="not valid TOML"):
        read_recipe(tmp_path / "mine.toml")


def test_a_recipe_that_is_not_there_or_is_a_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match="no such file"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(InvalidFile, match="cannot be read"):
        read_recipe(tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbfmodel = 'a/b'\r\n[norms]\r\n")
    assert read_recipe(tmp_path / "mine.toml").model == "a/b"
