"""A request is written once: command, function, recipe and help are made of its fields, or held to them here."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError
from score_factories import random_scores

import kvprof
from kvprof import BitPlan
from kvprof.api.schemas import schema_for
from kvprof.cli.app import COMMANDS, make_app
from kvprof.cli.request import request_of
from kvprof.errors import UsageError
from kvprof.records import recipe
from kvprof.records.document import Record
from kvprof.records.requests.option import PANELS, Option
from kvprof.records.requests.plan import AllocateRequest
from kvprof.records.requests.request import Request

PLACE = {"model", "tokenizer", "trust_remote_code", "out", "restart", "dry_run"}
"""Where a job reads and writes, of commands and functions; no request."""
PRINTING = {"as_json", "quiet"}
FILES = {"evaluate": {"plan", "named", "against"}, "benchmark": {"plan"}, "generate": {"plan", "prompt"},
         "calibrate": {"plans", "scores"}, "plot": {"pictures"}, "import": {"file", "tool"}}  # fmt: skip
"""Files and texts that a command is given as arguments, and more of the kind."""
LOADING = {"dtype", "device", "stream"}
"""What a recipe says once for all tables."""
TABLES: dict[str, tuple[type[Record], set[str]]] = {
    "spectra": (recipe.Spectra, LOADING),
    "gradients": (recipe.Gradients, LOADING | {"target", "shard"}),
    "divergence": (recipe.Divergence, LOADING),
    "evaluate": (recipe.Evaluate, LOADING),
    "calibrate": (recipe.Calibrate, LOADING),
    "benchmark": (recipe.Benchmark, LOADING | {"shape", "layers"}),
    "frontier": (recipe.Frontier, {"scores"}),
    "allocate": (recipe.Plans, {"target", "device"}),
    "plot": (recipe.Plot, set()),
}
"""A command's table in a recipe, and what of its request it has not."""
FUNCTIONS = ("gradients", "spectra", "allocate", "evaluate")


def callback_of(command: str) -> Any:
    (made,) = make_app([command]).registered_commands
    return made.callback


def requests() -> dict[str, type[Request]]:
    """Return every command that takes a request, and that."""
    found = {}
    for name in COMMANDS:
        command = inspect.unwrap(callback_of(name))
        request = request_of(command)
        if request is not None:
            found[name] = request
    return found


REQUESTS = requests()
every_request = pytest.mark.parametrize("name", REQUESTS)


def test_every_command_with_more_than_files_has_a_request() -> None:
    assert set(TABLES) | {"generate", "import"} == set(REQUESTS)


@every_request
def test_the_command_has_an_option_for_each_field_and_no_other(name: str) -> None:
    options = inspect.signature(callback_of(name)).parameters
    fields = REQUESTS[name].model_fields
    assert set(options) - PLACE - PRINTING - FILES.get(name, set()) == set(fields) - FILES.get(name, set())
    for field, info in fields.items():
        (option,) = (note for note in info.metadata if isinstance(note, Option))
        shown = options[field].annotation.__metadata__[0]
        assert (shown.help, shown.rich_help_panel) == (option.help, option.panel)
        assert option.panel in PANELS
        assert options[field].default == info.default


@every_request
def test_the_command_declares_the_request_that_it_is_given(name: str) -> None:
    command = inspect.unwrap(callback_of(name))
    assert command.__annotations__["request"] == REQUESTS[name].__name__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_function_has_a_keyword_for_each_field_and_no_other_and_its_default(name: str) -> None:
    keywords = inspect.signature(getattr(kvprof, name)).parameters
    fields = REQUESTS[name].model_fields
    assert set(keywords) - PLACE - FILES.get(name, set()) - {"progress"} == set(fields)
    for field, info in fields.items():
        assert keywords[field].default == info.default


@pytest.mark.parametrize("name", TABLES)
def test_a_recipe_has_a_key_for_each_field_and_no_other(name: str) -> None:
    """A table makes a plan of each of its budgets; a plan for a runtime is a table of its own."""
    table, absent = TABLES[name]
    keys = {"budget" if key == "budgets" else key for key in table.model_fields} - {"name", "pictures"}
    fields = REQUESTS[name].model_fields
    assert keys == set(fields) - absent
    for key in keys & set(table.model_fields):
        assert table.model_fields[key].default == fields[key].default


def test_a_recipes_tables_for_runtimes_have_keys_of_allocate() -> None:
    keys = {"budget" if name == "budgets" else name for name in recipe.Target.model_fields} - {"runtime"}
    assert keys <= set(AllocateRequest.model_fields)


def test_a_recipes_schema_describes_its_keys_as_the_help_does() -> None:
    schema = schema_for("recipe")
    described = schema["$defs"]["Gradients"]["properties"]
    for name in ("seed", "suffix_fraction", "until_stable", "batch_size", "formats"):
        (option,) = (note for note in REQUESTS["gradients"].model_fields[name].metadata if isinstance(note, Option))
        assert described[name]["description"] == option.help
    jsonschema.Draft202012Validator.check_schema(schema)


def test_what_was_not_asked_for_is_not_written() -> None:
    request = AllocateRequest(budget="2.50", pin=("key:0=8",), sink_tokens=0)
    assert request.model_dump(mode="json") == {"budget": "2.50", "pin": ["key:0=8"], "sink_tokens": 0}
    assert AllocateRequest.model_validate(request.model_dump(mode="json")) == request
    with pytest.raises(ValidationError, match="evil"):
        AllocateRequest.model_validate({"evil": 1})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("budget", value) for value in ([1], True, float("nan"), float("inf"), 10**400, "\ud800", {}, b"3")),
        *(("memory", value) for value in (1.5, True, [1], b"1GiB")),
        *(("context", value) for value in (1.5, "x", True, 10**400, 2**63)),
        *(("bits", value) for value in (1.5, "x", True, [2, 7], [], object())),
        *(("pin", value) for value in (7, "x", [7], "\ud800")),
        *(("max_kl", value) for value in ([0.1], True, float("nan"))),
        *(("bits_key", value) for value in (1.5, True, "4", 2**63)),
        *(("sink_tokens", value) for value in (-1, 1.5, True, 2**63)),
    ],
)
def test_a_value_that_no_option_takes_is_refused(option: str, value: Any) -> None:
    others: dict[str, Any] = {
        "bits_key": {"rule": "uniform", "bits_value": 4},
        "memory": {"context": 64},
        "context": {"memory": "1MiB"},
        "max_kl": {},
    }
    with pytest.raises(UsageError):
        kvprof.allocate(random_scores(2, 2), **others.get(option, {"budget": 6.0}) | {option: value})


def test_a_message_names_an_option_as_the_caller_writes_it() -> None:
    for of_function, words in ((False, "--sink-tokens -1: at least 0"), (True, "sink_tokens=-1: at least 0")):
        with pytest.raises(UsageError, match=words):
            AllocateRequest.of({"sink_tokens": -1}, of_function)
    published = {"as_published": True, "sink_tokens": 4}
    for of_function, words in ((False, "^--as-published .* --sink-tokens "), (True, "^as_published .* sink_tokens ")):
        with pytest.raises(UsageError, match=words):
            AllocateRequest.of(published, of_function)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": ["x\udcff.txt"]}, "--data 'x\\udcff.txt': it is not text in UTF-8."),
        ({"data": [""]}, "--data '': it names nothing."),
        ({"data": []}, "--data []: it names nothing; leave it out."),
        ({"seed": 2**32}, "--seed 4294967296: at most 4294967295 is possible."),
        ({"dtype": "float23"}, "unknown --dtype 'float23': did you mean 'float32'?"),
        ({"tensors": "kye"}, "--tensors: no tensor is called 'kye': did you mean 'key'?"),
        ({"layers": "3-1"}, "--layers '3-1': 3-1 runs backwards; write 1-3."),
        ({"pack": 1}, "--pack 1: True or False is needed."),
        ({"sequences": 2.5}, "--sequences 2.5: a whole number is needed."),
    ],
)
def test_what_is_wrong_is_said_with_the_option_and_the_value(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as raised:
        REQUESTS["divergence"].of(options)
    assert str(raised.value) == words


def test_a_command_that_no_file_could_hold_is_left_out(in_tmp: Path) -> None:
    pins = [f"key:{number % 3}=int4g64" for number in range(9_000)]
    plan = kvprof.allocate(random_scores(3), 6, pin=pins, out="plan.json")
    assert plan.provenance is not None
    assert plan.provenance.command is None
    assert BitPlan.load("plan.json") == plan
