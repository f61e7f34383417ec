"""Write texts of several kinds, from Debian packages and from Python itself, as files that kvprof reads.

python tests/benchmarks/texts.py FOLDER

Makes prose.jsonl (English, the Jargon File of the package jargon-text), german.jsonl (sayings and jokes of fortunes-de)
and source.jsonl (Python code, modules of the standard library). The packages are fetched by apt-get, not installed.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

PACKAGES = ("jargon-text", "fortunes-de")
ROW = 6000
"""Letters that a row has at least: a window of 1,024 tokens then seldom crosses into another row."""


def main(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        root = unpacked(Path(name))
        jargon = gzip.decompress((root / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()).decode()
        write(folder / "prose.jsonl", paragraphs(jargon[jargon.index("\n   :ABEND:") :]))
        fortunes = root / "usr/share/games/fortunes/de"
        write(folder / "german.jsonl", ((fortunes / name).read_text() for name in ("zitate", "witze")), "%\n")
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(
        path for package in ("asyncio", "email", "http", "json") for path in (library / package).glob("*.py")
    )
    write(folder / "source.jsonl", (path.read_text() for path in modules))
    return 0


def unpacked(folder: Path) -> Path:
    """Fetch the packages and return the folder that holds their files."""
    subprocess.run(["apt-get", "download", "-qq", *PACKAGES], cwd=folder, check=True, stderr=subprocess.DEVNULL)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package.name, "."], cwd=folder, check=True)
    return folder


def paragraphs(text: str) -> Iterable[str]:
    """Undo the wrapping of lines, as no newline within a paragraph is the author's."""
    return (re.sub(r"\s+", " ", part).strip() + "\n\n" for part in re.split(r"\n\s*\n", text) if part.strip())


def write(path: Path, parts: Iterable[str], separator: str | None = None) -> None:
    pieces = [piece for part in parts for piece in (part.split(separator) if separator else [part])]
    rows, row = [], ""
    for piece in pieces:
        row += piece
        if len(row) >= ROW:
            rows.append(row)
            row = ""
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows, {sum(map(len, rows))} letters")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
