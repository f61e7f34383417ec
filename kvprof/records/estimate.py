"""What a long step will take, said before it starts.

Plain numbers; does not know how they were reckoned.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A step's tokens, memory, time and disk.

    tokens: of all sequences. memory_bytes: the peak, over what the libraries take. free_bytes: what the device has to
    give. disk_bytes: what is written, files that go again among it. seconds: None where nobody can say.
    """

    sequences: int
    tokens: int
    memory_bytes: int
    free_bytes: int
    disk_bytes: int
    seconds: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the memory is there."""
        return self.memory_bytes <= self.free_bytes
