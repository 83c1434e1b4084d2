"""A ticket: one item's place in a lane, from its queue to its answer.

The lane's threads answer; whoever waits does so on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from sidecar.engine.cost import NOTHING, Work
from sidecar.engine.store import Draft, Entry
from sidecar.errors import EncoderError
from sidecar.vision.dtypes import Array
from sidecar.vision.grid import Grid
from sidecar.vision.pixels import Patches


class LaneOut(Exception):
    """The lane is out of service: another one may take the item.

    Attributes:
        running: whether the item was running when the lane failed, so that the item may be the cause.
    """

    def __init__(self, *, running: bool = False) -> None:
        super().__init__("the lane is out of service")
        self.running = running


@dataclass(frozen=True, slots=True)
class Ran:
    """One item's rows, (tokens, width), where they are stored, and what it took."""

    rows: Array
    entry: Entry | None
    queue_ms: float
    run_ms: float
    publish_ms: float


@dataclass(slots=True, eq=False)
class Ticket:
    """`patches` is None once the caller has gone, so that what waits to be skipped takes no memory.

    `found_idle`: the lane had nothing to do when the item came.
    """

    patches: Patches | None
    grid: Grid
    deadline: Callable[[], float]
    draft: Callable[[], Draft]
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[Ran]
    work: Work
    found_idle: bool = False
    queued_at: float = field(default_factory=time.monotonic)

    def answer(self, result: Ran | EncoderError | LaneOut) -> None:
        """From any thread; nothing, where it has an answer already."""
        self.tell(self._resolve, result)

    def tell(self, listener: Callable[..., None], *values: object) -> None:
        """Call it on the event loop of whoever waits."""
        with suppress(RuntimeError):  # a loop that was closed has nobody left who waits
            self.loop.call_soon_threadsafe(listener, *values)

    def _resolve(self, result: Ran | EncoderError | LaneOut) -> None:
        if self.done.done():
            return
        if isinstance(result, Ran):
            self.done.set_result(result)
        else:
            self.done.set_exception(result)


def work_of(run: Sequence[Ticket]) -> Work:
    """All of it."""
    return sum((ticket.work for ticket in run), NOTHING)
