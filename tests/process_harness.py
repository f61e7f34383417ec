"""Commands that are stopped: each a process forked from one that has everything imported, so that many can be run.

Run as a script in an empty folder, it makes a tiny model's results there, stops commands at chosen moments and prints
what came of it as JSON. Holds a command at such a moment until the signal comes, so that no test waits for a clock.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL = "--data text.txt --pack --sequences 4 --sequence-length 16 --recent-tokens 2 --sink-tokens 1".split()  # noqa: SIM905
FORMATS = ["--formats", "key:int2g4,value:int3g8"]
READ = "--data text.txt --pack --sequences 3 --sequence-length 16".split()  # noqa: SIM905
COMMANDS: dict[str, list[str]] = {
    "norms": ["norms", "model", "--out", "out"],
    "gradients": ["gradients", "model", *SMALL, *FORMATS, "--out", "out"],
    "spectra": ["spectra", "model", *READ, "--out", "out"],
    "divergence": ["divergence", "model", *SMALL, *FORMATS, "--out", "out"],
    "allocate": ["allocate", "--scores", "out/gradients.json", "--budget", "8.5", *FORMATS,
                 "--recent-tokens", "2", "--sink-tokens", "1", "--out", "out/plan.json"],
    "calibrate": ["calibrate", "out/plan.json", "--model", "model", "--scores", "out/gradients.json"],
    "evaluate": ["evaluate", "out/plan.json", "--model", "model", *READ, "--no-rivals", "--out", "out"],
    "run": ["run", "mine.toml"],
    "report": ["report", "out"],
    "plot": ["plot", "norms", "--model", "out", "--format", "svg", "--out", "out/plots"],
}  # fmt: skip
RECIPE = 'model = "model"\nout = "out"\n[norms]\n'


def make_template(place: Path) -> None:
    """Make a model and the results of every command in a folder."""
    from folders import save_folder, save_text

    save_folder(place / "model")
    save_text(place / "text.txt", rows=24)
    (place / "mine.toml").write_text(RECIPE)
    for name in ["norms", "gradients", "allocate", "calibrate", *COMMANDS]:  # plans know their scores as they are last
        status, said = ended(begin(COMMANDS[name], place))
        assert status == 0, f"{name}: {status}: {said}"


def begin(command: list[str], place: Path, prepare: Callable[[], None] = lambda: None) -> tuple[int, Path]:
    """Start a command in a folder; return its process and the file that has what it says."""
    log = place / "said.log"
    log.touch()
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)  # until it is kvprof that is stopped, and not what starts it
    child = os.fork()
    if child == 0:
        try:
            os.chdir(place)
            target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(target, 1)
            os.dup2(target, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.argv = ["kvprof", *command]
            prepare()
            import kvprof.__main__ as program

            run = program._run

            def run_stoppable() -> None:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
                run()

            program._run = run_stoppable
            program.main()
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            flush()
            os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
        except BaseException:
            traceback.print_exc()
        flush()
        os._exit(99)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
    return child, log


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def ended(begun: tuple[int, Path]) -> tuple[int, str]:
    """Wait for a command; return its exit code, negative for the signal that killed it, and what it said."""
    child, log = begun
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, log.read_text(errors="replace")


def hold_after_a_piece() -> None:
    """Let this process stop for ever once its journal has a piece."""
    from kvprof.storage.journal import Journal

    add = Journal.add

    def add_and_hold(journal: Journal, key: str, result: object) -> None:
        add(journal, key, result)
        hold()

    Journal.add = add_and_hold  # type: ignore[method-assign]


def hold_before_the_result() -> None:
    """Let this process stop for ever when its result is written, and not yet in its place."""
    replace = os.replace

    def hold_and_replace(source: Path, target: Path) -> None:
        if Path(target).suffix != ".journal":
            hold()
        replace(source, target)

    os.replace = hold_and_replace  # type: ignore[assignment]


HELD_BACK = {signal.SIGINT, signal.SIGTERM}
MOMENTS = {"piece": hold_after_a_piece, "result": hold_before_the_result}


def hold() -> None:
    Path("held").touch()
    while True:
        time.sleep(0.01)  # signal.pause would sleep for ever where the signal comes just before it


def wait_until_held(begun: tuple[int, Path], place: Path) -> None:
    """Wait until a command is at its moment."""
    while not (place / "held").exists():
        exited = os.waitid(os.P_PID, begun[0], os.WEXITED | os.WNOHANG | os.WNOWAIT)
        assert exited is None, f"it never came to its moment: {begun[1].read_text()}"
        time.sleep(0.001)


def snapshot(place: Path) -> dict[str, bytes]:
    files = [file for file in sorted((place / "out").rglob("*")) if file.is_file()]
    return {str(file.relative_to(place)): file.read_bytes() for file in files}


def stop_once(template: Path, place: Path, name: str, moment: str | float, number: int) -> dict[str, Any]:
    """Stop a command at a moment, look around, and give the same command again. moment: a float is seconds."""
    place.mkdir()
    for shared in ("model", "text.txt", "mine.toml"):
        (place / shared).symlink_to(template / shared)
    shutil.copytree(template / "out", place / "out")
    if name == "run":
        (place / "out/history.json").unlink()
    before = snapshot(place)
    if isinstance(moment, float):
        begun = begin(COMMANDS[name], place)
        time.sleep(moment)
    else:
        begun = begin(COMMANDS[name], place, MOMENTS[moment])
        wait_until_held(begun, place)
    os.kill(begun[0], number)
    status, said = ended(begun)
    after = snapshot(place)
    again, said_again = ended(begin(COMMANDS[name], place))
    last = snapshot(place)
    whole = snapshot(template)
    return {
        "status": status,
        "said": said,
        "half_written": [file for file, raw in after.items() if not is_whole(file, raw, (before, whole))],
        "passing": [file for file in after if passing(file)],
        "gone": [file for file in before if file not in after],
        "again": again,
        "said_again": said_again,
        "differs": [
            file for file in {*whole, *last} - {"out/history.json"} if whole.get(file) != last.get(file)
        ],  # the history has the time of a file's last change
    }


def passing(file: str) -> bool:
    """Whether a file is hidden, or a run's own while it lasts."""
    return Path(file).name.startswith(".") or file.endswith((".journal", ".lock", ".holder"))


def is_whole(file: str, raw: bytes, known: tuple[dict[str, bytes], ...]) -> bool:
    """Whether a file is passing, or as it was, or as it will be."""
    if file == "out/history.json":
        return bool(json.loads(raw))
    return passing(file) or raw in [files.get(file) for files in known]


def prepare_imports() -> None:
    import matplotlib.figure  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import kvprof.__main__
    import kvprof.analysis.stability
    import kvprof.evaluate.evaluation
    import kvprof.evaluate.kl_factor
    import kvprof.profile.divergence
    import kvprof.profile.norms
    import kvprof.profile.sensitivity
    import kvprof.profile.spectra
    import kvprof.report.tables  # noqa: F401
    from kvprof.cli.app import make_app

    torch.set_num_threads(1)
    make_app()


def main() -> None:
    cases = json.loads(sys.argv[1])
    prepare_imports()
    template = Path("template").absolute()
    template.mkdir()
    make_template(template)
    found = [stop_once(template, Path(f"case-{n}").absolute(), *case) for n, case in enumerate(cases)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
