"""What a long step will take, said before it starts.

Plain numbers; does not know how they were reckoned.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvprof.records.document import Count, Number, Record, Text


class Estimate(Record):
    """A step's tokens, memory, time and disk."""

    memory_bytes: Count
    """The peak, over what the libraries take."""
    free_bytes: Count
    """What the device has to give."""
    disk_bytes: Count
    """What is written, files that go again among it."""
    sequences: Count | None = None
    tokens: Count | None = None
    read_bytes: Count | None = None
    """Of a checkpoint, where only parts of it are read."""
    seconds: Number | None = None
    """None where nobody can say."""
    writing_seconds: Number | None = None
    """Added where text that the model writes itself is not kept from an earlier run; None where none is wanted."""

    text: tuple[Text, ...] = ()
    """What is read of the text, and what of it misleads."""

    def about(self, text: Iterable[str]) -> Estimate:
        """Return the estimate with what is known of the text."""
        return self.model_copy(update={"text": tuple(text)})

    @property
    def fits(self) -> bool:
        """Whether the memory is there."""
        return self.memory_bytes <= self.free_bytes
