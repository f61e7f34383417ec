"""`kvprof benchmark` as a user types it: a plan or formats, a model or a shape, and what cannot be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from folders import save_folder
from small_device import small_device  # noqa: F401
from tiny import tiny_model
from typer.testing import CliRunner, Result

from kvprof.cli.app import app
from kvprof.models.shapes import SHAPES
from kvprof.records.benchmark import Benchmark

pytestmark = pytest.mark.usefixtures("small_device")

QUICK = ("--context", "40", "--repeats", "2", "--tokens", "2", "--device", "cpu")


def run(*arguments: str | Path) -> Result:
    """Run a command in this process; an exception that is no exit is a failure."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def done(*arguments: str | Path) -> str:
    """Run a command that must end well; return what it said, lines joined."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture
def folder(in_tmp: Path) -> Path:
    """A model and a plan for it."""
    save_folder(in_tmp / "model")
    done("norms", "./model")
    uniform = ("--rule", "uniform", "--bits-key", "3", "--bits-value", "2", "--group-size", "4")
    done("allocate", *uniform, "--recent-tokens", "4", "--sink-tokens", "1", "--out", "plan.json")
    return in_tmp


def test_a_plan_is_timed_on_its_own_model_and_show_prints_the_same(folder: Path) -> None:
    said = done("benchmark", "plan.json", *QUICK, "--batch", "1,2")
    file = next(Path("outputs").glob("*/benchmark.json"))
    for words in (
        "plan on /",
        "decode attention at 40 tokens, 1 sequence",
        "decode attention at 40 tokens, 2 sequences",
        "the whole model, a token for each sequence in a step",
        f"written to {file}",
        f"written to {file.parent / 'plots' / 'benchmark.png'}",
    ):
        assert words in said
    assert "the largest batch" not in said  # on a CPU, not unless asked
    assert (file.parent / "plots" / "benchmark.png").stat().st_size > 10_000
    assert not list(file.parent.glob("*.journal*"))
    assert done("show", file) in said
    assert "a valid kvprof.benchmark/1 file, and it fits ./model" in done("validate", file, "./model")
    assert json.loads(run("schema", "benchmark").output)["title"] == "Benchmark"


def test_formats_are_a_plan_of_any_model(folder: Path) -> None:
    done("benchmark", "key:int4g64,value:rot2", "./model", *QUICK, "--out", "made", "--memory", "700KB")
    found = Benchmark.load("made/benchmark.json")
    assert found.plan.name == "key:int4g64,value:rot2"
    # Keys of 8 channels at 4 + 32/64, values at 2 + 16/8.
    assert found.plan.stored_bits == (4.5 + 4.0) / 2
    assert found.largest_batch.memory_bytes == 700_000
    assert found.largest_batch.full.batch > 0


def test_a_shape_needs_no_weights(in_tmp: Path) -> None:
    arguments = ("--shape", "llama-3-8b", "--layers", "2", "--attention-only", *QUICK)
    said = done("benchmark", "int4g64", *arguments)
    assert "int4g64 on llama-3-8b (float32, random weights)" in said
    found = Benchmark.load("outputs/llama-3-8b/benchmark.json")
    assert found.planned_layers == 2
    assert found.cases[0].decode == ()
    assert "all is within the plan's window" in said


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("missing.json",), 1, "missing.json: no such file"),
        (("./missing",), 1, "missing: no such file"),
        (("model/config.json",), 1, "no `schema` field"),
        (("int9g4",), 2, "there is no file int9g4, and 'int9g4' is no format"),
        (("int4g64,int2g64", "./model"), 2, "one format for the keys, not int4g64, int2g64"),
        (("plan.json", "./nowhere"), 1, "no model at ./nowhere"),
        (("plan.json", "./other"), 4, "for another model"),
        (("plan.json", "--shape", "llama-3-8b"), 4, "it has 2 layers, the model 32"),
        (("plan.json", "./model", "--shape", "llama-3-8b"), 2, "leave out one of them"),
        (("plan.json", "--layers", "1"), 2, "--layers keeps the first layers of a --shape"),
        (("int4g64", "--shape", "llama-3-8"), 2, "did you mean 'llama-3-8b'"),
        (("int4g64", "--shape", "llama-3-8b", "--layers", "33"), 2, "llama-3-8b has 32"),
        (("rot2", "--shape", "smollm2-135m", "--memory", "much"), 2, "cannot read 'much' as an amount of memory"),
        (("plan.json", "--context", "0"), 2, "--context 0: write whole numbers"),
        (("plan.json", "--context", "1,,2"), 2, "--context with nothing"),
        (("plan.json", "--context", "4k"), 2, "--context 4k"),
        (("plan.json", "--batch", "-1"), 2, "--batch -1"),
        (("plan.json", "--batch", "99999999999"), 2, "--batch 99999999999"),
        (("plan.json", "--context", "2000000000", "--batch", "2000000000"), 2, "more than any memory holds"),
        (("plan.json", "--repeats", "0"), 2, "--repeats 0"),
        (("plan.json", "--tokens", "0"), 2, "--tokens 0"),
        (("plan.json", "--kernels", "cuda"), 2, "unknown --kernels 'cuda'"),
        (("plan.json", "--dtype", "float23"), 2, "did you mean 'float32'"),
        (("plan.json", "--device", "nowhere"), 2, "--device nowhere"),
        (("plan.json", "--out", "plan.json"), 1, "plan.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_one_message_and_its_exit_code(
    folder: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    tiny_model("llama-mha").save_pretrained("other")
    result = run("benchmark", *arguments)
    assert result.exit_code == code, result.output
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not list(Path().rglob("benchmark.*"))


def test_the_help_names_shapes_that_there_are() -> None:
    said = " ".join(run("benchmark", "--help").output.split())
    assert {"llama-2-7b", "llama-3-8b", "qwen3-8b"} <= set(SHAPES)
    assert "llama-2-7b" in said


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to send")
def test_ctrl_c_leaves_a_journal_and_no_half_written_file(folder: Path) -> None:
    contexts = ",".join(map(str, range(40, 440)))  # far more than are done before the first of them is seen
    words = [sys.executable, "-m", "kvprof", "benchmark", "plan.json", "--context", contexts, "--repeats", "100"]
    # A shell's background job ignores Ctrl-C, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    journal = None
    while process.poll() is None and journal is None:
        time.sleep(0.01)
        journal = next(Path("outputs").glob("*/benchmark.journal"), None)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert [path.suffix for path in journal.parent.glob("benchmark*")] == [".journal"]
