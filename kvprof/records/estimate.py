"""What a long step will take, said before it starts.

Plain numbers; does not know how they were reckoned.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A step's tokens, memory, time and disk.

    memory_bytes: the peak, over what the libraries take. free_bytes: what the device has to give. disk_bytes: what is
    written, files that go again among it. sequences, tokens: of text, where there is any. read_bytes: of a checkpoint,
    where only parts of it are read. seconds: None where nobody can say.
    """

    memory_bytes: int
    free_bytes: int
    disk_bytes: int
    sequences: int | None = None
    tokens: int | None = None
    read_bytes: int | None = None
    seconds: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the memory is there."""
        return self.memory_bytes <= self.free_bytes
