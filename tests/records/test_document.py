"""What holds for every file of kvprof's, whichever it is: reading is strict, errors are sentences, writing is whole."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kvprof.errors import InvalidFile, OutputError
from kvprof.records.document import Document, read_json
from kvprof.records.plan import BitPlan
from kvprof.records.scores import Scores

KINDS: list[type[Document]] = [Scores, BitPlan]


@pytest.fixture(params=KINDS, ids=["scores", "plan"])
def kind(request: pytest.FixtureRequest) -> type[Document]:
    chosen: type[Document] = request.param
    return chosen


@pytest.fixture
def value(kind: type[Document], scores_json: dict[str, Any], plan_json: dict[str, Any]) -> dict[str, Any]:
    """A minimal valid file of the kind."""
    return scores_json if kind is Scores else plan_json


def refusal(kind: type[Document], value: object) -> str:
    with pytest.raises(InvalidFile) as caught:
        kind.from_json(value, "a.json")
    assert caught.value.exit_code == 1
    message = str(caught.value)
    assert message.startswith("a.json: ")
    return message


def refusal_of_file(kind: type[Document], path: Path) -> str:
    with pytest.raises(InvalidFile) as caught:
        kind.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


# Round trips


def test_a_saved_file_loads_as_the_same_record_and_saves_as_the_same_bytes(
    kind: type[Document], value: dict[str, Any], tmp_path: Path
) -> None:
    record = kind.from_json(value, "a.json")
    assert record.save(tmp_path / "new" / "a.json") == tmp_path / "new" / "a.json"
    again = kind.load(tmp_path / "new" / "a.json")
    again.save(str(tmp_path / "b.json"))
    assert again == record
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "new" / "a.json").read_bytes()


def test_the_digest_is_the_hash_of_the_saved_file(kind: type[Document], value: dict[str, Any], tmp_path: Path) -> None:
    record = kind.from_json(value, "a.json")
    path = record.save(tmp_path / "a.json")
    assert record.digest == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    assert kind.load(path).digest == record.digest


def test_the_order_of_keys_and_the_layout_of_a_file_do_not_change_its_digest(
    kind: type[Document], value: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(dict(reversed(value.items()))))
    assert kind.load(path).digest == kind.from_json(value, "a.json").digest


def test_another_content_has_another_digest(kind: type[Document], value: dict[str, Any]) -> None:
    other = {**value, "kvprof_version": "0.2.0"}
    assert kind.from_json(value, "a").digest != kind.from_json(other, "a").digest


def test_a_saved_file_is_json_that_opens_with_its_schema_and_ends_with_a_newline(
    kind: type[Document], value: dict[str, Any]
) -> None:
    text = kind.from_json(value, "a.json").to_text()
    assert next(iter(json.loads(text).items())) == ("schema", kind.kind)
    assert text.endswith("}\n")
    assert text.isascii()


def test_a_file_that_begins_with_a_byte_order_mark_loads(
    kind: type[Document], value: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value), encoding="utf-8-sig")
    assert kind.load(path) == kind.from_json(value, "a.json")


def test_a_record_is_frozen(kind: type[Document], value: dict[str, Any]) -> None:
    record = kind.from_json(value, "a.json")
    with pytest.raises(ValidationError, match="frozen"):
        record.kvprof_version = "9"  # type: ignore[attr-defined]
    with pytest.raises(ValidationError, match="frozen"):
        record.layers[0].layer = 9  # type: ignore[attr-defined]


# Files that are no files of kvprof's


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"   \n", "not valid JSON"),
        (b"layers: []", "not valid JSON"),
        (b'{"schema": "kvprof.scores/1", "layers": [', "not valid JSON"),
        (b"\x80\x02}q\x00.", "not valid JSON"),
        (bytes(range(256)), "not valid JSON"),
        ("{}".encode("utf-16"), "not valid JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
        (b"3", "expected a JSON object, found int"),
        (b"{}", "no `schema` field"),
        (b'{"schema": 1}', "no `schema` field"),
        (b'{"schema": null}', "no `schema` field"),
    ],
)
def test_a_file_of_something_else_is_refused(kind: type[Document], content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert words in refusal_of_file(kind, path)


def test_an_absent_file_is_named(kind: type[Document], tmp_path: Path) -> None:
    assert "no such file" in refusal_of_file(kind, tmp_path / "absent.json")


def test_a_directory_in_place_of_a_file_is_refused(kind: type[Document], tmp_path: Path) -> None:
    assert "directory" in refusal_of_file(kind, tmp_path)


def test_a_path_below_a_file_is_refused(kind: type[Document], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refusal_of_file(kind, tmp_path / "file" / "a.json")


def test_a_path_too_long_for_the_file_system_is_refused(kind: type[Document], tmp_path: Path) -> None:
    refusal_of_file(kind, tmp_path / ("a" * 5000))


def test_a_file_far_larger_than_any_of_ours_is_not_read(kind: type[Document], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with open(path, "wb") as file:
        file.truncate(2**40)  # sparse: takes no space
    assert str(2**40) in refusal_of_file(kind, path)


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"schema":"%s","layers":[', '{"schema":"%s","x":['])
def test_no_depth_of_nesting_overflows_the_stack(kind: type[Document], opening: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    head = opening.replace("%s", kind.kind)
    unit = opening if "%" not in opening else "["
    for depth in [*range(880, 1005), 5_000, 200_000]:
        closing = ("}" if "{" in unit else "]") * depth + ("]}" if "%" in opening else "")
        path.write_text((head if "%" in opening else "") + unit * depth + "1" + closing)
        refusal_of_file(kind, path)


def test_an_integer_of_thousands_of_digits_is_refused(
    kind: type[Document], value: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    for digits in (20, 400, 4_000, 5_000, 100_000):
        path.write_text(json.dumps(value).replace('"layer": 1', '"layer": ' + "9" * digits))
        assert len(refusal_of_file(kind, path)) < 1_000


# Keys


def test_a_key_that_stands_twice_is_named(kind: type[Document], value: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value).replace('"layer": 1', '"layer": 1, "layer": 1'))
    message = refusal_of_file(kind, path)
    assert "'layer' stands twice" in message


def test_an_unknown_key_is_refused_with_the_nearest_known_one(kind: type[Document], value: dict[str, Any]) -> None:
    value["modle"] = {"num_layers": 2}
    assert "unknown key modle: did you mean 'model'?" in refusal(kind, value)


def test_an_unknown_key_like_no_other_is_refused_with_all_known_ones(
    kind: type[Document], value: dict[str, Any]
) -> None:
    value["zzz"] = 1
    message = refusal(kind, value)
    assert "unknown key zzz: choose from" in message
    for known in ("schema", "kvprof_version", "model", "geometry", "layers"):
        assert known in message


def test_an_unknown_key_deep_in_the_file_is_placed(kind: type[Document], value: dict[str, Any]) -> None:
    value["model"] = {"num_layers": 2, "fingerprnt": "sha256:0"}
    value["layers"][1]["vlaue"] = {}
    message = refusal(kind, value)
    assert "unknown key model.fingerprnt: did you mean 'fingerprint'?" in message
    assert "unknown key layers[1].vlaue: did you mean 'value'?" in message


def test_the_name_that_python_has_for_the_schema_is_no_key(kind: type[Document], value: dict[str, Any]) -> None:
    assert "unknown key schema_: did you mean 'schema'?" in refusal(kind, {**value, "schema_": value["schema"]})


def test_a_missing_key_is_placed(kind: type[Document], value: dict[str, Any]) -> None:
    del value["layers"][1]["value"]
    assert "missing key layers[1].value" in refusal(kind, value)
    del value["layers"]
    assert "missing key layers" in refusal(kind, value)


def test_at_most_a_handful_of_errors_are_told_and_the_rest_counted(kind: type[Document], value: dict[str, Any]) -> None:
    value.update({f"unknown{i}": i for i in range(105)})
    message = refusal(kind, value)
    assert message.count("unknown key") == 5
    assert message.endswith("and 100 more")


def test_control_characters_in_a_key_do_not_reach_the_terminal(kind: type[Document], value: dict[str, Any]) -> None:
    assert "\x1b" not in refusal(kind, {**value, "\x1b[31m": 1})


def test_half_a_surrogate_pair_is_refused_where_text_is_expected(kind: type[Document], value: dict[str, Any]) -> None:
    value["kvprof_version"] = "\ud800"
    refusal(kind, value).encode()


# Schema versions


@pytest.mark.parametrize("version", ["2", "0", "11", "1.0", ""])
def test_another_schema_version_is_refused_with_the_advice_to_upgrade(
    kind: type[Document], value: dict[str, Any], version: str
) -> None:
    value["schema"] = kind.kind[:-1] + version
    message = refusal(kind, value)
    assert repr(value["schema"]) in message
    assert repr(kind.kind) in message
    assert "another version of kvprof" in message


def test_the_other_kind_of_file_is_refused(
    kind: type[Document], scores_json: dict[str, Any], plan_json: dict[str, Any]
) -> None:
    other = plan_json if kind is Scores else scores_json
    message = refusal(kind, other)
    assert repr(other["schema"]) in message
    assert repr(kind.kind) in message


def test_a_foreign_schema_is_refused(kind: type[Document], value: dict[str, Any]) -> None:
    value["schema"] = "https://json-schema.org/draft/2020-12/schema"
    assert "kvprof reads" in refusal(kind, value)


# Types: nothing is converted


@pytest.mark.parametrize("wrong", [True, False, "1", 1.0, 1.5, None, [], {}, -1, 10**30, 10**4000])
def test_a_layer_number_is_a_whole_number_and_nothing_that_could_pass_for_one(
    kind: type[Document], value: dict[str, Any], wrong: object
) -> None:
    value["layers"][1]["layer"] = wrong
    assert "layers[1].layer" in refusal(kind, value)


@pytest.mark.parametrize("wrong", [True, "2", 2.0, 0, -2, 10_001, 10**400])
def test_the_number_of_layers_is_a_positive_whole_number(
    kind: type[Document], value: dict[str, Any], wrong: object
) -> None:
    value["model"] = {"num_layers": wrong}
    assert "model.num_layers" in refusal(kind, value)


@pytest.mark.parametrize("wrong", [1, True, ["a"], {"a": 1}, 1.5])
def test_a_text_is_a_string(kind: type[Document], value: dict[str, Any], wrong: object) -> None:
    assert "kvprof_version" in refusal(kind, {**value, "kvprof_version": wrong})


@pytest.mark.parametrize("wrong", [None, {}, "layers", 3, True])
def test_layers_are_a_list(kind: type[Document], value: dict[str, Any], wrong: object) -> None:
    assert "layers" in refusal(kind, {**value, "layers": wrong})


def test_an_empty_list_of_layers_is_refused(kind: type[Document], value: dict[str, Any]) -> None:
    refusal(kind, {**value, "layers": []})


# Writing


def test_saving_over_a_file_replaces_it_whole(kind: type[Document], value: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("x" * 100_000)
    kind.from_json(value, "a.json").save(path)
    assert path.read_text() == kind.from_json(value, "a.json").to_text()
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_saved_file_has_the_permissions_that_the_user_gives_new_files(
    kind: type[Document], value: dict[str, Any], tmp_path: Path
) -> None:
    old = os.umask(0o027)
    try:
        path = kind.from_json(value, "a.json").save(tmp_path / "a.json")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640


def test_saving_where_nothing_can_be_written_says_so(
    kind: type[Document], value: dict[str, Any], tmp_path: Path
) -> None:
    record = kind.from_json(value, "a.json")
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    below_a_file, below_proc = tmp_path / "file" / "a.json", Path("/proc/kvprof/a.json")
    for place in (below_a_file, below_proc, tmp_path / "folder", tmp_path / ("a" * 999)):
        with pytest.raises(OutputError, match=r"cannot write .*\n.*--out") as caught:
            record.save(place)
        assert caught.value.exit_code == 1
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder") == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_midway_leaves_the_old_file_and_nothing_else(
    kind: type[Document],
    value: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    failure: BaseException,
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(f"kvprof.storage.atomic.os.{step}", fail)
    with pytest.raises(OutputError if isinstance(failure, OSError) else KeyboardInterrupt):
        kind.from_json(value, "a.json").save(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


# Whatever a file holds, the answer is a record or one InvalidFile, at once

SECOND = timedelta(seconds=1)
RELAXED = [HealthCheck.too_slow]

NUMBERS = st.one_of(
    st.integers(-5, 20),
    st.integers(),
    st.sampled_from([10**30, -(10**400), 2**53, 2**53 + 1, 2**63, 9_999, 10_000]),
    st.floats(),
    st.sampled_from([0.5, 1e308, math.inf, -math.inf, math.nan, -0.0]),
)
STRINGS = st.one_of(
    st.text(st.characters(), max_size=20),
    st.sampled_from(["", "full", "rotated", "mse", "token", "float16", "int2g32", "\ud800", "\x00"]),
)
KEYS = st.one_of(STRINGS, st.sampled_from(["layer", "bits", "layers", "schema", "schema_", "key", "window"]))
JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, STRINGS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)

FULL_SCORES: dict[str, Any] = {
    "schema": "kvprof.scores/1",
    "source": "divergence",
    "kvprof_version": "0.1.0",
    "model": {"id": "org/name", "fingerprint": "sha256:00", "architecture": "LlamaForCausalLM", "num_layers": 3},
    "calibration": {
        "dataset": "builtin", "split": None, "sequences": 2, "sequence_length": 8, "tokens": 16, "seed": 0,
        "fingerprint": "sha256:11",
    },
    "geometry": {
        "dtype": "float16",
        "layers": [
            {"layer": 0, "kind": "full", "kv_heads": 2, "key_head_dim": 64, "value_head_dim": 64},
            {"layer": 1, "kind": "none", "kv_heads": 0, "key_head_dim": 0, "value_head_dim": 0, "skipped": "mlp"},
            {"layer": 2, "kind": "full", "kv_heads": 1, "key_head_dim": 80, "value_head_dim": 80, "window": None},
        ],
    },
    "layers": [
        {
            "layer": layer,
            "key": {"spectral_norm": 2.5, "head_spectral_norm": [1.0, 2], "gradient_norm": 0.1},
            "value": {"loss_increase": {"int2g32": 0.01, "q4_0": 0}, "loss_increase_stderr": {"int2g32": 1e-5}},
        }
        for layer in (0, 2)
    ],
}  # fmt: skip
FULL_PLAN: dict[str, Any] = {
    "schema": "kvprof.plan/1",
    "kvprof_version": "0.1.0",
    "model": FULL_SCORES["model"],
    "budget": {
        "requested": 2.5, "unit": "nominal", "nominal_bits": 2.5, "stored_bits": 3.5, "bytes_per_token": 2520.0,
    },
    "quantizer": {"scale_dtype": "float16", "zero_dtype": "float16", "rotation_seed": 0},
    "window": {"sink_tokens": 4, "recent_tokens": 128},
    "geometry": FULL_SCORES["geometry"],
    "layers": [
        {
            "layer": 0,
            "key": {"scheme": "asymmetric", "bits": 4, "group_size": 32, "axis": "channel", "clip": "mse"},
            "value": {"scheme": "rotated", "bits": 2, "group_size": 64, "axis": "token", "clip": "none"},
        },
        {
            "layer": 2,
            "key": {"bits": 16, "group_size": 32, "axis": "channel", "recent_fraction": 0.1},
            "value": {"bits": 3, "group_size": 64, "axis": "token"},
        },
    ],
    "skipped": [{"layer": 1, "reason": "mlp"}],
    "solver": {
        "method": "exact", "metric": "loss_increase", "objective": 0.03, "optimal": True, "predicted_kl_nats": 0.03,
    },
    "provenance": {"scores": "sha256:22", "command": "kvprof allocate --budget 2.5"},
}  # fmt: skip


def containers(value: object) -> Iterator[dict[str, Any] | list[Any]]:
    """Yield every object and list of a JSON value."""
    if isinstance(value, dict | list):
        yield value
        for child in value.values() if isinstance(value, dict) else value:
            yield from containers(child)


@st.composite
def mutated(draw: st.DrawFn, original: dict[str, Any]) -> object:
    """Draw a valid file in which one to three things are replaced, removed, repeated or added."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from([place for place in containers(value) if place] or [value]))
        if isinstance(place, dict):
            key = draw(st.sampled_from([*place, None])) if place else None
            action = draw(st.sampled_from(["replace", "replace", "remove"])) if key is not None else "add"
            if action == "remove":
                del place[key]
            else:
                place[key if key is not None else draw(KEYS)] = draw(st.one_of(NUMBERS, JSON_VALUES))
        else:
            index = draw(st.integers(0, len(place) - 1))
            action = draw(st.sampled_from(["replace", "remove", "repeat"]))
            if action == "replace":
                place[index] = draw(JSON_VALUES)
            elif action == "remove":
                del place[index]
            else:
                place.append(copy.deepcopy(place[index]))
    return value


def is_a_record_or_one_refusal(kind: type[Document], value: object) -> None:
    try:
        record = kind.from_json(value, "a.json")
    except InvalidFile as error:
        message = str(error)
        assert len(message.encode()) < 5_000  # can be printed, and read
        return
    assert kind.from_json(json.loads(record.to_text()), "a.json") == record
    if isinstance(record, BitPlan) and record.geometry is not None:
        assert record.bytes_at(1_000) >= 0
    if isinstance(record, Scores):
        assert isinstance(record.metrics, tuple)


def test_the_files_that_the_mutations_start_from_are_valid() -> None:
    assert Scores.from_json(FULL_SCORES, "a.json").geometry is not None
    assert BitPlan.from_json(FULL_PLAN, "a.json").skipped is not None


@settings(max_examples=200, deadline=SECOND, suppress_health_check=RELAXED)
@given(value=JSON_VALUES)
def test_any_json_value_is_a_record_or_one_refusal(value: object) -> None:
    for kind in KINDS:
        is_a_record_or_one_refusal(kind, value)
        is_a_record_or_one_refusal(kind, {"schema": kind.kind, "layers": value})


@settings(max_examples=250, deadline=SECOND, suppress_health_check=RELAXED)
@given(value=mutated(FULL_SCORES))
@example(value={**FULL_SCORES, "model": {"num_layers": 10_000}, "geometry": None})
def test_a_mutated_scores_file_is_a_record_or_one_refusal(value: object) -> None:
    is_a_record_or_one_refusal(Scores, value)


@settings(max_examples=250, deadline=SECOND, suppress_health_check=RELAXED)
@given(value=mutated(FULL_PLAN))
@example(value={**FULL_PLAN, "budget": {"requested": math.nan}})
@example(value={**FULL_PLAN, "solver": {"method": "exact", "objective": math.inf}})
@example(value={**FULL_PLAN, "quantizer": {"rotation_seed": 2**64}})
def test_a_mutated_plan_file_is_a_record_or_one_refusal(value: object) -> None:
    is_a_record_or_one_refusal(BitPlan, value)


@settings(max_examples=200, deadline=SECOND, suppress_health_check=RELAXED)
@given(
    drawn=st.sampled_from(KINDS),
    content=st.one_of(
        st.binary(max_size=200),
        st.tuples(st.integers(0, 3_000), st.integers(0, 50), st.binary(max_size=8)),  # cut here, so much, put this
    ),
)
def test_any_bytes_are_a_record_or_one_refusal(
    tmp_path_factory: pytest.TempPathFactory, drawn: type[Document], content: bytes | tuple[int, int, bytes]
) -> None:
    if isinstance(content, tuple):
        valid = json.dumps(FULL_SCORES if drawn is Scores else FULL_PLAN, indent=1).encode()
        at, cut, put = content
        content = valid[:at] + put + valid[at + cut :]
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(content)
    with contextlib.suppress(InvalidFile):
        drawn.load(path)


def test_reading_any_json_keeps_what_stands_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, 2.5, null, true, "\\u00e9"]}')
    assert read_json(path) == {"a": [1, 2.5, None, True, "é"]}
