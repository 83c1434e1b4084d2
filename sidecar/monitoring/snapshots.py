"""The engine's status for other threads than the event loop's, on which the engine lives and changes without locks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, wait

from sidecar.engine.status import EngineStatus


class LoopSnapshot:
    """Called from any thread, has `take` called on the event loop and returns what it gave.

    A loop that does not answer within `patience_s` seconds, or that has ended, leaves the caller with the last status.
    To be made on the loop's thread.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, take: Callable[[], EngineStatus], patience_s: float = 0.5
    ) -> None:
        self._loop = loop
        self._take = take
        self._patience_s = patience_s
        self._last = take()

    def __call__(self) -> EngineStatus:
        answer: Future[EngineStatus] = Future()
        try:
            self._loop.call_soon_threadsafe(self._answer, answer)
        except RuntimeError:  # the loop is closed
            return self._last
        if wait([answer], self._patience_s).done:
            self._last = answer.result()
        return self._last

    def _answer(self, answer: Future[EngineStatus]) -> None:
        try:
            answer.set_result(self._take())
        except Exception as error:
            answer.set_exception(error)
