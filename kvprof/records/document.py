"""A JSON file under a contract: strict reading, one-sentence errors, atomic writing.

Reads and writes the bytes of Scores and BitPlan files; does not know what they mean.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from typing_extensions import Self

from kvprof.errors import InvalidFile, UsageError, did_you_mean
from kvprof.storage.atomic import write_atomically

LARGEST_COUNT = 2**53
"""The largest whole number that every JSON reader holds exactly."""

Integer = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]  # 3, never 3.0, "3" or true; a seed, so 64 bits
Count = Annotated[int, Field(strict=True, ge=0, le=LARGEST_COUNT)]
Positive = Annotated[int, Field(strict=True, ge=1, le=LARGEST_COUNT)]
LayerIndex = Annotated[int, Field(strict=True, ge=0, lt=10_000)]
LayerCount = Annotated[int, Field(strict=True, ge=1, le=10_000)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
LONGEST_TEXT = 65_536
Text = Annotated[
    str, Field(strict=True, max_length=LONGEST_TEXT)
]  # the bound also makes pydantic refuse half a surrogate pair

LARGEST_FILE_BYTES = 256 * 2**20
"""A Scores file of 1,000 layers with 100 formats is 10 MB; more than this is not one of ours."""

MOST_ENTRIES = 20_000
"""Of one list or table, numbers aside: twice as many as layers."""
MOST_NUMBERS = 200_000
_PIECE_BYTES = 2**20
_PEEKED_BYTES = 256  # a file of kvprof's begins with its schema

_LONG_WORD = re.compile(r"(\S{60})\S{60,}")
"""A name in a message that is no name; its beginning is enough."""

PLAIN, LATENT = "#plain", "#latent"
"""Tags of a layer's entry, of keys and values or of a latent, within pydantic's error locations; no keys of a file."""

_compact = json.JSONEncoder(allow_nan=False).encode


def is_absent(value: object) -> bool:
    """Whether a field that only some files have is to be left out rather than written as null."""
    return value is None


class Record(BaseModel):
    """Frozen plain data; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_text(self) -> str:
        """Return the record as JSON; of a file, its exact text. The same record always gives the same bytes."""
        return _text(self.model_dump(mode="json", by_alias=True)) + "\n"


class SparseRecord(Record):
    """A record whose absent fields are left out of the JSON rather than written as null."""

    @model_serializer(mode="wrap")
    def _without_nulls(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


class ModelInfo(Record):
    """Which model a file speaks of."""

    id: Text | None = None
    fingerprint: Text | None = None
    """sha256 over the signs of W_k and W_v of every layer: the same in every float dtype, another after training."""
    architecture: Text | None = None
    num_layers: LayerCount


class Document(Record):
    """A record that is a file of its own, named by its `schema` field."""

    kind: ClassVar[str]

    # Python code need not name the schema of the class it calls; a file must.
    model_config = ConfigDict(json_schema_extra=lambda schema: schema.setdefault("required", []).insert(0, "schema"))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and validate a file.

        Raises InvalidFile, in one message, when the file cannot be read, is not JSON, names a key twice, breaks the
        contract or is of a schema version that this kvprof does not know.
        """
        return cls.from_json(read_json(path), str(path))

    @classmethod
    def from_json(cls, value: object, name: str) -> Self:
        """Validate an already parsed JSON value; `name` stands for the file in error messages."""
        schema = schema_of(value, name)
        _check_lists(value, name)
        if schema != cls.kind:
            raise InvalidFile(f"{name}: schema is {brief(schema)}, expected {cls.kind!r}.\n  {_schema_advice(schema)}")
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise InvalidFile(explain_invalid(error, name, cls)) from None

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all.

        Raises OutputError when the place cannot be written, UsageError when it holds another kind of kvprof's files.
        """
        check_replaces(path, self.kind)
        return write_atomically(path, self.to_text())

    @property
    def digest(self) -> str:
        """`sha256:...` of the file's text."""
        return "sha256:" + hashlib.sha256(self.to_text().encode()).hexdigest()


def _text(value: object, indent: str = "\n") -> str:
    """Return JSON indented by two spaces a level, as json.dumps has it, but that a row of numbers stays in its line.

    Half a million numbers, of every sequence and format, are also written several times as fast.
    """
    if type(value) is float and math.isfinite(value):
        return repr(value)
    inner = indent + "  "
    if isinstance(value, dict) and value:
        parts = (f"{inner}{_key(key)}: {_text(part, inner)}" for key, part in value.items())
        return "{" + ",".join(parts) + indent + "}"
    if isinstance(value, list) and not set(map(type, value)) <= {float, int}:
        return "[" + ",".join(f"{inner}{_text(part, inner)}" for part in value) + indent + "]"
    return _compact(value)


@functools.cache
def _key(key: str) -> str:
    return _compact(key)  # the same few thousand times in a file


def check_replaces(path: str | Path, kind: str | None) -> None:
    """Raise UsageError where writing would replace a file of kvprof's of another kind: a measurement by its plan.

    kind: the schema of what is written; None of what is no file of kvprof's.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(_PEEKED_BYTES)
    except OSError:  # nothing there; or writing will say what is wrong with it
        return
    found = re.match(rb'\s*\{\s*"schema"\s*:\s*"kvprof\.([a-z]+)/', start)
    if found is not None and (kind is None or found[1].decode() != kind.partition(".")[2].partition("/")[0]):
        raise UsageError(
            f"{path} holds kvprof's {found[1].decode()}, which would be lost.\n  Name another file with --out."
        )


def read_json(path: str | Path) -> object:
    """Parse a JSON file; raises InvalidFile when it is unreadable, not JSON, or names a key twice."""
    if "\0" in str(path):
        raise InvalidFile(f"{str(path)!r} is no path: it holds a zero byte.")
    path = Path(path)

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        seen: dict[str, object] = {}
        for key, value in pairs:
            if key in seen:
                raise InvalidFile(f"{path}: the key {brief(key)} stands twice in one object.\n  Keep one of the two.")
            seen[key] = value
        return seen

    try:
        size = path.stat().st_size
        if size > LARGEST_FILE_BYTES:
            raise InvalidFile(f"{path}: {size} bytes is no file of kvprof's (at most {LARGEST_FILE_BYTES}).")
        raw = read_at_most(path, LARGEST_FILE_BYTES)
        if raw is None:  # a pipe or a device, whose size nobody knows before
            raise InvalidFile(f"{path}: no file of kvprof's has more than {LARGEST_FILE_BYTES} bytes.")
        if _is_bomb(raw):
            raise InvalidFile(f"{path}: too many keys and lists for its length to be a file of kvprof's.")
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise InvalidFile(f"{path}: no such file.") from None
    except OSError as error:
        raise InvalidFile(f"{path}: cannot be read: {error.strerror}.") from None
    except RecursionError:
        raise InvalidFile(f"{path}: nested too deeply to be a file of kvprof's.") from None
    except ValueError as error:  # not UTF-8, not JSON, or an integer of thousands of digits
        raise InvalidFile(f"{path}: not valid JSON: {error}.") from None


def read_at_most(path: str | Path, most_bytes: int) -> bytes | None:
    """Return a file's content, in memory that grows with it; None of a longer one. Raises OSError."""
    parts: list[bytes] = []
    left = most_bytes + 1
    with open(path, "rb") as file:
        while left > 0 and (part := file.read(min(left, _PIECE_BYTES))):
            parts.append(part)
            left -= len(part)
    return b"".join(parts) if left > 0 else None


def _is_bomb(raw: bytes) -> bool:
    """Whether parsing would take many times the memory of the file: of `[],[],[]` it does thirty times."""
    if len(raw) < _PIECE_BYTES:
        return False
    return 8 * sum(map(raw.count, (b"[", b"{", b":"))) > len(raw)


def _check_lists(value: object, name: str) -> None:
    """Raise InvalidFile for a list too long for anything but numbers: each entry would be an error of its own."""
    waiting, others = [value], 0
    layers = value.get("layers") if isinstance(value, dict) else None
    while waiting:
        place = waiting.pop()
        entries = list(place.values()) if isinstance(place, dict) else place if isinstance(place, list) else []
        if place is not layers and len(entries) <= MOST_NUMBERS and set(map(type, entries)) <= {int, float}:
            continue
        others += len(entries)
        if len(entries) > MOST_ENTRIES or others > 200 * MOST_ENTRIES:
            raise InvalidFile(f"{name}: {max(len(entries), others)} entries are more than a file of kvprof's has.")
        waiting += [entry for entry in entries if isinstance(entry, dict | list)]


def schema_of(value: object, name: str) -> str:
    """Return the `schema` field of a parsed file; raises InvalidFile where there is none."""
    if not isinstance(value, dict):
        raise InvalidFile(f"{name}: expected a JSON object, found {type(value).__name__}.")
    schema = value.get("schema")
    if not isinstance(schema, str):
        raise InvalidFile(f"{name}: no `schema` field.\n  A file of kvprof's begins with " + _known_schemas())
    return schema


def _known_schemas() -> str:
    return '"schema": "kvprof.scores/1", "schema": "kvprof.plan/1" or "schema": "kvprof.evaluation/1".'


def _schema_advice(schema: str) -> str:
    if schema == "kvprof.scores/1":
        return "Scores become a plan with kvprof allocate --scores FILE."
    if schema in (f"kvprof.{kind}/1" for kind in ("plan", "evaluation", "frontier", "audit", "benchmark", "spectra")):
        return "kvprof show FILE prints what it is."
    if schema.startswith("kvprof.") and not schema.endswith("/1"):
        return "The file was written by another version of kvprof; upgrade, or measure again."
    return "kvprof reads " + _known_schemas()


def explain_invalid(error: ValidationError, name: str, model: type[BaseModel]) -> str:
    """Turn pydantic's report into lines of: where, what is wrong, the value seen."""
    lines = []
    for item in error.errors(include_url=False)[:5]:
        place = _place(item["loc"])
        where = f"{place}: " if place else ""
        if item["type"] == "extra_forbidden":
            known = _known_keys(model, item["loc"][:-1])
            advice = did_you_mean(str(item["loc"][-1]), known) if known else "none is known here; leave it out"
            lines.append(f"unknown key {place}: {advice}")
        elif item["type"] == "missing":
            lines.append(f"missing key {place}")
        elif item["type"] == "model_type":
            lines.append(f"{where}input should be a table of keys and values, found {brief(item['input'])}")
        elif item["type"] in ("value_error", "assertion_error"):
            lines.append(where + _LONG_WORD.sub(r"\1...", str(item["ctx"]["error"])))
        elif item["type"] == "literal_error":
            nearest = did_you_mean(str(item["input"]), re.findall(r"'([^']*)'", item["ctx"]["expected"]))
            advice = f": {nearest}" if nearest.startswith("did") else ""
            lines.append(f"{where}input should be {item['ctx']['expected']}, found {brief(item['input'])}{advice}")
        else:
            lines.append(f"{where}{item['msg'][0].lower()}{item['msg'][1:]}, found {brief(item['input'])}")
    more = error.error_count() - len(lines)
    if more > 0:
        lines.append(f"and {more} more")
    return f"{name}: " + "\n  ".join(lines)


def latent_or_plain() -> Discriminator:
    """Return what tells a layer's entry with `latent` and `rope` from one with `key` and `value`."""

    def tag(entry: object) -> str:
        has = entry.__contains__ if isinstance(entry, dict) else lambda name: hasattr(entry, name)
        return LATENT if has("latent") or (has("rope") and not has("key")) else PLAIN

    return Discriminator(tag)


def _place(location: tuple[int | str, ...]) -> str:
    """Return `layers[3].key.bits`: the fourth entry of the file, whichever layer that is."""
    parts = (
        f"[{part}]" if isinstance(part, int) else f".{part if part.isidentifier() and len(part) <= 60 else brief(part)}"
        for part in location
        if part not in (PLAIN, LATENT)
    )
    return "".join(parts).removeprefix(".")


def brief(value: object) -> str:
    """Return a value as Python writes it, in at most 60 characters."""
    text = reprlib.repr(value)  # of limited depth: a plain repr of deep nesting overflows the stack
    return text if len(text) <= 60 else text[:57] + "..."


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the record at a place in `model` may have, by walking the generated JSON Schema."""
    schema = model.model_json_schema(by_alias=True)
    node: dict[str, Any] = schema

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        if "anyOf" in node:
            node = next(option for option in node["anyOf"] if option.get("type") != "null")
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        return node

    for part in location:
        node = resolve(node)
        if part in (PLAIN, LATENT) and "oneOf" in node:
            node = node["oneOf"][(PLAIN, LATENT).index(str(part))]
        else:
            node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
    return list(resolve(node).get("properties", {}))
