"""A batch that does not fit the memory is halved, until it fits: the file is that of the smaller batch size."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import save_folder, save_text
from test_commands import run

from kvprof.profile import scoring

TEXT = "--data text.txt --sequences 8 --sequence-length 40 --recent-tokens 2 --sink-tokens 1".split()  # noqa: SIM905
FORMATS = ["--formats", "key:int2g4,value:int3g8"]
COMMAND = ["gradients", "model", *TEXT, *FORMATS]
ERRORS = {
    "torch's": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "Python's": MemoryError,
    "the CPU allocator's": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "Apple's": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
}


@pytest.fixture(autouse=True)
def place(in_tmp: Path) -> Path:
    save_folder(in_tmp / "model")
    save_text(in_tmp / "text.txt")
    return in_tmp


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Return what lets only so many sequences fit, and the list of how many were tried at once."""

    def make(
        fits: int, error: Callable[[], BaseException] = torch.OutOfMemoryError, step: str = "gradient_norms"
    ) -> list[int]:
        tried: list[int] = []
        own = getattr(scoring, step)

        def within(model: object, *arguments: object) -> object:
            batch = next(one for one in arguments if hasattr(one, "input_ids"))
            tried.append(len(batch.input_ids))
            if tried[-1] > fits:
                raise error()
            return own(model, *arguments)

        monkeypatch.setattr(scoring, step, within)
        return tried

    return make


def measured(out: str, *words: str) -> bytes:
    result = run(*COMMAND, *words, "--out", out)
    assert result.exit_code == 0, result.output
    return Path(out, "gradients.json").read_bytes()


@pytest.mark.parametrize("error", ERRORS)
def test_a_batch_that_does_not_fit_is_halved_and_said_to_be(
    error: str, room: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measured("two", "--batch-size", "2")
    tried = room(2, ERRORS[error])
    result = run(*COMMAND, "--batch-size", "8", "--out", "eight")
    assert result.exit_code == 0, result.output
    assert Path("eight/gradients.json").read_bytes() == expected
    assert tried == [8, 4, 2, 2, 2, 2]
    assert "with a batch of 8 sequences of 30 tokens: going on with --batch-size 4" in result.output
    assert "with a batch of 4 sequences of 30 tokens: going on with --batch-size 2" in result.output


@pytest.mark.parametrize(("size", "fits", "same"), [(3, 1, 1), (5, 3, 2), (100, 7, 6), (7, 1, 1)])
def test_the_file_is_that_of_the_size_that_fits(
    size: int, fits: int, same: int, room: Callable[..., list[int]]
) -> None:
    expected = measured("small", "--batch-size", str(same))
    room(fits, step="loss_effects")
    assert measured("large", "--batch-size", str(size)) == expected


def test_a_streamed_model_is_halved_too(room: Callable[..., list[int]]) -> None:
    expected = measured("one", "--batch-size", "1")
    room(1, step="loss_effects")
    assert measured("streamed", "--batch-size", "2", "--stream") == expected


def test_memory_that_runs_out_halfway_costs_no_finished_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    own, tried = scoring.gradient_norms, []

    def tire(model: object, geometry: object, batch: scoring.Batch) -> object:
        tried.append(batch.indices)
        if len(tried) > 1 and len(batch.indices) > 2:
            raise MemoryError
        return own(model, geometry, batch)

    monkeypatch.setattr(scoring, "gradient_norms", tire)
    measured("out", "--batch-size", "4")
    assert [len(indices) for indices in tried] == [4, 4, 2, 2]
    assert sorted(index for indices in (tried[0], *tried[2:]) for index in indices) == list(range(8))


def test_a_single_sequence_that_does_not_fit_ends_the_run_and_keeps_what_is_done(
    room: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        own, tried = scoring.gradient_norms, []

        def tire(*arguments: object) -> object:
            tried.append(arguments)
            if len(tried) > 3:
                raise MemoryError
            return own(*arguments)

        patch.setattr(scoring, "gradient_norms", tire)
        result = run(*COMMAND, "--out", "out")
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "out of memory on cpu with a single sequence of" in said
    assert "Lower --sequence-length, try --stream or --device cpu; what is measured so far is kept." in said
    assert "Traceback" not in said
    assert "went on with a stopped run: 3 of 8" in run(*COMMAND, "--out", "out").output


def test_other_errors_are_not_taken_for_it(room: Callable[..., list[int]]) -> None:
    tried = room(1, lambda: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        run(*COMMAND, "--batch-size", "2")
    assert tried == [2]


@pytest.mark.parametrize("error", ERRORS)
def test_memory_that_runs_out_anywhere_else_is_no_traceback(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ERRORS[error]()

    monkeypatch.setattr("kvprof.profile.norms.layer_norms", fail)
    result = run("norms", "model")
    assert result.exit_code == 1
    assert "error: out of memory" in result.output
    assert "what is measured so far is kept" in " ".join(result.output.split())
    monkeypatch.setattr("kvprof.models.config.AutoConfig.from_pretrained", fail)
    result = run("inspect", "model")
    assert result.exit_code == 1
    assert "out of memory while loading the config" in result.output


LIMITED = """
import resource, sys
import torch
torch.set_num_threads(1)
import kvprof.profile.sensitivity
from kvprof.profile import scoring
own = scoring.gradient_norms

def within(*arguments):
    # So much room for one more sequence at a time, asked of the system itself.
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 2**26, -1))
    if len(arguments[2].indices) > 1:
        torch.empty(2**28).fill_(0)
    try:
        return own(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))

scoring.gradient_norms = within
sys.argv = ["kvprof", *sys.argv[1:]]
from kvprof.__main__ import main
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_the_system_s_own_refusal_is_understood() -> None:
    expected = measured("one", "--batch-size", "1")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *COMMAND, "--batch-size", "2", "--out", "limited"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "going on with --batch-size 1" in done.stderr
    assert Path("limited/gradients.json").read_bytes() == expected
