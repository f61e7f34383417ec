"""`self`: calibration text that the model writes itself, sampled once and found again.

Reads a loaded model; reads and writes the sampled token ids in the user's cache folder. A sequence follows from the
model, the seed, the split and its number alone, so that asking for more never changes those before. Does not know other
texts, nor where the model came from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel

from kvprof.calibration.ingredients import USUAL_DATA, parse_data
from kvprof.calibration.mix import MixedText
from kvprof.calibration.sampling import sample_tokens
from kvprof.calibration.sequences import CalibrationSet
from kvprof.calibration.text import SELF
from kvprof.errors import OutputError, UsageError
from kvprof.records.runs import cache_folder, write_atomically

logger = logging.getLogger(__name__)

ROWS = 16
"""Sequences that are written side by side."""

TOKENS_AT_ONCE = 2**13
"""Tokens whose keys and values a batch may hold: of longer sequences, fewer are written side by side."""

STREAMED_BYTES = 4e12
"""Of weights, what may be read to write text where they are not kept in memory: an hour's worth."""

_LOOKS = 64
"""Numbers of each weight that tell one model from another."""

Sequences = list[tuple[int, ...]]


def streamable(data: Sequence[str], sequences: int, length: int, weight_bytes: int) -> tuple[str, ...]:
    """Return the texts that a model whose blocks are loaded one at a time is measured on.

    Each token that it writes itself takes all of its weights once more. Where that is too much, `self` is left out of
    the usual texts, with a note. Raises UsageError where it was asked for.
    """
    rows = max(1, min(ROWS, TOKENS_AT_ONCE // length))
    if SELF not in {ingredient.name for ingredient in parse_data(data)}:
        return tuple(data)
    written = -(-sequences // rows) * length * weight_bytes
    if written <= STREAMED_BYTES:
        return tuple(data)
    why = f"to write {length} tokens, the weights would be read {written / weight_bytes:,.0f} times"
    if tuple(data) != USUAL_DATA:
        raise UsageError(f"--stream and --data self: {why}.\n  Name other text, or leave out --stream.")
    rest = tuple(name for name in data if name != SELF)
    logger.info("%s: the text is %s alone", why, ", ".join(rest))
    return rest


def fill(
    mix: MixedText,
    model: PreTrainedModel,
    tokenizer: Any,
    fingerprint: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CalibrationSet:
    """Return a mix with what the model writes itself; the arguments are those of `write_text`."""
    if not mix.to_write:
        return mix.complete()
    own = write_text(model, tokenizer, fingerprint, mix.split, mix.to_write, mix.sequence_length, mix.seed, progress)
    return mix.complete(own)


def write_text(
    model: PreTrainedModel,
    tokenizer: Any,
    fingerprint: str,
    split: str,
    sequences: int,
    length: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sequences:
    """Return the first sequences of the model's own text, each of exactly `length` tokens; sample those not yet kept.

    A sequence is the model's beginning-of-text token (else its end-of-text token, else a random token of the
    vocabulary) and what follows it at temperature 1, nothing cut off the distribution and nothing penalised. After an
    end-of-text token the model goes on with a text of its own choice.

    model: in eval mode; left as it was found, and so is every global random state. fingerprint: of its checkpoint.
    split: `calibration` or `held-out`, sampled apart; `all` takes three of the one, then one of the other.
    progress: called with (tokens written, tokens to write), where there are any.
    The text is kept in the user's cache folder, batch by batch: a stopped run loses the batch that it was at. Batches
    are always whole, so that the text is the same to the last token however many sequences are asked for at a time.
    Raises CalibrationError where the model cannot write text.
    """
    order = [split] * sequences
    if split == "all":
        order = ["held-out" if index % 4 == 3 else "calibration" for index in range(sequences)]
    setup = _Setup(
        model=fingerprint,
        weights=_weights_digest(model),
        config=_config_digest(model),
        dtype=str(model.dtype).removeprefix("torch."),
        first_token=first_token(tokenizer, model),
        length=length,
        rows=max(1, min(ROWS, TOKENS_AT_ONCE // length)),
        seed=seed,
        split=split,
    )
    kept = {name: _Kept(replace(setup, split=name)) for name in dict.fromkeys(order)}
    batches = [name for name in kept for _ in range(kept[name].batches_to(order.count(name)))]
    done, total = 0, len(batches) * setup.rows * length

    def step() -> None:
        nonlocal done
        done += setup.rows
        progress(done, total)

    if batches:
        logger.info("the model writes %d sequences of %d tokens, once: kept in %s", total // length, length, _folder())
        progress(0, total)
    for name in batches:
        kept[name].add(_write_batch(model, kept[name], step))
    found = {name: iter(kept[name].sequences) for name in kept}
    return [next(found[name]) for name in order]


def first_token(tokenizer: Any, model: PreTrainedModel) -> int | None:
    """Return the token that a text of the model's begins with: beginning of text, else end of text, else None.

    The tokenizer knows it better than the config, where a token of another vocabulary may have been left over.
    """
    config = model.config.get_text_config(decoder=True)
    for name in ("bos_token_id", "eos_token_id"):
        for owner in (tokenizer, config):
            value = getattr(owner, name, None)
            for token in value if isinstance(value, list | tuple) else [value]:
                if isinstance(token, int) and 0 <= token < config.vocab_size:
                    return token
    return None


def _write_batch(model: PreTrainedModel, kept: _Kept, step: Callable[[], None]) -> Sequences:
    """Sample the batch of sequences that follows those kept, each from random numbers of its own."""
    setup, start = kept.setup, len(kept.sequences)
    numbers = [Random(f"{setup.seed}/{setup.split}/{start + row}") for row in range(setup.rows)]
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    first = [row.randrange(vocabulary) if setup.first_token is None else setup.first_token for row in numbers]
    draws = torch.tensor([[row.random() for _ in range(setup.length - 1)] for row in numbers], dtype=torch.float64)
    step()  # the first tokens
    return [tuple(ids) for ids in sample_tokens(model, first, draws, step).tolist()]


@dataclass(frozen=True)
class _Setup:
    """All that a text follows from; rows, because a forward of fewer rows rounds otherwise."""

    model: str
    weights: str | None
    config: str
    dtype: str
    first_token: int | None
    length: int
    rows: int
    seed: int
    split: str


class _Kept:
    """The sequences of one kind that are on the disk: one file, written whole with each batch.

    A file that is damaged, or not what its name says, counts as none and is written anew.
    """

    def __init__(self, setup: _Setup) -> None:
        self.setup = setup
        name = hashlib.sha256(json.dumps(asdict(setup)).encode()).hexdigest()[:24]
        self.path = _folder() / f"{name}.json"
        self.sequences = self._read()

    def batches_to(self, sequences: int) -> int:
        """Return how many batches are missing for so many sequences."""
        return max(0, math.ceil((sequences - len(self.sequences)) / self.setup.rows))

    def add(self, batch: Sequences) -> None:
        """Take in a finished batch, on the disk when this returns; a place that cannot be written is only a pity."""
        self.sequences += batch
        body = {"setup": asdict(self.setup), "sequences": self.sequences}
        try:
            write_atomically(self.path, json.dumps({"checksum": _checksum(body), **body}) + "\n")
        except OutputError as error:
            logger.warning(
                "%s\nThe text will be sampled again by the next command, unless KVPROF_CACHE names another folder.",
                str(error).splitlines()[0],
            )

    def _read(self) -> Sequences:
        try:
            value = json.loads(self.path.read_bytes())
            body = {"setup": value["setup"], "sequences": value["sequences"]}
            if value["checksum"] != _checksum(body) or body["setup"] != asdict(self.setup):
                raise ValueError("not what was written")
            return [tuple(ids) for ids in body["sequences"]]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            logger.info("%s is damaged: the model writes its text anew", self.path)
            return []


def _folder() -> Path:
    return cache_folder() / "self"


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def _weights_digest(model: PreTrainedModel) -> str | None:
    """Return a hash over a few numbers of every weight: a fingerprint of K and V alone sees no other change."""
    digest = hashlib.sha256()
    weights = dict(model.named_parameters())
    if any(weight.is_meta for weight in weights.values()):
        return None  # offloaded, each time others: the fingerprint must do
    stored = getattr(model, "stored_weight", weights.__getitem__)  # of weights that are there only while they are used
    for name in weights:
        weight = stored(name)
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        if weight.numel():
            numbers = weight.detach().reshape(-1)[:: -(-weight.numel() // _LOOKS)]
            digest.update(numbers.cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _config_digest(model: PreTrainedModel) -> str:
    """Return a hash over the config, less what says where it came from: a changed rope writes another text."""

    def without_origin(part: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in part.items() if key[0] != "_" and key != "transformers_version"}

    config = json.loads(model.config.to_json_string(use_diff=False), object_hook=without_origin)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
