"""What the connector has done since it was last asked. Safe to use from several threads."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

# What became of an item. The first three came from a sidecar: as a link to its store's file, over the wire, by key.
OUTCOMES = ("linked", "sent", "fetched", "encoded_locally", "failed")


class Tally:
    """Plain data goes out, since vLLM carries it from process to process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clear()

    def obtained(self, outcome: str, seconds: float, nbytes: int) -> None:
        with self._lock:
            self._items[outcome] += 1
            self._seconds.append(seconds)
            self._bytes += nbytes

    def given_up(self, outcome: str) -> None:
        with self._lock:
            self._items[outcome] += 1

    def error(self, reason: str) -> None:
        """An ask that did not succeed, whatever became of the item."""
        with self._lock:
            self._errors[reason] += 1

    def take(self) -> dict[str, Any]:
        """Everything since the last time; {} where that is nothing."""
        with self._lock:
            if not self._items and not self._errors:
                return {}
            taken = {
                "items": dict(self._items),
                "errors": dict(self._errors),
                "seconds": self._seconds,
                "bytes": self._bytes,
            }
            self._clear()
            return taken

    def _clear(self) -> None:
        self._items: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._seconds: list[float] = []
        self._bytes = 0
