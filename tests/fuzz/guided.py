"""Fuzz one reader with atheris, which is libFuzzer for Python: guided.py READER INPUTS SEED. Run by run.py.

Prints what libFuzzer prints; leaves a harmful input where it says. Exits with 2 where atheris is not installed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(name: str, inputs: str, seed: str) -> None:
    try:
        import atheris
    except ImportError:
        print("this needs atheris: pip install atheris", file=sys.stderr)
        sys.exit(2)
    with atheris.instrument_imports(include=["kvprof", "tomllib", "yaml", "json"], enable_loader_override=False):
        from fuzz.readers import READERS, corpus
        from fuzz.watch import read_guarded
    reader = READERS[name]
    folder = Path(tempfile.mkdtemp(prefix="kvprof-fuzz-"))
    seeds = folder / "seeds"
    seeds.mkdir()
    for number, content in enumerate([*reader.seeds, *(path.read_bytes() for path in corpus(name))]):
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


if __name__ == "__main__":
    main(*sys.argv[1:])
