"""The watchdog of a lane: it finds runs that take many times their predicted time.

Time counts by the watchdog's own steps. So a process that was stopped for a while, or a machine that slept, finds no run guilty.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from sidecar.engine.ticket import Ticket

# A run is stuck once it takes so many times its predicted time (more at a size that was never run), and at least so long: a
# machine may be busy for a while.
STUCK_TIMES, STUCK_TIMES_UNMEASURED, STUCK_S = 10.0, 100.0, 7.0
STEP_S = 0.25


@dataclass(slots=True, eq=False)
class Run:
    """What a lane's thread has under way.

    Attributes:
        tickets: the items; none in a self-test.
        limit_s: how long it may take.
        watched_s: how long it has been watched.
        abandoned: it was found stuck, and its items have been answered; nothing that it still gives is used.
    """

    tickets: list[Ticket]
    limit_s: float
    watched_s: float = 0.0
    abandoned: bool = False

    @classmethod
    def of(cls, tickets: list[Ticket], predicted_ms: float, *, measured: bool = True) -> Run:
        """A run that has not begun. `measured`: runs of its size are known."""
        times = STUCK_TIMES if measured else STUCK_TIMES_UNMEASURED
        return cls(tickets, max(STUCK_S, times * predicted_ms / 1e3))


class Watchdog:
    """Watches runs on a thread of its own until `stop`."""

    def __init__(self, name: str, on_stuck: Callable[[Run], None]) -> None:
        """`on_stuck` is called once for each stuck run, on the watchdog's thread, after the run was marked `abandoned`."""
        self._on_stuck = on_stuck
        self._lock = threading.Lock()
        self._runs: dict[threading.Thread, Run] = {}
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name=f"{name}-watchdog", daemon=True).start()

    def begin(self, run: Run) -> None:
        """The calling thread begins a run."""
        with self._lock:
            self._runs[threading.current_thread()] = run

    def end(self) -> bool:
        """The calling thread has ended its run. Returns whether the run was abandoned before."""
        with self._lock:
            return self._runs.pop(threading.current_thread()).abandoned

    def is_stuck(self, thread: threading.Thread) -> bool:
        """Whether a thread's run was abandoned and has not returned."""
        with self._lock:
            run = self._runs.get(thread)
            return run is not None and run.abandoned

    def stop(self) -> None:
        """End the watchdog's thread, soon, and let go of whom it tells: a lane and its model, which may take gigabytes."""
        self._stopped.set()
        self._on_stuck = _ignore

    def _watch(self) -> None:
        while not self._stopped.wait(STEP_S):
            for run in self._step():
                self._on_stuck(run)

    def _step(self) -> list[Run]:
        with self._lock:
            for run in self._runs.values():
                run.watched_s += STEP_S
            stuck = [run for run in self._runs.values() if run.watched_s > run.limit_s and not run.abandoned]
            for run in stuck:
                run.abandoned = True
            return stuck


def _ignore(run: Run) -> None:
    pass
