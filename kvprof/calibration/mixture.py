"""Several texts in one: `--data builtin --data self --data my.jsonl:2` -> sequences, taken in turns.

Reads text and cuts it into tokens. The sequences of `self` it leaves open, for whoever has the model to fill in. Does
not know the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from kvprof.calibration.remarks import sequence_remarks
from kvprof.calibration.sequences import (
    CalibrationSet,
    Origin,
    SequenceReader,
    check_largest,
    check_request,
    check_room,
    describe,
)
from kvprof.calibration.spec import USUAL_DATA, Ingredient, configured, exact_weight, parse_data
from kvprof.calibration.text import (
    BUILTIN,
    SELF,
    SPLITS,
    TextSource,
    check_split,
    has_columns,
    has_own_splits,
    in_split,
    is_hub_dataset,
    open_text,
)
from kvprof.calibration.tokens import UNKNOWN, Beginning, beginning_of, vocabulary_size
from kvprof.errors import CalibrationError, UsageError
from kvprof.records.requests.measure import Reading
from kvprof.records.scores import CalibrationInfo

_OURS = (*SPLITS, "all")
"""The splits of a text that kvprof splits itself."""

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class MixedText:
    """The sequences of a mix in their order, those of `self` still open.

    drawn: the place of each one's text among `origins`, and its tokens; None where the model has yet to write it.
    split: of `self`. skipped, notes, readings, vocabulary: as a CalibrationSet has them. beginning: of every sequence.
    """

    drawn: tuple[tuple[int, Tokens | None], ...]
    origins: tuple[Origin, ...]
    sequence_length: int
    seed: int
    split: str
    skipped: int
    notes: tuple[str, ...]
    beginning: Beginning
    readings: tuple[str, ...] = ()
    vocabulary: int | None = None

    @property
    def to_write(self) -> int:
        """How many sequences of its own text the model has to write."""
        return sum(1 for _, ids in self.drawn if ids is None)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, those still open too."""
        return tuple(self.sequence_length if ids is None else len(ids) for _, ids in self.drawn)

    def about_text(self) -> Iterator[str]:
        """Yield what was read, and what of it misleads: of what the model has yet to write, nothing."""
        columns = any(origin.column for origin in self.origins)
        yield from self.readings
        yield from sequence_remarks([ids for _, ids in self.drawn if ids is not None], self.vocabulary, columns)

    def check_vocabulary(self, size: int) -> None:
        """Raise CalibrationError where a model of so large a vocabulary does not know a token."""
        check_largest([self.beginning.ids or (0,), *(ids for _, ids in self.drawn if ids is not None)], size)

    @property
    def is_usual(self) -> bool:
        """Whether these are the texts that are read where none is named."""
        return [(origin.name, origin.weight) for origin in self.origins] == [(name, 1.0) for name in USUAL_DATA]

    def without_own(self, tokenizer: Any, note: str) -> CalibrationSet:
        """Return as many sequences of the usual texts but `self`, as if it had not been named, with a note.

        Raises CalibrationError, with the note, where the others hold too little.
        """
        others = [origin for origin in self.origins if origin.name != SELF]
        mix = _mix(
            [Ingredient(origin.name, exact_weight(origin.weight)) for origin in others],
            [origin.split for origin in others],
            [origin.column for origin in others],
            tokenizer,
            self.beginning,
            len(self.drawn),
            self.sequence_length,
            self.seed,
            pack=False,  # the built-in text always is
        )
        if len(mix.drawn) < len(self.drawn):
            raise CalibrationError(f"{note}.\n  Lower --sequences, or name text of your own with --data.")
        return replace(mix, notes=(*mix.notes, note)).complete()

    def complete(self, written: Sequence[Tokens] = ()) -> CalibrationSet:
        """Return the whole set, its open sequences filled with what the model wrote, in order.

        Raises CalibrationError where that is too little or too much.
        """
        if len(written) != self.to_write:
            raise CalibrationError(
                f"{SELF} is text that the model writes: {self.to_write} sequences are wanted, {len(written)} written."
            )
        own = iter(written)
        sequences = [next(own) if ids is None else ids for _, ids in self.drawn]
        source_of = [place for place, _ in self.drawn]
        begins_with = self.beginning.tokens
        info = describe(sequences, source_of, self.origins, self.sequence_length, self.seed, begins_with)
        return CalibrationSet(tuple(sequences), info, self.skipped, self.notes, self.readings, self.vocabulary)


@dataclass(frozen=True)
class TextRequest:
    """The text that is asked for: at most `sequences` sequences of at most `sequence_length` tokens.

    data: as `ingredients.parse_data` reads it. split: as `open_text` has it, of each text that has it: of several, a
    word that is no split of kvprof's goes to the hub datasets alone, and a split of kvprof's cuts a hub dataset's train
    rows by their hash. usual_split: of the built-in text and of `self`, where none is asked for.
    column: of each text whose rows have columns, as `columns.choose_reading` takes it. config: the configuration of the
    one text that has several.
    """

    data: Sequence[str]
    sequences: int
    sequence_length: int
    split: str | None = None
    seed: int = 0
    pack: bool = False
    usual_split: str = "calibration"
    column: str | None = None
    config: str | None = None

    @classmethod
    def of(cls, asked: Reading, data: Sequence[str], length: int, usual_split: str = "calibration") -> TextRequest:
        """Return what a user asked for, with the text and the length that were chosen where none are named."""
        return cls(
            data,
            asked.most_sequences,
            length,
            split=asked.split,
            seed=asked.seed,
            pack=asked.pack,
            usual_split=usual_split,
            column=asked.column,
            config=asked.config,
        )

    def split_for(self, name: str) -> str | None:
        """Return the split to take of a text; None where nothing is asked for that it has."""
        if has_own_splits(name):
            return self.split
        return self.split if self.split in _OURS else self.usual_split if name in (BUILTIN, SELF) else None


def mix_texts(request: TextRequest, tokenizer: Any) -> MixedText:
    """Take the sequences that are asked for from their texts in turns.

    A mix asked for more sequences begins with the same ones. A text that runs out is made up for by the others. Of a
    single text, the result is that of `tokenize`.
    Raises CalibrationError for a text that cannot be read or holds no sequence, UsageError for what makes no sense.
    """
    check_request(request.sequences, request.sequence_length)
    ingredients = configured(parse_data(request.data), request.config)
    names = [ingredient.name for ingredient in ingredients]
    if request.split not in (None, *_OURS) and not any(map(has_own_splits, names)):
        check_split(str(request.split))
    if request.column is not None and not any(map(has_columns, names)):
        raise UsageError(
            f"--column {request.column!r}: the rows of {', '.join(names)} have no columns.\n  Leave it out."
        )
    beginning = beginning_of(tokenizer)
    check_room(request.sequence_length, beginning)
    return _mix(
        ingredients,
        [request.split_for(name) for name in names],
        [request.column] * len(names),
        tokenizer,
        beginning,
        request.sequences,
        request.sequence_length,
        request.seed,
        request.pack,
    )


def mix_again(info: CalibrationInfo, tokenizer: Any, pack: bool = False) -> MixedText:
    """Take the sequences that a measurement read, by what it wrote down; only its fingerprint can tell whether it did.

    pack: as it was then, which is not written down. Where it is not written down what its sequences began with, windows
    began in the middle of the text.
    """
    beginning = UNKNOWN if info.begins_with is None else beginning_of(tokenizer)
    if info.sources is None:
        ingredients, splits, columns = [Ingredient(info.dataset)], [info.split], [info.column]
    else:
        ingredients = [Ingredient(share.dataset, exact_weight(share.weight)) for share in info.sources]
        splits = [share.split for share in info.sources]
        columns = [share.column for share in info.sources]
    # In the order that was written down: a text whose turn never came is not, and would have moved the others' turns.
    order = info.source_of
    length = info.sequence_length
    return _mix(ingredients, splits, columns, tokenizer, beginning, info.sequences, length, info.seed, pack, order)


def turns(weights: Sequence[Fraction], before: Sequence[int] | None = None) -> Iterator[int]:
    """Yield forever whose turn it is, each as often as its weight says, and as evenly as can be from the first on.

    After k turns, each of n has had its share of k to within 1 - 1 / (2n - 2), which no other order betters.
    before: the turns that each has had already, none by default.
    Source: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980).
    """
    total = sum(weights)
    shares = [weight / total for weight in weights]
    slack = Fraction(1, max(1, 2 * len(weights) - 2))
    had = list(before or [0] * len(weights))
    turn = sum(had)
    while True:
        turn += 1
        due = [place for place, share in enumerate(shares) if share * turn - had[place] >= slack]
        # Of those who may, whoever must first.
        place = min(due, key=lambda place: (had[place] + 1 - slack) / shares[place])
        had[place] += 1
        yield place


def _mix(
    ingredients: Sequence[Ingredient],
    splits: Sequence[str | None],
    columns: Sequence[str | None],
    tokenizer: Any,
    beginning: Beginning,
    sequences: int,
    sequence_length: int,
    seed: int,
    pack: bool,
    order: Sequence[int] | None = None,
) -> MixedText:
    readers: list[SequenceReader | None] = []
    own_split = SPLITS[0]
    for ingredient, split, column in zip(ingredients, splits, columns, strict=True):
        if ingredient.name == SELF:
            readers.append(None)
            own_split = split or own_split
        else:
            source = _open(ingredient.name, split, seed, column, len(ingredients) > 1)
            readers.append(SequenceReader(source, tokenizer, sequence_length, pack, beginning.ids))
    drawn, notes = _draw(ingredients, readers, sequences, order)
    origins = [
        replace(Origin(SELF, own_split) if reader is None else reader.origin, weight=float(ingredient.weight))
        for ingredient, reader in zip(ingredients, readers, strict=True)
    ]
    read = [remark for reader in readers if reader for remark in reader.remarks()]
    return MixedText(
        tuple(drawn),
        tuple(origins),
        sequence_length,
        seed,
        own_split,
        sum(reader.skipped for reader in readers if reader),
        tuple(notes),
        beginning,
        tuple(read),
        vocabulary_size(tokenizer),
    )


def _open(name: str, split: str | None, seed: int, column: str | None, mixed: bool) -> TextSource:
    if not (mixed and is_hub_dataset(name) and split in _OURS):
        return open_text(name, split, seed, column)
    source = open_text(name, None, seed, column)
    return replace(source, split=split, rows=in_split(source.rows, split))


def _draw(
    ingredients: Sequence[Ingredient],
    readers: Sequence[SequenceReader | None],
    sequences: int,
    known: Sequence[int] | None,
) -> tuple[list[tuple[int, Tokens | None]], list[str]]:
    """Take sequences in turns until there are enough or every text has run out; say which ran out.

    known: whose turn it is, for as many sequences, where that is known already.
    """
    left = list(range(len(ingredients)))
    order = turns([ingredient.weight for ingredient in ingredients]) if known is None else iter(known)
    drawn: list[tuple[int, Tokens | None]] = []
    notes = []
    while left and len(drawn) < sequences:
        place = left[next(order)]
        reader = readers[place]
        if reader is None:
            drawn.append((place, None))
            continue
        try:
            drawn.append((place, next(reader)))
        except StopIteration:
            left.remove(place)
            if left:  # where nothing is left, the set says itself what it lacks
                had = Counter(place for place, _ in drawn)
                order = turns([ingredients[other].weight for other in left], [had[other] for other in left])
                notes.append(f"{reader.source.name} ran out after {reader.found} sequences: other text takes its turns")
    for place in sorted(set(range(len(ingredients))) - {place for place, _ in drawn}):
        name = ingredients[place].name
        notes.append(f"none of the {len(drawn)} sequences is of {name}: by its weight, its first turn comes later")
    return drawn, notes
