"""A model that was found, and what transformers loads of it: read with care, silently, its failures in one message."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PretrainedConfig, PreTrainedModel

from kvprof.errors import KvprofError, ModelError, first_line, is_out_of_memory
from kvprof.models.checkpoint.hub import fetch_from_hub
from kvprof.models.checkpoint.validation import check_config, refuse_adapter
from kvprof.models.decoder import loading_class
from kvprof.models.own_code import check_code, find_code, refused_code
from kvprof.models.packages import plain_weights
from kvprof.models.quiet import quiet

NAME_A_TOKENIZER = (
    "Say whose to take: --tokenizer NAME (a hub id, a folder or a .gguf file; in Python tokenizer=NAME), or copy its "
    "files there."
)


@dataclass(frozen=True)
class ModelSource:
    """A model that was found: its id as the user wrote it, and the files it consists of.

    path: a folder with config.json, or a .gguf file; None for a hub id, whose files `fetch` brings. live: of the kind
    `loaded`, the model itself and its tokenizer; such a model is lent, and not moved, cast or changed.
    trusts_code: whether the user lets Python code that comes with it run. tokenizer_source: whose tokenizer is taken
    instead of its own.
    """

    id: str
    kind: Literal["demo", "folder", "gguf", "hub", "loaded"]
    path: Path | None = None
    hub_id: str | None = None
    live: PreTrainedModel | None = field(default=None, repr=False, compare=False)
    tokenizer: Any = field(default=None, repr=False, compare=False)
    trusts_code: bool = False
    tokenizer_source: ModelSource | None = field(default=None, repr=False)

    def fetch(self, weights: bool) -> Path:
        """Return a local folder (or GGUF file) with the config and tokenizer, and the weights where asked.

        A hub id is downloaded into the hub's own cache, once. Raises ModelError when it is unknown or out of reach.
        """
        if self.path is not None:
            return self.path
        assert self.hub_id is not None
        return fetch_from_hub(self.hub_id, weights, self.trusts_code)


def loading_arguments(source: ModelSource, place: Path, tokenizer: bool = False) -> dict[str, Any]:
    """Return the from_pretrained arguments for a folder or a GGUF file, looked through before it is opened.

    Nothing from a checkpoint is run, but for code that it cannot do without and that the user trusts.
    """
    if place.is_file():
        check_config(place)
        given = {"pretrained_model_name_or_path": str(place.parent), "gguf_file": place.name}
        return given | {"trust_remote_code": False}  # else transformers asks, about files beside it
    check_config(place)
    if not tokenizer:
        refuse_adapter(place, source.id)
    trusted = check_code(place, source.id, source.trusts_code)
    if tokenizer:
        trusted = check_code(place, source.id, source.trusts_code, tokenizer=True) or trusted
    return {"pretrained_model_name_or_path": str(place), "trust_remote_code": trusted}


def from_pretrained(source: ModelSource, config: PretrainedConfig, arguments: dict[str, Any]) -> PreTrainedModel:
    """Let transformers load a model. Raises ModelError where it cannot, or would make weights up."""
    with explained(source), silent():
        kind, part = loading_class(config)
        if part is not config:
            arguments = arguments | {"config": part}
        model, told = kind.from_pretrained(**arguments, output_loading_info=True)
    if missing := sorted(told["missing_keys"]):
        raise ModelError(
            f"the checkpoint of {source.id} lacks {missing[0]}{_and_others(missing)}: transformers would make up "
            "random weights.\n  Download it again, or name the checkpoint that has them."
        )
    with explained(source), silent():
        return plain_weights(model)


def _and_others(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


@contextlib.contextmanager
def explained(source: ModelSource, what: str = "model") -> Iterator[None]:
    """Turn the many ways in which transformers fails to load into one message."""
    try:
        yield
    except KvprofError:
        raise
    except Exception as error:  # files from anywhere, parsed by a dozen libraries
        if is_out_of_memory(error):
            raise ModelError(
                f"out of memory while loading the {what} of {source.id}.\n"
                "  Try --dtype bfloat16, --device cpu, or --stream, which holds one block at a time."
            ) from None
        if type(error).__name__ == "SafetensorError":
            raise ModelError(f"the checkpoint of {source.id} is truncated or corrupt: {first_line(error)}") from None
        if "custom code" in str(error):
            place = source.path
            code = find_code(place, tokenizer=what == "tokenizer") if place is not None and place.is_dir() else None
            raise refused_code(source.id, code) from None
        advice = f"\n  {NAME_A_TOKENIZER}" if what == "tokenizer" else ""
        raise ModelError(f"cannot load the {what} of {source.id}: {first_line(error)}{advice}") from None


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep all that loading prints off the screen: the GGUF reader's bar has no switch."""
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        yield
