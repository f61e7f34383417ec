"""Small files that would take all the time or memory there is: refused in a second, in memory like their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.readers import READERS
from fuzz.watch import read_guarded

MANY = 2**18
PLAN = b'{"schema": "kvprof.plan/1", '

BOMBS: dict[str, tuple[str, bytes]] = {
    "empty lists": ("plan", PLAN + b'"layers": [' + b"[]," * 2**19 + b"0]}"),
    "numbers in place of layers": ("plan", PLAN + b'"layers": [' + b"0," * MANY + b"0]}"),
    "unknown keys": ("plan", PLAN + b",".join(b'"key%d": "abcdefgh"' % number for number in range(MANY // 4)) + b"}"),
    "strings in place of numbers": ("scores", b'{"schema": "kvprof.scores/1", "layers": [[' + b'"a",' * MANY + b"1]]}"),
    "nesting": ("scores", b"[" * MANY),
    "digits": ("scores", b"1" * MANY),
    "a long schema": ("any", b'{"schema": "' + b"a" * MANY + b'"}'),
    "steps": ("history", b'{"schema": "kvprof.history/1", "steps": {' + b",".join(
        b'"some key %d": 7' % number for number in range(MANY // 8)) + b"}}"),
    "a key of parts": ("recipe", b"a" + b".a" * 50_000 + b" = 1"),
    "a table of parts": ("recipe", b"[a" + b" . 'a'" * 20_000 + b"]"),
    "nested arrays": ("recipe", b"a = " + b"[" * 130_000),
    "nested tables": ("recipe", b"a = " + b"{a = " * 25_000),
    "more than a recipe": ("recipe", b"#" * 2**20),
    "nested flow": ("kvtuner", b"[" * 130_000),
    "nested blocks": ("kvtuner", b"- " * 65_000),
    "anchors": ("kvtuner", b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"),
    "a list of strings": ("gguf", b"GGUF\x03\0\0\0" + b"\0" * 8 + b"\x01" + b"\0" * 7 + b"\x01" + b"\0" * 7 + b"a"
                          b"\x09\0\0\0\x08\0\0\0" + b"\xff" * 7 + b"\0" + b"\0" * MANY),
    "dimensions": ("safetensors", (lambda header: len(header).to_bytes(8, "little") + header)(
        b'{"a": {"dtype": "F4", "shape": [' + b"9," * MANY + b'9], "data_offsets": [0, 0]}}')),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_at_once_in_little_memory(name: str, tmp_path: Path) -> None:
    kind, content = BOMBS[name]
    reader = READERS[kind]
    for measures_memory in (False, True):
        assert read_guarded(reader, tmp_path / "input", content, measures_memory) is None
    with pytest.raises(reader.refuses):
        reader.read(tmp_path / "input")
