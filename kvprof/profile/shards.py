"""Partial scores: what one of several machines measured, and the whole scores that they make together.

Reads and makes Scores; does not know how a sequence is measured, nor where files are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvprof.errors import InvalidFile, Mismatch, UsageError
from kvprof.records.formats import TENSORS, TensorName
from kvprof.records.sampled import TensorSamples, gradient_scores
from kvprof.records.scores import AnyLayerScores, CalibrationInfo, LatentScores, Scores, Shard, layer_scores


@dataclass(frozen=True)
class Share:
    """One of several equal parts of a text: `2/8` has the sequences 1, 9, 17 ... (the first is 0)."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def indices(self, sequences: int) -> tuple[int, ...]:
        """Return which sequences of a text are this one's; raises UsageError where there are none."""
        if self.number > sequences:
            raise UsageError(f"--shard {self}: the text has {sequences} sequences, and none is left for this shard.")
        return tuple(range(self.number - 1, sequences, self.of))


def read_share(text: str) -> Share:
    """Read `2/8`; raises UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text, re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text}: write 2/8 for the second of eight shards, from 1/8 to 8/8.")
    return Share(int(match[1]), int(match[2]))


def as_shard(
    scores: Scores,
    samples: Mapping[tuple[int, TensorName], TensorSamples],
    share: Share,
    sequences: Sequence[int],
    text: CalibrationInfo,
    settings: Mapping[str, Any],
) -> Scores:
    """Return the scores of some sequences as one shard of many: with each sequence's norm, and sealed.

    sequences: their places in the whole text. settings: what every shard must share.
    """
    shard = Shard(
        number=share.number,
        of=share.of,
        sequences=tuple(sequences),
        text=text,
        settings=json.loads(json.dumps(settings)),
    )

    def with_samples(entry: AnyLayerScores) -> AnyLayerScores:
        key, value = (
            entry.tensor(tensor).model_copy(
                update={"gradient_norm_samples": tuple(samples[entry.layer, tensor].gradient_norms)}
            )
            for tensor in TENSORS
        )
        return layer_scores(entry.layer, key, value, isinstance(entry, LatentScores))

    layers = tuple(map(with_samples, scores.layers))
    open_ = scores.model_copy(update={"layers": layers, "shard": shard})
    return open_.model_copy(update={"shard": shard.model_copy(update={"checksum": seal(open_)})})


def seal(scores: Scores) -> str:
    """Return the checksum of a shard's file, whatever checksum stands in it."""
    fields = scores.model_dump(mode="json", by_alias=True)
    fields["shard"] = {name: value for name, value in fields["shard"].items() if name != "checksum"}
    return "sha256:" + hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def merge_shards(files: Mapping[Path, Scores]) -> Scores:
    """Return the scores of the whole text, to the last bit those of one run over all of it.

    files: the shards, by where they were read from.
    Raises InvalidFile for a file that is no shard, was altered, or has a sequence that another has too, and where a
    sequence is in none; Mismatch for shards of different models, texts or settings, naming the field that differs.
    """
    shards = {path: _sealed(path, scores) for path, scores in files.items()}
    first_path, first = next(iter(shards.items()))
    example = files[first_path]
    holder: dict[int, Path] = {}
    for path, shard in shards.items():
        _check_alike(first_path, _shared(example, first), path, _shared(files[path], shard))
        for index in shard.sequences:
            if index in holder:
                raise InvalidFile(
                    f"{holder[index]} and {path} both measured sequence {index}.\n  Name each shard once."
                )
            holder[index] = path
    if lacking := first.text.sequences - len(holder):
        missing = next(index for index in range(first.text.sequences) if index not in holder)
        raise InvalidFile(
            f"sequence {missing} of {first.text.sequences} is in none of these files"
            + (f", nor are {lacking - 1} others" if lacking > 1 else "")
            + f".\n  Measure what is missing: kvprof gradients ... --shard {missing % first.of + 1}/{first.of}"
        )
    return _whole(files, shards)


def _sealed(path: Path, scores: Scores) -> Shard:
    if scores.shard is None:
        raise InvalidFile(f"{path} is no shard: its scores are whole.\n  Name only the files that --shard wrote.")
    if any(
        entry.tensor(tensor).loss_increase and scores.effects is None for entry in scores.layers for tensor in TENSORS
    ):
        raise InvalidFile(f"{path} was written by an older kvprof: it has losses, but no effects.\n  Measure it again.")
    if scores.shard.checksum != seal(scores):
        raise InvalidFile(f"{path} is not as it was written: its checksum does not fit.\n  Measure this shard again.")
    return scores.shard


def _shared(scores: Scores, shard: Shard) -> dict[str, Any]:
    """Return what all shards of a measurement must have alike, by name."""
    formats = {
        (entry.layer, tensor): tuple(entry.tensor(tensor).loss_effects or ())
        for entry in scores.layers
        for tensor in TENSORS
    }
    decoding = None if scores.decoding is None else scores.decoding.model_copy(update={"tokens": 1})
    text = {f"the text's {name}": value for name, value in shard.text.model_dump().items()}
    own = {
        "the model itself": scores.model,
        "geometry": scores.geometry,
        "decoding": decoding,
        "formats of the layers": formats,
        "block tokens": None if scores.effects is None else scores.effects.block_tokens,
    }
    return shard.settings | text | own


def _check_alike(first_path: Path, first: dict[str, Any], path: Path, shard: dict[str, Any]) -> None:
    """Raise Mismatch, naming the field, where two shards are not of the same measurement."""
    for field in dict.fromkeys([*first, *shard]):  # in the order they were given
        one, other = (fields.get(field) for fields in (first, shard))
        if one != other:
            raise Mismatch(
                f"{path} does not belong to {first_path}: they differ in {field}, {other} and {one}.\n"
                "  Shards are merged that one command made, but for --shard."
            )


def _whole(files: Mapping[Path, Scores], shards: Mapping[Path, Shard]) -> Scores:
    text = next(iter(shards.values())).text
    example = next(iter(files.values()))
    assert example.geometry is not None
    assert example.model is not None
    samples = {
        (shape.layer, tensor): _joined(
            [(shards[path].sequences, _entry(scores, shape.layer), tensor) for path, scores in files.items()]
        )
        for shape in example.geometry.scored
        for tensor in TENSORS
    }
    decoding = example.decoding
    if decoding is not None:
        tokens = sum(scores.decoding.tokens for scores in files.values() if scores.decoding is not None)
        decoding = decoding.model_copy(update={"tokens": tokens})
    block_tokens = 1 if example.effects is None else example.effects.block_tokens
    counted: dict[int, int] = {}
    for path, scores in files.items():
        if scores.effects is not None:
            counted |= dict(zip(shards[path].sequences, scores.effects.tokens, strict=True))
    in_order = [counted[index] for index in sorted(counted)]
    whole = gradient_scores(samples, text, example.model, example.geometry, decoding, block_tokens, in_order)
    alike = all(scores.made_with == example.made_with for scores in files.values())
    return whole.model_copy(update={"made_with": example.made_with if alike else None})


def _entry(scores: Scores, layer: int) -> AnyLayerScores:
    entry = scores.entry(layer)
    assert entry is not None
    return entry


def _joined(parts: list[tuple[tuple[int, ...], AnyLayerScores, TensorName]]) -> TensorSamples:
    """Return one tensor's numbers in the text's order."""
    norms: dict[int, float] = {}
    effects: dict[str, dict[int, str]] = {}
    for indices, entry, tensor in parts:
        own = entry.tensor(tensor)
        norms |= dict(zip(indices, own.gradient_norm_samples or (), strict=True))
        for name, texts in (own.loss_effects or {}).items():
            effects.setdefault(name, {}).update(zip(indices, texts, strict=True))
    order = sorted(norms)
    return TensorSamples(
        [norms[index] for index in order],
        {name: [texts[index] for index in order] for name, texts in effects.items()},
    )
