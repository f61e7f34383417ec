"""What a plan was asked for: its request, and the command beside it: a line as typed, or the call in Python.

A command is text that a stranger may have written: it is parsed against the options that `allocate` has, never run.
"""

from __future__ import annotations

import argparse
import ast
import shlex
from typing import Any, NoReturn

from kvprof.errors import InvalidFile, UsageError, first_line
from kvprof.records.plan import BitPlan
from kvprof.records.requests.plan import AllocateRequest
from kvprof.records.requests.request import as_option

CALL = "kvprof.allocate"
WORDS = ("kvprof", "allocate")


def read_request(plan: BitPlan) -> AllocateRequest:
    """Return what a plan was asked for: as it says, or as the command of an older one says.

    Raises InvalidFile, saying why in half a sentence, for a plan that says neither, and as `read_command` does.
    """
    made = plan.provenance
    if made is not None and made.request is not None:
        return made.request
    if made is None or made.command is None:
        raise InvalidFile("the plan does not say how it was made")
    return read_command(made.command)


def read_command(command: str) -> AllocateRequest:
    """Return what a command asks for; raises InvalidFile for one that is no `allocate`, or not of this kvprof."""
    try:
        return AllocateRequest.of(_of_call(command) if command.startswith(CALL + "(") else _of_line(command))
    except (UsageError, SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise InvalidFile(f"the plan's command cannot be read: {first_line(error)}") from None


def ask_alike(one: AllocateRequest, other: AllocateRequest) -> bool:
    """Whether two requests ask for the same, in whatever way their numbers are written."""
    first, second = ({name: str(value) for name, value in asked.said().items()} for asked in (one, other))
    return first == second


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


_WHOLE = ("context", "batch", "group_size", "min_key_bits", "recent_tokens", "sink_tokens", "bits_key", "bits_value")
_BESIDE = ("out", "json", "quiet")
"""Options of the command that are none of the request."""


def _of_line(command: str) -> dict[str, Any]:
    words = shlex.split(command)
    if tuple(words[:2]) != WORDS:
        raise InvalidFile("the plan was not made by kvprof allocate")
    parser = _Parser(prog="kvprof allocate", add_help=False, allow_abbrev=False)
    for name in (*AllocateRequest.model_fields, "out"):
        if name not in ("bits", "pin", "as_published"):
            parser.add_argument(as_option(name), dest=name, type=int if name in _WHOLE else str)
    parser.add_argument("--bits", action="append")
    parser.add_argument("--pin", action="append")
    parser.add_argument("--as-published", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quiet", "-q", action="store_true")
    found = vars(parser.parse_args(words[2:]))
    return {name: value for name, value in found.items() if value is not None and name not in _BESIDE}


def _of_call(command: str) -> dict[str, Any]:
    call = ast.parse(command, mode="eval").body
    if not isinstance(call, ast.Call) or ast.unparse(call.func) != CALL:
        raise UsageError("it is no call of kvprof.allocate")
    if [ast.unparse(word) for word in call.args] != ["scores"]:
        raise UsageError("it is called with other than scores and named options")
    found: dict[str, Any] = {}
    for word in call.keywords:
        if word.arg is None:
            raise UsageError("its options are not named")
        if word.arg not in AllocateRequest.model_fields:
            raise UsageError(f"allocate has no option {word.arg}")
        found[word.arg] = ast.literal_eval(word.value)
    return found
