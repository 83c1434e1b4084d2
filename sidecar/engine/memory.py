"""One budget of bytes for all that calls make this process hold: requests, fetched pictures, pictures being decoded, patches that
wait for a lane, and replies that are not read yet."""

from __future__ import annotations

import sys
import threading

from sidecar.errors import Overloaded


class Memory:
    """Counts; safe between threads.

    Attributes:
        most: the budget. Who may go beyond it is decided where something is taken.
        held: by calls.
        decoding: what pictures take while they are decoded. It keeps other pictures waiting and refuses no call: one picture may
            be larger than the budget.
    """

    def __init__(self, most: int = sys.maxsize) -> None:
        self.most = most
        self.held = 0
        self.decoding = 0
        self._lock = threading.RLock()  # a share may be given back by the collector, on a thread that holds it

    def take(self, size: int) -> None:
        with self._lock:
            self.held += size

    def give(self, size: int) -> None:
        with self._lock:
            self.held -= size

    def begin_decoding(self, size: int) -> None:
        with self._lock:
            self.decoding += size

    def end_decoding(self, size: int) -> None:
        with self._lock:
            self.decoding -= size

    def fits(self, size: int) -> bool:
        """Whether a picture of so many bytes may be decoded beside all else."""
        return self.held + self.decoding + size <= self.most

    def check(self, size: int, own: int = 0) -> None:
        """Judge whether something that holds `own` bytes already may hold `size` more; alone it always may.

        Raises:
            Overloaded: if it may not.
        """
        if self.held > own and self.held + size > self.most:
            raise Overloaded(
                f"calls in hand hold {self.held} bytes, the limit is {self.most} (max_held_bytes)", retry_after_s=1.0
            )


class Share:
    """What one thing holds of a memory, until it is no longer referred to."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._size = 0

    def add(self, size: int) -> None:
        """Hold more.

        Raises:
            Overloaded: if there is no room for it.
        """
        self._memory.check(size, self._size)
        self._memory.take(size)
        self._size += size

    def __del__(self) -> None:
        self._memory.give(self._size)
