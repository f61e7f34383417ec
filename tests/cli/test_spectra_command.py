"""kvprof spectra as a user types it: what it prints and writes, and what it says to what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folders import save_folder, save_text
from test_commands import run

from kvprof.records.estimate import Estimate
from kvprof.records.spectra import Spectra

SMALL = ["--data", "text.txt", "--sequences", "3", "--sequence-length", "16", "--pack"]


@pytest.fixture(autouse=True)
def place(in_tmp: Path) -> Path:
    save_folder(in_tmp / "model")
    save_text(in_tmp / "text.txt")
    return in_tmp


def table(output: str) -> list[str]:
    """Return the rows that have a layer's sparklines."""
    return [line for line in output.splitlines() if any(mark in line for mark in "▁▂▃▄▅▆▇█")]


def test_it_prints_a_row_for_each_layer_and_show_prints_the_same(place: Path) -> None:
    result = run("spectra", "model", *SMALL, "--out", "out")
    assert result.exit_code == 0, result.output
    assert "on 3 sequences, 48 tokens of text.txt" in result.output
    assert len(table(result.output)) == 2
    assert "written to out/spectra.json" in result.output
    spectra = Spectra.load("out/spectra.json")
    count = len(spectra.larger_keys)
    assert f"keys larger in {count} of 2 layers by spectral norm" in result.output
    shown = run("show", "out/spectra.json")
    assert shown.exit_code == 0
    assert table(shown.output) == table(result.output)
    assert max(len(line) for line in shown.output.splitlines() if line.startswith(" ")) <= 80
    assert f"{spectra.layers[1].key.spectral_norm:#.4g}".rstrip(".") in table(result.output)[1]


def test_the_file_goes_into_the_model_s_folder_and_is_valid_for_this_model_alone(place: Path) -> None:
    assert run("spectra", "./model", *SMALL).exit_code == 0
    (file,) = Path("outputs").glob("*/spectra.json")
    valid = run("validate", file, "./model")
    assert (valid.exit_code, "a valid kvprof.spectra/1 file, and it fits" in valid.output) == (0, True)
    save_folder(place / "other", "llama-mqa")
    assert run("validate", file, "./other").exit_code == 4


def test_the_answer_as_json_is_the_file(place: Path) -> None:
    result = run("spectra", "model", *SMALL, "--out", "out", "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout == Path("out/spectra.json").read_text()
    schema = json.loads(run("schema", "spectra").stdout)
    assert set(schema["$defs"]["Spectra"]["required"]) == {"schema", "layers"}
    assert "Spectrum" in schema["$defs"]


def test_streamed_it_writes_the_same_bytes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPROF_CACHE", str(place / "cache"))
    for folder, how in (("whole", []), ("streamed", ["--stream"])):
        result = run("spectra", "model", *SMALL, *how, "--out", folder)
        assert result.exit_code == 0, result.output
    assert Path("whole/spectra.json").read_bytes() == Path("streamed/spectra.json").read_bytes()


def test_a_dry_run_says_what_it_takes_and_writes_nothing(place: Path) -> None:
    result = run("spectra", "model", *SMALL, "--dry-run", "--out", "out", "--json")
    assert result.exit_code == 0, result.output
    estimate = Estimate.model_validate_json(result.stdout)
    assert (estimate.sequences, estimate.tokens) == (3, 48)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--sequences", "0"], 2, "--sequences 0"),
        (["--sequence-length", "65"], 2, "the model was made for 64"),
        (["--dtype", "float17"], 2, "float17"),
        (["--device", "cuda:99"], 2, "cuda:99 cannot be used here"),
        (["--data", "absent.txt"], 1, "absent.txt"),
        (["--split", "held-in"], 2, "held-out"),
        (["--layers", "0"], 2, "No such option"),
    ],
)
def test_what_it_cannot_do_it_says_in_one_message(place: Path, options: list[str], code: int, said: str) -> None:
    result = run("spectra", "model", *SMALL, *options, "--out", "out")
    assert result.exit_code == code, result.output
    assert said in result.output
    assert "Traceback" not in result.output
    assert not Path("out/spectra.json").exists()


def test_a_damaged_file_is_refused_where_it_is_damaged(place: Path) -> None:
    assert run("spectra", "model", *SMALL, "--out", "out").exit_code == 0
    value = json.loads(Path("out/spectra.json").read_text())
    value["layers"][1]["value"]["mean"][0] *= 2
    Path("out/spectra.json").write_text(json.dumps(value))
    result = run("show", "out/spectra.json")
    assert result.exit_code == 1
    assert "layers[1].value: mean[0] is" in result.output


@pytest.mark.demo
def test_the_demo_model_s_cached_keys_are_larger_in_every_layer(in_tmp: Path) -> None:
    result = run("spectra", "--data", "builtin", "--sequences", "1", "--sequence-length", "128", "--pack")
    assert result.exit_code == 0, result.output
    assert "keys larger in 30 of 30 layers by spectral norm" in result.output
    spectra = Spectra.load("outputs/demo/spectra.json")
    assert len(spectra.layers) == 30
    assert all(len(entry.key.mean) == 64 and entry.key.heads == 3 for entry in spectra.layers)
