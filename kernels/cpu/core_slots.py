"""The memory in which workers of one machine tell each other that they compute: source/cores.h has its
meaning. It is a file with a slot for each worker, all zeros at first: nobody computes.
"""

import ctypes
import mmap
from pathlib import Path

SLOT_BYTES = 64


class CoreSlots:
    """The slots, mapped, for the worker that has number `slot`."""

    def __init__(self, path: Path, slot: int) -> None:
        """Raises OSError, or ValueError if there is no such slot."""
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self.workers = len(self._memory) // SLOT_BYTES
        self.slot = slot
        if not 0 <= slot < self.workers:
            raise ValueError(f"{path} has {self.workers} slots, none with the number {slot}")
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
