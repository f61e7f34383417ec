"""Do numbers repeat? Byte for byte on the same machine; to a stated tolerance, and with the same plan, on another.

What is the same: model, text, seed, device and versions. Processes differ in what must not matter: the seed of
Python's hashes, the working folder, what was kept before. Then threads and batches differ, which changes the order of
sums.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from folders import save_folder, save_text
from requested import changed

from kvprof.allocate.budget import bit_limit
from kvprof.allocate.methods import exact
from kvprof.analysis.verify import moved
from kvprof.api.measure_again import largest_difference
from kvprof.api.verify import TOLERANCE
from kvprof.calibration.sequences import tokenize
from kvprof.calibration.text import open_text
from kvprof.models.config import load_config
from kvprof.models.inventory import take_inventory
from kvprof.models.load import load_model, load_tokenizer, resolve
from kvprof.models.source import ModelSource
from kvprof.profile.decoder import Decoder, formats_of
from kvprof.profile.norms import run_norms
from kvprof.profile.scoring import measure_sensitivity
from kvprof.profile.sensitivity import run_sensitivity
from kvprof.records.plan import Window
from kvprof.records.requests.measure import GradientsRequest
from kvprof.records.scores import Scores

SCRIPT = """
import sys
from kvprof.cli.app import app_for
model, text = sys.argv[1:]
length = "--sequence-length 48 --pack"
decoder = "--sink-tokens 0 --recent-tokens 8 --formats key:int2g16,key:int4g16,value:int2g8,value:int4g8"
lines = f'''
norms {model} --out out
gradients {model} --data {text} --data self --sequences 4 {length} {decoder} --out out
spectra {model} --data {text} --sequences 2 {length} --out out
allocate --budget 5.5 --scores out/gradients.json --out out
allocate --budget 3 --scores out/norms.json --out out/by-norm.json
frontier --scores out/gradients.json --points 4 --out out
evaluate out/plan-5.50.json --model {model} --data {text} --sequences 1 {length} --out out
'''
for line in lines.strip().splitlines():
    sys.argv = ["kvprof", *line.split(), "--quiet"]
    try:
        app_for(sys.argv[1:])(prog_name="kvprof")
    except SystemExit as left:
        if left.code:
            raise
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    model, text = save_folder(tmp_path / "model"), save_text(tmp_path / "text.txt")
    written = []
    for seed in ("1", "2718"):
        folder = tmp_path / f"folder-{seed}"
        folder.mkdir()
        own = {"PYTHONHASHSEED": seed, "KVPROF_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(model), str(text)],
            cwd=folder, env=os.environ | own, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        written.append({path.name: path.read_bytes() for path in (folder / "out").glob("*.json")})
    names = {"norms", "gradients", "spectra", "plan-5.50", "by-norm", "frontier", "evaluation"}
    assert set(written[0]) == {f"{name}.json" for name in names}
    assert written[0] == written[1]


# Threads and batches


VARIANTS = [(2, 1), (4, 1), (1, 2), (4, 3)]
"""Threads, and sequences in one forward; they are held against one thread and one sequence."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


DECODER = Decoder(
    {"key": ("int2g16", "int4g16"), "value": ("int2g8", "int4g8")}, Window(sink_tokens=0, recent_tokens=8)
)


def measured(source: ModelSource, request: GradientsRequest, folder: Path, count: int, batch_size: int) -> Scores:
    with threads(count):
        return run_sensitivity(source, changed(request, batch_size=batch_size), folder, decoder=DECODER).scores


def check_alike(first: Scores, other: Scores, budgets: tuple[str, ...]) -> None:
    difference, where = largest_difference(first, other)
    assert difference <= TOLERANCE, where
    for budget in budgets:
        plans = [exact(scores, bit_limit(budget, "stored")) for scores in (first, other)]
        assert moved(*plans) == []


def test_threads_and_batches_move_no_score_beyond_the_tolerance(tmp_path: Path) -> None:
    source = resolve(str(save_folder(tmp_path / "model")))
    text = save_text(tmp_path / "text.txt")
    request = GradientsRequest(data=(str(text),), sequences=3, sequence_length=48, pack=True, device="cpu")
    first = measured(source, request, tmp_path / "1-1", 1, 1)
    for count, batch_size in VARIANTS:
        check_alike(first, measured(source, request, tmp_path / f"{count}-{batch_size}", count, batch_size), ("5", "6"))


def test_threads_change_no_norm(tmp_path: Path) -> None:
    source = resolve(str(save_folder(tmp_path / "model")))
    found = []
    for count in (1, 2, 4):
        with threads(count):
            found.append(run_norms(source, tmp_path / str(count)).scores)
    for other in found[1:]:
        assert largest_difference(found[0], other)[0] < 1e-12


@pytest.mark.demo
def test_threads_and_batches_make_the_same_plan_of_the_demo_model() -> None:
    source = resolve("demo")
    inventory = take_inventory(load_config(source), source.id)
    decoder = Decoder({"key": ("int2g8", "int4g8"), "value": ("rot2", "rot3")}, Window(sink_tokens=0, recent_tokens=4))
    text = tokenize(open_text("builtin", None, 0), load_tokenizer(source), 2, 32)
    model, found = load_model(source, device="cpu"), []
    for count, batch_size in ((1, 1), (2, 1), (4, 2)):
        with threads(count):
            formats = formats_of(inventory.geometry, decoder)
            found.append(measure_sensitivity(model, text, inventory, formats, decoder, batch_size))
    for other in found[1:]:
        check_alike(found[0], other, ("4.5", "5"))
