"""Read many damaged files with every reader of kvprof's, and say what was found.

    python tests/fuzz/run.py --inputs 200000 --seed 1          # shared out among the readers, in turn
    python tests/fuzz/run.py --only gguf --inputs 50000
    python tests/fuzz/run.py --coverage recipe --inputs 50000  # libFuzzer, by what code runs: pip install atheris

Input N of a seed is always the same. An input that does harm (an error that is not kvprof's own, more than a second,
more memory than ten times its bytes and 32 MiB) is kept in tests/data/fuzz/, which the tests read again, and the exit
status is 1. Of every fiftieth the memory is measured. --json prints what was done as rows of a table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MEMORY_EVERY = 50


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="in all; shared out evenly among the readers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to go on where a run ended")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop then, whatever is left")
    parser.add_argument("--only", action="append", help="a reader; can be repeated")
    parser.add_argument("--coverage", metavar="READER", help="let atheris choose the inputs of one reader")
    parser.add_argument("--corpus", type=Path, help="where harmful inputs are kept", default=None)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.coverage:
        return by_coverage(asked.coverage, asked.inputs, asked.seed)
    from fuzz.mutations import mutated
    from fuzz.readers import CORPUS, READERS
    from fuzz.watch import read_guarded

    names = asked.only or list(READERS)
    each = -(-asked.inputs // len(names))
    start = time.monotonic()
    rows = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for place, name in enumerate(names):
            reader, failures, begun = READERS[name], 0, time.monotonic()
            until = start + asked.seconds * (place + 1) / len(names)
            done = 0
            for number in range(asked.first, asked.first + each):
                if time.monotonic() > until:
                    break
                done += 1
                content = mutated(reader.seeds, reader.words, random.Random(f"{asked.seed}:{name}:{number}"))
                wrong = read_guarded(reader, Path(folder, "input"), content, number % MEMORY_EVERY == 0)
                if wrong is not None:
                    failures += 1
                    kept = (asked.corpus or CORPUS) / name / hashlib.sha256(content).hexdigest()[:16]
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    if failures <= 20:
                        kept.write_bytes(content)
                    print(f"{name} {number}: {wrong} ({kept})", file=sys.stderr)
            seconds = time.monotonic() - begun
            rows.append({"tried": f"damaged {name} files", "times": done, "failed": failures, "seed": asked.seed,
                         "first": asked.first, "seconds": round(seconds, 1)})  # fmt: skip
            if not asked.json:
                print(
                    f"{name:12} {done:8} inputs, {failures} did harm, {seconds:7.1f} s, seed {asked.seed}", flush=True
                )
    if asked.json:
        print(json.dumps(rows, indent=1))
    return int(any(row["failed"] for row in rows))


def by_coverage(name: str, inputs: int, seed: int) -> int:
    """Let libFuzzer look for inputs that reach code which none before reached."""
    try:
        import atheris
    except ImportError:
        print("this needs atheris: pip install atheris", file=sys.stderr)
        return 2
    with atheris.instrument_imports(include=["kvprof", "tomllib", "yaml", "json"], enable_loader_override=False):
        from fuzz.readers import READERS
        from fuzz.watch import read_guarded
    reader = READERS[name]
    folder = Path(tempfile.mkdtemp(prefix="kvprof-fuzz-"))
    seeds = folder / "seeds"
    seeds.mkdir()
    for number, content in enumerate(reader.seeds):
        (seeds / str(number)).write_bytes(content)
    words = folder / "words"
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in reader.words))

    def one(content: bytes) -> None:
        wrong = read_guarded(reader, folder / "input", content)
        if wrong is not None:
            raise AssertionError(wrong)

    options = [f"-runs={inputs}", f"-seed={seed}", f"-dict={words}", f"-artifact_prefix={folder}/", "-max_len=4096"]
    atheris.Setup([sys.argv[0], *options, str(seeds)], one)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
