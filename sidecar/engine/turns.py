"""Turns: which admitted order goes on its way to a lane next.

Few are between their turn and their lane at a time: enough that a lane finds its next run ready, and no more, since what has had
its turn can no longer be overtaken. The others wait undecoded, where they cost little and where the order between clients can
still change.

Lives on the event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sidecar.engine.cost import NOTHING, Work
from sidecar.engine.fair_queue import FairQueue
from sidecar.engine.lane import Lane
from sidecar.engine.lanes import Lanes
from sidecar.engine.memory import Memory

# Beyond it preparing takes tenths of a second: a photo of 8 megapixels.
_LARGE_BYTES = 1 << 26


class Turn:
    """One order's.

    Attributes:
        client: whose share of the server it takes.
        work: what its run will be.
        share: what it takes of its client's share, in patches.
        memory_bytes: what preparing it holds at its peak.
        lane: the one that called it in before its time, if one did.
    """

    __slots__ = ("_begins", "client", "kept_bytes", "lane", "memory_bytes", "share", "work")

    def __init__(self, client: str, work: Work, share: int, memory_bytes: int = 0) -> None:
        """To be made on the event loop."""
        self.client = client
        self.work = work
        self.share = share
        self.memory_bytes = memory_bytes
        self.kept_bytes = 0
        self.lane: Lane | None = None
        self._begins: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin(self) -> None:
        if not self._begins.done():
            self._begins.set_result(None)

    async def begun(self) -> None:
        await self._begins


class Turns:
    """Gives them, in an order that is fair between clients."""

    def __init__(self, lanes: Lanes, preprocess_threads: int, memory: Memory | None = None) -> None:
        self._lanes = lanes
        self._memory = memory or Memory()
        # Those that take long to prepare leave a thread to the others, where there is more than one.
        self._large = 0
        self._most_large = max(1, preprocess_threads // 2)
        self._queue: FairQueue[Turn] = FairQueue()
        self._waiting: dict[Turn, None] = {}  # what is in the queue, the newest last
        self._begun: Counter[str] = Counter()  # those between their turn and their end, by client
        self._begun_patches = 0
        # Nor may more of them be unprepared than there are threads, and one in reserve.
        self._unprepared = 0
        self._most_unprepared = preprocess_threads + 1
        self._least_begun = preprocess_threads + 2 * sum(lane.streams for lane in lanes.all)
        self._called_in: set[Lane] = set()  # lanes whose next item is on its way to them
        self._accepted = NOTHING

    @property
    def accepted(self) -> Work:
        """All that waits or is under way."""
        return self._accepted

    @property
    def clients(self) -> int:
        """How many clients have something waiting."""
        return self._queue.clients

    @property
    def unprepared(self) -> int:
        """How many have had their turn and are not prepared yet."""
        return self._unprepared

    @asynccontextmanager
    async def wait(self, turn: Turn) -> AsyncIterator[None]:
        """Wait for it; what is done with it is done inside. `prepared` is to be called there, and `arrived` at a lane."""
        self._accepted += turn.work
        try:
            await self._wait(turn)
            try:
                yield
            finally:
                self._end(turn)
        finally:
            self._accepted -= turn.work

    def prepared(self, turn: Turn) -> None:
        """It is, or has failed in it: no thread is at work on it any more."""
        self._unprepared -= 1
        self._memory.end_decoding(turn.memory_bytes)
        self._large -= turn.memory_bytes > _LARGE_BYTES
        self._give()

    def keep(self, turn: Turn, size: int) -> None:
        """Count what was prepared until the turn ends."""
        self._memory.take(size)
        turn.kept_bytes = size

    def arrived(self, turn: Turn) -> None:
        """At the lane that called it in, if one did, or nowhere any more."""
        if turn.lane is not None:
            self._called_in.discard(turn.lane)

    def hasten(self, turn: Turn, client: str) -> bool:
        """Let it wait in the place of a client who joined it, if that comes sooner. Returns whether it does."""
        if turn not in self._waiting or client == turn.client:
            return False
        if self._queue.ahead_of(client, turn.share) >= self._queue.ahead_of(turn.client, turn.share):
            return False
        self._queue.remove(turn.client, turn)
        turn.client = client
        self._queue.push(client, turn, turn.share)
        self._give()
        return True

    def finish_s(self, client: str, work: Work) -> float:
        """About how long new work of a client's will take, given what has its turn before it."""
        ahead = round(self._queue.ahead_of(client, work.patches)) + self._begun_patches
        wait_s = self._lanes.wait_s(self._share_of_accepted(ahead), len(self._queue) + self._begun.total())
        return wait_s + self._lanes.own_ms(work) / 1e3

    async def _wait(self, turn: Turn) -> None:
        self._queue.push(turn.client, turn, turn.share)
        self._waiting[turn] = None
        self._give()
        self._call_in()
        try:
            await turn.begun()
        except asyncio.CancelledError:
            if self._queue.remove(turn.client, turn):
                del self._waiting[turn]
            else:  # it was its turn in this very moment
                self.prepared(turn)
                self._end(turn)
            raise

    def _end(self, turn: Turn) -> None:
        self.arrived(turn)
        self._memory.give(turn.kept_bytes)
        self._begun[turn.client] -= 1
        if not self._begun[turn.client]:
            del self._begun[turn.client]
        self._begun_patches -= turn.work.patches
        self._give()
        self._call_in()

    def _give(self) -> None:
        while self._unprepared < self._most_unprepared and (turn := self._next()) is not None:
            self._begin(turn)

    def _next(self) -> Turn | None:
        return self._queue.pop(self._has_room, self._lacks_memory)

    def _begin(self, turn: Turn) -> None:
        del self._waiting[turn]
        self._memory.begin_decoding(turn.memory_bytes)
        self._large += turn.memory_bytes > _LARGE_BYTES
        self._begun[turn.client] += 1
        self._begun_patches += turn.work.patches
        self._unprepared += 1
        turn.begin()

    def _has_room(self, turn: Turn) -> bool:
        """Whether an order may be prepared already. A client that has none on its way to a lane is not to wait for those of
        others to get there."""
        most_patches = 2 * sum(lane.run_patches * lane.streams for lane in self._lanes.all)
        return (
            self._begun.total() < self._least_begun
            or self._begun_patches < most_patches
            or turn.client not in self._begun
        )

    def _lacks_memory(self, turn: Turn) -> bool:
        """Whether it has to wait until others have been prepared. A large one is let through if no other is, whatever is held."""
        if turn.memory_bytes <= _LARGE_BYTES or not self._large:
            return False
        return self._large >= self._most_large or not self._memory.fits(turn.memory_bytes)

    def _call_in(self) -> None:
        """Let a slow lane take the newest of those who wait, if it is done sooner than in its turn on the others. At the head of
        the queue a fast lane always finishes first, and a slow one would only watch."""
        for lane in self._lanes.all:
            if not self._waiting or self._unprepared >= self._most_unprepared:
                return
            if lane.out_for_s or lane in self._called_in:
                continue
            turn = next(reversed(self._waiting))
            if not self._lacks_memory(turn) and self._gains(turn, lane):
                self._queue.remove(turn.client, turn)
                self._called_in.add(lane)
                turn.lane = lane
                self._begin(turn)

    def _gains(self, turn: Turn, lane: Lane) -> bool:
        """Whether this lane, which would not get it in its turn, has it done before the others get to it."""
        others = [other for other in self._lanes.serving if other is not lane]
        backlog_ms, own_ms = lane.backlog_ms(), lane.cost.ms(turn.work)
        # One run ahead at most: what it has called in no other lane can take.
        if not others or backlog_ms > own_ms or self._lanes.soonest(turn.work) is lane:
            return False
        ahead = round(self._queue.ahead_of(turn.client, 0.0)) + self._begun_patches
        items = len(self._queue) + self._begun.total()
        return backlog_ms + own_ms < 1e3 * self._lanes.wait_s(self._share_of_accepted(ahead), items, others)

    def _share_of_accepted(self, patches: int) -> Work:
        """So many of the patches that have been accepted and are not done."""
        return Work(patches, self._accepted.pairs * patches / max(1, self._accepted.patches))
