"""SIGTERM and Ctrl-C: the first asks the process to end, the second ends it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

_Result = TypeVar("_Result")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# One Ctrl-C may come twice: from the terminal, and from whoever started this process.
_SAME_S = 0.5


class Ending:
    """To be made on the event loop.

    Attributes:
        told: set at the first signal.
        at_once: called at the second, before the process is gone.
    """

    def __init__(self) -> None:
        self.told = asyncio.Event()
        self.at_once: Callable[[], None] = lambda: None
        self._told_at = 0.0
        self._listen()

    async def unless_told(self, doing: Coroutine[Any, Any, _Result]) -> _Result | None:
        """What comes of it; None, and it is cancelled, if the end comes first."""
        task, told = asyncio.ensure_future(doing), asyncio.ensure_future(self.told.wait())
        await asyncio.wait({task, told}, return_when=asyncio.FIRST_COMPLETED)
        for each in (told, task):
            each.cancel()  # nothing, where it is done
        await asyncio.gather(told, task, return_exceptions=True)
        return None if task.cancelled() and self.told.is_set() else task.result()

    @contextmanager
    def without_handlers(self) -> Iterator[None]:
        """For a call that keeps the interpreter to itself, so that no handler would run: a signal ends the process at once."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        try:
            yield
        finally:
            self._listen()

    def _listen(self) -> None:
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        if not self.told.is_set():
            self._told_at = time.monotonic()
            self.told.set()
        elif time.monotonic() - self._told_at > _SAME_S:
            self.at_once()
            os._exit(1)
