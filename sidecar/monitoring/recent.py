"""The last minute, for a person who looks at the status page: how long the stages took and what went wrong.

Prometheus keeps history; this keeps only what fits on a page. Written on the event loop, read by the page's threads.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from sidecar.engine.observer import StageTimes

STAGES = ("decode", "preprocess", "queue", "run", "publish")

WINDOW_S = 60.0
# Enough for quantiles at any rate; at a high one they cover less than the window.
_MOST_TIMES = 4096
_MOST_ERRORS = 20
_MOST_MESSAGE = 500


@dataclass(frozen=True, slots=True)
class StageSummary:
    """One stage over the last minute: the items that needed it, and its median and 95th percentile in milliseconds."""

    items: int
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True, slots=True)
class RecentError:
    """`time`: when it was last seen, ISO 8601 in UTC. `count`: how often in a row."""

    time: str
    reason: str
    message: str
    count: int = 1


class Recent:
    """The stage times of the last minute and the last 20 errors."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._times: deque[tuple[float, StageTimes]] = deque(maxlen=_MOST_TIMES)
        self._errors: deque[RecentError] = deque(maxlen=_MOST_ERRORS)

    def encoded(self, times: StageTimes) -> None:
        with self._lock:
            self._times.append((self._clock(), times))

    def error(self, reason: str, message: str) -> None:
        """An error that repeats itself is counted, so that it does not push out what came before it."""
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        new = RecentError(now, reason, message if len(message) <= _MOST_MESSAGE else message[: _MOST_MESSAGE - 1] + "…")
        with self._lock:
            last = self._errors[-1] if self._errors else None
            if last and (last.reason, last.message) == (new.reason, new.message):
                self._errors[-1] = replace(new, count=last.count + 1)
            else:
                self._errors.append(new)

    def errors(self) -> list[RecentError]:
        """The latest first."""
        with self._lock:
            return list(reversed(self._errors))

    def stages(self) -> dict[str, StageSummary]:
        """For each stage that an item of the last minute needed."""
        since = self._clock() - WINDOW_S
        with self._lock:
            while self._times and self._times[0][0] < since:
                self._times.popleft()
            times = [item for _, item in self._times]
        by_stage = {stage: sorted(ms for item in times if (ms := getattr(item, f"{stage}_ms")) > 0) for stage in STAGES}
        return {
            stage: StageSummary(len(sorted_ms), _quantile(sorted_ms, 0.5), _quantile(sorted_ms, 0.95))
            for stage, sorted_ms in by_stage.items()
            if sorted_ms
        }


def _quantile(ascending: list[float], share: float) -> float:
    """By nearest rank, so that every figure shown is one that was measured."""
    rank = max(1, -(-len(ascending) * share // 1))
    return ascending[int(rank) - 1]
