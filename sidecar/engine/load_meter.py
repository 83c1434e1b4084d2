"""How busy something was in the last seconds."""

from __future__ import annotations

import math

_MEMORY_S = 5.0


class LoadMeter:
    """The share of recent time in use, from 0 to 1, of `capacity` things that work side by side. Older time counts less.

    Times are `time.monotonic` seconds.
    """

    def __init__(self, now: float, capacity: int = 1) -> None:
        self._capacity = capacity
        self._working = 0
        self._busy = 0.0
        self._at = now

    def begin(self, now: float) -> None:
        self.busy(now)
        self._working += 1

    def end(self, now: float) -> None:
        self.busy(now)
        self._working -= 1

    def busy(self, now: float) -> float:
        fade = math.exp(-max(0.0, now - self._at) / _MEMORY_S)
        self._busy = self._busy * fade + min(1.0, self._working / self._capacity) * (1.0 - fade)
        self._at = max(self._at, now)
        return self._busy
