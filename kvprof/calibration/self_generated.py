"""`self`: calibration text that the model writes itself, sampled once and found again.

Reads a loaded model; reads and writes the sampled token ids in the user's cache folder. A sequence is documents of the
model, one after the other; it follows from the model, the seed, the split and its number alone, so that asking for more
never changes those before. Does not know where the model came from.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedModel

from kvprof.calibration.mixture import MixedText
from kvprof.calibration.repetition import repetition_of
from kvprof.calibration.sampling import sample_documents
from kvprof.calibration.sequences import CalibrationSet
from kvprof.calibration.spec import USUAL_DATA, parse_data
from kvprof.calibration.text import SELF
from kvprof.errors import CalibrationError, OutputError, UsageError
from kvprof.storage.atomic import write_atomically
from kvprof.storage.folders import cache_folder

logger = logging.getLogger(__name__)

ROWS = (4, 4, 8, 16)
"""Sequences that are written side by side, batch after batch, the last number for all further batches: so few at first
that a measurement on a few sequences waits for no others."""

DOCUMENTS_AT_ONCE = (2, 8)
"""Documents of a sequence that are written side by side: at first, and at most once it is known how long they are. One
after the other, those that end soon would each take forwards of their own; beside a long one, the next are of no use.
Together they never hold more tokens than the sequence has."""

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
    the usual texts, with a note. How often documents end, and others are begun, nobody knows before: not counted.
    Raises UsageError where it was asked for.
    """
    if SELF not in {ingredient.name for ingredient in parse_data(data)}:
        return tuple(data)
    written = len(_batches(0, sequences, length)) * length * weight_bytes
    if written <= STREAMED_BYTES:
        return tuple(data)
    why = f"to write {length} tokens, the weights would be read {written / weight_bytes:,.0f} times"
    if tuple(data) != USUAL_DATA:
        raise UsageError(f"--stream and --data self: {why}.\n  Name other text, or leave out --stream.")
    rest = tuple(name for name in data if name != SELF)
    logger.info("%s: the text is %s alone", why, ", ".join(rest))
    return rest


def batches_of(mix: MixedText) -> list[int]:
    """Return the sequences of each batch that the model writes for a mix, where none of its text is kept."""
    own = [mix.to_write]
    if mix.split == "all":  # as `write_text` divides them
        own = [mix.to_write - mix.to_write // 4, mix.to_write // 4]
    return [rows for sequences in own for rows in _batches(0, sequences, mix.sequence_length)]


def fill(
    mix: MixedText,
    model: PreTrainedModel,
    tokenizer: Any,
    fingerprint: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CalibrationSet:
    """Return a mix with what the model writes itself; the arguments are those of `write_text`.

    Text that repeats itself is remarked on. Where it holds next to nothing else, the usual texts go without it, with a
    note, and the built-in text takes its turns. Raises CalibrationError where it was asked for.
    """
    if not mix.to_write:
        return mix.complete()
    opening = mix.beginning.ids
    own = write_text(
        model, tokenizer, fingerprint, mix.split, mix.to_write, mix.sequence_length, mix.seed, opening, progress
    )
    found = repetition_of(own, marks_of(tokenizer, model) | set(opening))
    if found.is_hopeless:
        if not mix.is_usual:
            raise CalibrationError(
                f"the model's own text holds nothing to measure on: {found}.\n"
                "  Leave `self` out of --data, and name text of your own."
            )
        return mix.without_own(
            tokenizer, f"{SELF} is left out: the model's own text holds nothing to measure on, {found}"
        )
    text = mix.complete(own)
    if found.is_high:
        note = f"the model's own text repeats itself, and text of your own would measure better: {found}"
        text = replace(text, notes=(*text.notes, note))
    return text


def write_text(
    model: PreTrainedModel,
    tokenizer: Any,
    fingerprint: str,
    split: str,
    sequences: int,
    length: int,
    seed: int = 0,
    opening: Sequence[int] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sequences:
    """Return the first sequences of the model's own text, each of exactly `length` tokens; sample those not yet kept.

    A sequence is documents, one behind the other, cut at the length. A document is its opening and what follows it at
    temperature 1, nothing cut off the distribution and nothing penalised, up to the token that ends it; none has read
    another. An opening that is the token which ended the document before stands there once.

    model: in eval mode; left as it was found, and so is every global random state. fingerprint: of its checkpoint.
    split: `calibration` or `held-out`, sampled apart; `all` takes three of the one, then one of the other.
    opening: what the tokenizer puts before a text. Where that is nothing, `first_token`, else a random token of the
    vocabulary, opens each document. progress: called with (tokens written, tokens to write), where there are any.
    The text is kept in the user's cache folder, batch by batch: a stopped run loses the batch that it was at. Batches
    are always whole, so that the text is the same to the last token however many sequences are asked for at a time.
    Raises CalibrationError where the model cannot write text.
    """
    order = [split] * sequences
    if split == "all":
        order = ["held-out" if index % 4 == 3 else "calibration" for index in range(sequences)]
    first = first_token(tokenizer, model)
    setup = _Setup(
        model=fingerprint,
        weights=_weights_digest(model),
        config=_config_digest(model),
        dtype=str(model.dtype).removeprefix("torch."),
        opening=list(opening) or ([] if first is None else [first]),
        ends=sorted(end_tokens(tokenizer, model)),
        length=length,
        batches=[_rows(number, length) for number in range(len(ROWS))],
        documents_at_once=list(DOCUMENTS_AT_ONCE),
        seed=seed,
        split=split,
    )
    kept = {name: _Kept(replace(setup, split=name)) for name in dict.fromkeys(order)}
    batches = [(name, rows) for name in kept for rows in _batches(len(kept[name].sequences), order.count(name), length)]
    done, total = 0, sum(rows for _, rows in batches) * length

    def step(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done, total)

    if batches:
        logger.info("the model writes %d sequences of %d tokens, once: kept in %s", total // length, length, _folder())
        progress(0, total)
    for name, rows in batches:
        kept[name].add(_write_batch(model, kept[name], rows, step))
    found = {name: iter(kept[name].sequences) for name in kept}
    return [next(found[name]) for name in order]


def _rows(number: int, length: int) -> int:
    """Return how many sequences a batch writes side by side, by its number from 0."""
    return max(1, min(ROWS[min(number, len(ROWS) - 1)], TOKENS_AT_ONCE // length))


def _batches(kept: int, sequences: int, length: int) -> list[int]:
    """Return the sizes of the batches that are missing for so many sequences, where some are kept, in whole batches."""
    missing = []
    start = number = 0
    while start < max(kept, sequences):
        rows = _rows(number, length)
        if start >= kept:
            missing.append(rows)
        start, number = start + rows, number + 1
    return missing


def first_token(tokenizer: Any, model: PreTrainedModel) -> int | None:
    """Return the token that a text of the model's begins with: beginning of text, else end of text, else None.

    The tokenizer knows it better than the config, where a token of another vocabulary may have been left over.
    """
    config = model.config.get_text_config(decoder=True)
    for name in ("bos_token_id", "eos_token_id"):
        for owner in (tokenizer, config):
            for token in _tokens_named(owner, name, config.vocab_size):
                return token
    return None


def end_tokens(tokenizer: Any, model: PreTrainedModel) -> set[int]:
    """Return the tokens that end a text, by the tokenizer, the config or the generation config."""
    config = model.config.get_text_config(decoder=True)
    owners = (tokenizer, config, model.config, getattr(model, "generation_config", None))
    return {token for owner in owners for token in _tokens_named(owner, "eos_token_id", config.vocab_size)}


def marks_of(tokenizer: Any, model: PreTrainedModel) -> set[int]:
    """Return the tokens that say where a text begins and ends, and nothing else."""
    first = first_token(tokenizer, model)
    return end_tokens(tokenizer, model) | (set() if first is None else {first})


def _tokens_named(owner: Any, name: str, vocabulary: int) -> list[int]:
    value = getattr(owner, name, None)
    tokens = value if isinstance(value, list | tuple) else [value]
    return [token for token in tokens if isinstance(token, int) and 0 <= token < vocabulary]


def _write_batch(model: PreTrainedModel, kept: _Kept, rows: int, step: Callable[[int], None]) -> Sequences:
    """Sample the batch of sequences that follows those kept, some documents of each at a time."""
    setup, start = kept.setup, len(kept.sequences)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    texts: list[list[int]] = [[] for _ in range(rows)]
    numbers = [0] * rows  # of each sequence's next document
    side_by_side = DOCUMENTS_AT_ONCE[0]
    counted = 0

    def count(tokens: int) -> None:
        nonlocal counted
        if tokens:
            counted += tokens
            step(tokens)

    while short := [row for row in range(rows) if len(texts[row]) < setup.length]:
        places = [(row, place) for row in short for place in range(side_by_side)]
        draws = [Random(f"{setup.seed}/{setup.split}/{start + row}/{numbers[row] + place}") for row, place in places]
        openings = [setup.opening or [own.randrange(vocabulary)] for own in draws]
        opened = len(openings[0])
        for row, opening in zip(short, openings[::side_by_side], strict=True):
            _drop_ending(texts[row], opening)
        count(sum(min(len(text) + opened, setup.length) for text in texts) - counted)
        # Each further document may take the place of an ending that its opening stands for.
        limits = [max(setup.length - len(texts[row]), opened) + place * opened for row, place in places]
        documents = sample_documents(
            model, openings, limits, [own.random for own in draws], setup.ends, count, [row for row, _ in places]
        )
        for (row, _), opening, document in zip(places, openings, documents, strict=True):
            if document and len(texts[row]) < setup.length:
                _drop_ending(texts[row], opening)
                texts[row] = (texts[row] + document)[: setup.length]
                numbers[row] += 1
        count(sum(map(len, texts)) - counted)
        left = setup.length - min(map(len, texts))
        side_by_side = min(max(-(-left * sum(numbers) // counted), 1), DOCUMENTS_AT_ONCE[1])
    return [tuple(ids) for ids in texts]


def _drop_ending(text: list[int], opening: list[int]) -> None:
    """Take what ended the document before off a text, where it opens the next one too."""
    if text[-len(opening) :] == opening:
        del text[-len(opening) :]


@dataclass(frozen=True)
class _Setup:
    """All that a text follows from; the sizes of batches, because a forward of fewer rows rounds otherwise."""

    model: str
    weights: str | None
    config: str
    dtype: str
    opening: list[int]
    ends: list[int]
    length: int
    batches: list[int]
    documents_at_once: list[int]
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
