"""A circuit breaker: a failing lane takes no work, and is tried again after longer and longer pauses."""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


class CircuitBreaker:
    """Closed while the lane serves, open while it does not. The owner guards it with a lock of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open_until: float | None = None
        self._pause_s = FIRST_PAUSE_S

    @property
    def is_open(self) -> bool:
        return self._open_until is not None

    @property
    def retry_in_s(self) -> float:
        """Seconds until the next attempt; 0 while the breaker is closed."""
        until = self._open_until
        return 0.0 if until is None else max(0.001, until - self._clock())

    def trip(self) -> float:
        """Open for a pause, twice as long each time that no success came between. Returns the pause in seconds."""
        pause_s = self._pause_s
        self._open_until = self._clock() + pause_s
        self._pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return pause_s

    def take_attempt(self) -> bool:
        """Whether the pause is over. The next one begins with that, so that one of several threads makes the attempt."""
        if self._open_until is None or self._clock() < self._open_until:
            return False
        self._open_until = self._clock() + self._pause_s
        return True

    def reset(self) -> None:
        """Close after a success."""
        self._open_until, self._pause_s = None, FIRST_PAUSE_S
