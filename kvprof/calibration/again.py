"""The text that scores were measured on, read a second time.

Reads what a Scores file says of its text; knows it again by the fingerprint of its token ids. What the model wrote
itself is left to whoever has the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvprof.calibration.mixture import MixedText, mix_again
from kvprof.calibration.sequences import CalibrationSet
from kvprof.errors import CalibrationError
from kvprof.records.scores import CalibrationInfo


def read_again(info: CalibrationInfo, tokenizer: Any) -> tuple[MixedText, ...]:
    """Return the ways to read a text that a measurement may have had: rows one by one, or packed.

    Which of the two it was is not written down, but shows in the fingerprint.
    Raises CalibrationError, saying what was looked for, where the text is gone.
    """
    found, problem = [], None
    for pack in (False, True):
        try:
            found.append(mix_again(info, tokenizer, pack))
        except CalibrationError as error:
            problem = problem or error
    if not found:
        raise CalibrationError(f"the text that the scores were measured on cannot be read again.\n  {problem}")
    return tuple(found)


def recognise(
    info: CalibrationInfo, readings: Sequence[MixedText], fill: Callable[[MixedText], CalibrationSet]
) -> tuple[CalibrationSet, bool]:
    """Return the sequences that a measurement read, and whether they are known to be the very same.

    They are not where a text has changed since, or where nothing says what it held; the first reading then serves.
    fill: writes what is left open in a reading.
    """
    sets = []
    for reading in readings:
        text = fill(reading)
        if text.info.fingerprint == info.fingerprint:
            return text, True
        sets.append(text)
    return sets[0], False
