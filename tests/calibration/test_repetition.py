"""Text that repeats itself is told from text that does not, by numbers that can be counted by hand."""

from __future__ import annotations

import random
from itertools import cycle, islice
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from kvprof.calibration.repetition import FEWEST_TOKENS, repetition_of


def looped(*period: int, tokens: int = 400) -> list[int]:
    return list(islice(cycle(period), tokens))


def test_the_numbers_are_those_counted_by_hand() -> None:
    found = repetition_of([[7] * 48 + [8] * 16, [1, 9] * 32], marks={1})
    assert found.tokens == 128
    assert found.commonest == 48 / 128
    assert found.marks == 32 / 128
    # 47 sevens and 15 eights stand behind one of their kind; all of the second sequence but its first period.
    assert found.repeating == (47 + 15 + 62) / 128
    assert found.entropy_bits == pytest.approx(48 / 128 * 1.4150375 + 16 / 128 * 3 + 2 * 32 / 128 * 2)


@pytest.mark.parametrize("period", [(5,), (5, 6), (1, 2, 3, 4, 5, 6, 7), tuple(range(32))])
def test_a_loop_is_hopeless(period: tuple[int, ...]) -> None:
    assert repetition_of([looped(*period)]).is_hopeless


def test_documents_that_hold_nothing_are_hopeless() -> None:
    assert repetition_of([[2] * 100], {2}).is_hopeless
    assert repetition_of([looped(1, 2)], {1, 2}).is_hopeless


def test_one_token_nearly_everywhere_is_hopeless_wherever_the_others_stand() -> None:
    draw = random.Random(0)
    assert repetition_of([[7 if draw.random() < 0.93 else draw.randrange(1000) for _ in range(900)]]).is_hopeless


def test_text_of_which_a_half_repeats_is_high_but_not_hopeless() -> None:
    draw = random.Random(0)
    half = repetition_of([[draw.randrange(1000) for _ in range(300)] + looped(4, 5, 6, tokens=300)])
    assert half.is_high
    assert not half.is_hopeless
    assert "50% only repeat those before them" in str(half)


@pytest.mark.parametrize("kind", ["words", "bytes", "source code", "noise", "DNA"])
def test_natural_text_and_noise_are_neither(kind: str) -> None:
    prose = " ".join(topics[name] for name in sorted(topics)[:30])
    draw = random.Random(1)
    numbers: dict[str, int] = {}
    found = {
        "words": [numbers.setdefault(word, len(numbers)) for word in prose.split()],
        "bytes": list(prose.encode()[:8000]),
        "source code": list(Path(random.__file__).read_bytes()[:8000]),
        "noise": [draw.randrange(96) for _ in range(1000)],
        "DNA": [draw.randrange(4) for _ in range(1000)],
    }[kind]
    repetition = repetition_of([found])
    assert not repetition.is_high, str(repetition)
    assert not repetition.is_hopeless


def test_a_few_tokens_are_too_few_to_judge_by() -> None:
    assert not repetition_of([[3] * (FEWEST_TOKENS - 1)]).is_high
    assert not repetition_of([]).is_hopeless
    assert repetition_of([[3] * FEWEST_TOKENS]).is_hopeless
