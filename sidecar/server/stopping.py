"""How a server is told to stop, and how its process ends: in time, with the documented exit code, whatever still runs.

Native code cannot be interrupted, neither a run nor a load that takes minutes. So the end waits for no thread: what must be
done is done in order while there is time, and then the process exits by `os._exit`. Tearing down native libraries under
threads that use them, or at all, has ended processes by SIGABRT after a clean drain.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

logger = logging.getLogger(__name__)

# From the end of the drain to the end of the process.
LAST_S = 1.0
# Kept of it for the last steps, which have no limit of their own: removing the store, closing sockets.
_CLOSING_S = 0.4
# A shell, make and timeout(1) pass one request to stop on to the process and to its group.
_SAME_REQUEST_S = 0.3
_CUT_SHORT = 1


def end_process(code: int) -> NoReturn:
    """Flush what has been written, and exit without tearing anything down."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or none
            stream.flush()
    os._exit(code)


class Stop:
    """The request to stop, by SIGTERM or SIGINT, and the time that is left after it."""

    def __init__(self, drain_s: float, at_once: Callable[[], None]) -> None:
        """Install the handlers on the running loop.

        Args:
            drain_s: how long accepted work may go on after the first request.
            at_once: called on a second request, just before the process exits with 1.
        """
        self._drain_s = drain_s
        self._at_once = at_once
        self._asked = asyncio.Event()
        self._asked_at = 0.0
        self._heard_at: float | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            on_signal(number, self._ask, self._hear)

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    async def wait(self) -> None:
        """Return once the server is told to stop."""
        await self._asked.wait()

    @property
    def drain_left_s(self) -> float:
        """What is left of the drain."""
        return max(0.0, self._asked_at + self._drain_s - time.monotonic())

    def left_s(self, most_s: float) -> float:
        """Time for one of the last steps, after the drain: at most this."""
        ends = self._asked_at + self._drain_s + LAST_S - _CLOSING_S
        return max(0.0, min(most_s, ends - time.monotonic()))

    def _hear(self) -> None:
        """On the first signal, in its handler: whatever keeps the loop from running, the process ends."""
        if self._heard_at is not None:
            return
        self._heard_at = time.monotonic()
        most_s = self._drain_s + LAST_S - 0.05
        threading.Thread(target=_cut_short, args=(most_s - 0.05,), name="cut-short", daemon=True).start()
        # That thread may not run either, where native code holds the interpreter's lock; this one needs none.
        with Path(os.devnull).open("w") as nowhere:
            faulthandler.dump_traceback_later(most_s, exit=True, file=os.dup(nowhere.fileno()))

    def _ask(self) -> None:
        now = time.monotonic()
        if not self._asked.is_set():
            self._asked_at = now if self._heard_at is None else self._heard_at
            self._asked.set()
            return
        if now - self._asked_at < _SAME_REQUEST_S:
            return
        logger.warning("told to stop a second time: stopping at once")
        self._at_once()
        end_process(_CUT_SHORT)


def on_signal(number: signal.Signals, call: Callable[[], None], first: Callable[[], None] | None = None) -> None:
    """Have the loop call something; `first` is called in the handler itself. Unlike the loop's own handlers, this one stays
    when the loop is closed, so that a signal repeated while the process ends does not change how it ends."""
    loop = asyncio.get_running_loop()

    def handle(*_: object) -> None:
        if first is not None:
            first()
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(call)

    signal.signal(number, handle)


def _cut_short(after_s: float) -> None:
    time.sleep(after_s)
    # Through no logger: a log that cannot be written may be what holds the process up.
    with suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, b"the server did not end in time after it was told to stop; it is ended now\n")
    os._exit(_CUT_SHORT)
