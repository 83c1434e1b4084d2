"""The scheduler: is it known already? may it enter? when is its turn? which lane finishes it first?

The way of an order: answered from the store; or joined to an equal one under way; or admitted, opened for its size, judged by
it, given its turn in fair order, prepared, and run on a lane. Few orders are between their turn and their lane at a time: the
others wait undecoded, where they cost little and where the order between clients can still change.

Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

from sidecar.engine.cost import NOTHING, Work
from sidecar.engine.fair_queue import FairQueue
from sidecar.engine.lane import Lane, LaneOut, Ran
from sidecar.engine.observer import Observer, StageTimes
from sidecar.engine.order import Opened, Order, Prepared
from sidecar.engine.status import EngineStatus, LaneIdentity
from sidecar.engine.store import Draft, Entry, Store, loose_draft
from sidecar.errors import CannotFinish, InvalidItem, LaneFault, NoLane, Overloaded, ShuttingDown, UrlUnreachable
from sidecar.store_file import Description
from sidecar.vision.dtypes import Array
from sidecar.vision.grid import Grid, GridError
from sidecar.vision.pixels import PixelError
from sidecar.vision.spec import TowerSpec

# What one order's content or deadline may be the cause of, so that another order of the same name may fare better.
_ITS_OWN_FAULT = (InvalidItem, PixelError, GridError, CannotFinish, UrlUnreachable)
_UNKNOWN_WAIT_S = 1.0
# Decoding takes its time too, on threads that all clients share: a picture of many pixels that becomes few patches is not cheap.
_DECODED_PIXELS_A_PATCH = 4096
# So many times a limit is where clients that have nothing under way are refused too.
_NEWCOMERS = 2
_NO_TIME = StageTimes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What may be under way at a time, from admission to answer."""

    items: int
    patches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """An embedding: in the store (`entry`), in memory (`rows`, (tokens, width)), or both."""

    description: Description
    lane: LaneIdentity
    entry: Entry | None
    rows: Array | None
    times: StageTimes = _NO_TIME
    cached: bool = False
    coalesced: bool = False


@dataclass(slots=True, eq=False)
class _Job:
    """An order that is being carried out, for itself and for equal ones that came later."""

    order: Order
    deadline: float
    client: str  # whose share it takes: that of whoever asked first, or of one who joined and is served sooner
    waiters: int = 0
    work: Work = NOTHING
    share: int = 0  # what it takes of its client's share, in patches
    turn: asyncio.Future[None] | None = None
    lane: Lane | None = None  # that called it in before its turn
    task: asyncio.Task[Encoded] = field(init=False)

    @property
    def waits(self) -> bool:
        """For its turn."""
        return self.turn is not None and not self.turn.done()


class Scheduler:
    """One model's lanes, and everything that waits for them."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        tower: TowerSpec,
        fingerprint: str,
        *,
        store: Store | None,
        preprocessing: Executor,
        preprocess_threads: int,
        limits: Limits,
        observer: Observer | None = None,
    ) -> None:
        self.lanes = tuple(lanes)
        self.fingerprint = fingerprint
        self.store = store
        self._tower = tower
        self._preprocessing = preprocessing
        self._limits = limits
        self._observer = observer or Observer()
        self._jobs: dict[str, _Job] = {}
        self._clients: Counter[str] = Counter()  # jobs of each
        self._queue: FairQueue[_Job] = FairQueue()
        self._accepted = NOTHING
        # Of orders between their turn and their answer. Enough that a lane finds its next run ready, and no more: what has had
        # its turn can no longer be overtaken. Nor may more of them be unprepared than there are threads, and one in reserve.
        self._turned: Counter[str] = Counter()  # by client
        self._turned_patches = self._unprepared = 0
        self._least_turned = preprocess_threads + 2 * sum(lane.streams for lane in lanes)
        self._most_unprepared = preprocess_threads + 1
        self._called_in: set[Lane] = set()  # lanes whose next item is on its way to them
        self._hits = self._misses = self._coalesced = 0
        self._closing = False

    def known(self, name: str) -> Encoded | None:
        """What the store has under a name."""
        entry = self.store and self.store.find(name, self.fingerprint)
        if not entry:
            return None
        self._hits += 1
        self._observer.hit()
        return Encoded(description=entry.description, lane=entry.lane, entry=entry, rows=None, cached=True)

    async def encode(self, order: Order, *, past_store: bool = False) -> Encoded:
        """Carry out an order. `past_store`: whatever the store has, because it could not be read.

        Raises:
            Overloaded: if too much is waiting; an item larger than all that may wait still passes when nothing is.
            CannotFinish: if it would not be done before its deadline.
            NoLane: if every lane is out of service.
            LaneFault: if the runtime failed on it.
            ShuttingDown: if the scheduler is closed.
            Whatever opening or preparing it raises.
        """
        while True:
            if not past_store and (known := self.known(order.name)) is not None:
                return known
            job = self._jobs.get(order.name)
            joined = job is not None
            if job is None:
                job = self._begin(order)
            else:
                job.deadline = max(job.deadline, order.deadline)
                self._hasten(job, order.client)
                self._coalesced += 1
                self._observer.coalesced()
            try:
                encoded = await self._join(job)
            except _ITS_OWN_FAULT as error:
                if not joined or (job.order.content == order.content and not isinstance(error, CannotFinish)):
                    raise
                continue  # it was the other one's content, or patience
            return replace(encoded, coalesced=True) if joined else encoded

    def status(self) -> EngineStatus:
        return EngineStatus(
            fingerprint=self.fingerprint,
            waiting_items=len(self._jobs),
            waiting_patches=self._accepted.patches,
            max_items=self._limits.items,
            max_patches=self._limits.patches,
            clients=self._queue.clients,
            preprocessing=self._unprepared,
            hits=self._hits,
            misses=self._misses,
            coalesced=self._coalesced,
            lanes=tuple(lane.status() for lane in self.lanes),
            store=self.store.status() if self.store else None,
        )

    @property
    def in_service(self) -> bool:
        """Whether any lane is."""
        return any(not lane.out_for_s for lane in self.lanes)

    def close(self, timeout_s: float | None = None) -> bool:
        """Take no more, and finish what the lanes have; see `Lane.close`. Not for the event loop: it waits."""
        self._closing = True
        until = None if timeout_s is None else time.monotonic() + timeout_s
        closed = [lane.close(None if until is None else max(0.0, until - time.monotonic())) for lane in self.lanes]
        return all(closed)

    def _begin(self, order: Order) -> _Job:
        if self._closing:
            raise ShuttingDown("this server is shutting down; send the item to another one")
        self._check_in_service()
        # One more for a client that has nothing under way: nobody fills the queue for the others.
        most = self._limits.items * (1 if self._clients[order.client] else _NEWCOMERS)
        if len(self._jobs) >= most:
            raise Overloaded(
                f"{len(self._jobs)} items are waiting, which is the limit",
                retry_after_s=self._wait_s(self._accepted, 1),
            )
        job = _Job(order, order.deadline, order.client)
        self._clients[job.client] += 1
        job.task = asyncio.create_task(self._carry_out(job))
        job.task.add_done_callback(lambda task: self._end(job))
        self._jobs[order.name] = job
        return job

    def _end(self, job: _Job) -> None:
        if self._jobs.get(job.order.name) is job:
            del self._jobs[job.order.name]
        self._count_out(self._clients, job.client)
        if not job.task.cancelled():
            job.task.exception()  # whoever waits raises it; if nobody does any more, nobody is to be warned

    async def _join(self, job: _Job) -> Encoded:
        """Wait for a job; the last who leaves ends it."""
        job.waiters += 1
        try:
            return await asyncio.shield(job.task)
        finally:
            job.waiters -= 1
            if not job.waiters and not job.task.done():
                job.task.cancel()
                self._jobs.pop(job.order.name, None)  # nobody may join what is being ended

    async def _carry_out(self, job: _Job) -> Encoded:
        arrived = time.monotonic()
        opened = await job.order.open()
        job.work = Work.of([opened.grid])
        job.share = job.work.patches + opened.decoded_pixels // _DECODED_PIXELS_A_PATCH
        self._admit(job)
        self._misses += 1
        self._observer.miss()
        self._accepted += job.work
        try:
            await self._wait_for_turn(job)
            turn_ms = (time.monotonic() - arrived) * 1e3
            try:
                prepared, waited_ms = await self._prepare(opened)
                lane, ran = await self._run(job, prepared)
            finally:
                self._arrived(job)
                self._end_turn(job)
        finally:
            self._accepted -= job.work
        times = StageTimes(
            decode_ms=prepared.decode_ms,
            preprocess_ms=prepared.preprocess_ms,
            queue_ms=turn_ms + waited_ms + ran.queue_ms,
            run_ms=ran.run_ms,
            publish_ms=ran.publish_ms,
        )
        self._observer.encoded(lane.identity.name, times)
        # Not the grid by which it was judged: a picture may lie on its side until its orientation is known.
        description = self._description(lane, prepared.patches.grid)
        return Encoded(description=description, lane=lane.identity, entry=ran.entry, rows=ran.rows, times=times)

    def _admit(self, job: _Job) -> None:
        """Refuse now what would wait in vain."""
        self._check_in_service()
        patches, waiting = job.work.patches, self._accepted.patches
        most = self._limits.patches * (1 if self._clients[job.client] > 1 else _NEWCOMERS)
        if waiting and waiting + patches > most:
            excess = min(waiting, waiting + patches - self._limits.patches)
            raise Overloaded(
                f"{waiting} patches are waiting, this item has {patches}, the limit is {self._limits.patches}",
                retry_after_s=self._wait_s(self._accepted, len(self._jobs)) * excess / waiting,
            )
        left_s = job.deadline - time.monotonic()
        if left_s < (needed_s := self._finish_s(job)):
            raise CannotFinish(
                f"this item would take about {needed_s:.2f} s from now, and its deadline is in {max(0.0, left_s):.2f} s"
            )

    async def _wait_for_turn(self, job: _Job) -> None:
        turn = job.turn = asyncio.get_running_loop().create_future()
        self._queue.push(job.client, job, job.share)
        self._give_turns()
        self._call_in()
        try:
            await turn
        except asyncio.CancelledError:
            if not self._queue.remove(job.client, job):
                # It was its turn in this very moment.
                self._unprepared -= 1
                self._end_turn(job)
            raise

    def _end_turn(self, job: _Job) -> None:
        self._count_out(self._turned, job.client)
        self._turned_patches -= job.work.patches
        self._give_turns()
        self._call_in()

    def _hasten(self, job: _Job, client: str) -> None:
        """Let a job that waits for its turn wait in the place of a client who joined it, if that comes sooner."""
        share = job.share
        if client == job.client or self._queue.ahead_of(client, share) >= self._queue.ahead_of(job.client, share):
            return
        if self._queue.remove(job.client, job):
            self._count_out(self._clients, job.client)
            self._clients[client] += 1
            job.client = client
            self._queue.push(client, job, share)
            self._give_turns()

    @staticmethod
    def _count_out(counter: Counter[str], client: str) -> None:
        counter[client] -= 1
        if not counter[client]:
            del counter[client]

    def _give_turns(self) -> None:
        while self._unprepared < self._most_unprepared and (job := self._queue.pop(self._has_room)) is not None:
            self._give_turn(job)

    def _give_turn(self, job: _Job) -> None:
        self._turned[job.client] += 1
        self._turned_patches += job.work.patches
        self._unprepared += 1
        assert job.turn is not None
        if not job.turn.done():
            job.turn.set_result(None)

    def _call_in(self) -> None:
        """Let a slow lane take the newest of those who wait, if it is done sooner than in its turn on the others. At the head of
        the queue a fast lane always finishes first, and a slow one would only watch."""
        for lane in self.lanes:
            job = next((job for job in reversed(self._jobs.values()) if job.waits), None)
            if job is None or self._unprepared >= self._most_unprepared:
                return
            if lane.out_for_s or lane in self._called_in:
                continue
            backlog_ms, own_ms = lane.backlog_ms(), lane.cost.ms(job.work)
            others = [other for other in self.lanes if other is not lane and not other.out_for_s]
            # One run ahead at most: what it has called in no other lane can take.
            if not others or backlog_ms > own_ms or self._soonest(job.work, []) is lane:
                continue
            ahead = round(self._queue.ahead_of(job.client, 0.0)) + self._turned_patches
            if backlog_ms + own_ms < 1e3 * self._wait_s(self._share_of_accepted(ahead), len(self._jobs), others):
                self._queue.remove(job.client, job)
                self._called_in.add(lane)
                job.lane = lane
                self._give_turn(job)

    def _arrived(self, job: _Job) -> None:
        """At the lane that called it in, if one did, or nowhere any more."""
        if job.lane is not None:
            self._called_in.discard(job.lane)

    def _has_room(self, job: _Job) -> bool:
        """Whether an order may be prepared already. A client that has none on its way to a lane is not to wait for those of
        others to get there."""
        most_patches = 2 * sum(lane.run_patches * lane.streams for lane in self.lanes)
        return (
            self._turned.total() < self._least_turned
            or self._turned_patches < most_patches
            or job.client not in self._turned
        )

    async def _prepare(self, opened: Opened) -> tuple[Prepared, float]:
        """On a preprocessing thread; also returns the milliseconds that it waited for one."""
        asked = time.monotonic()
        try:
            prepared = await asyncio.get_running_loop().run_in_executor(self._preprocessing, opened.prepare)
        finally:
            self._unprepared -= 1
            self._give_turns()
        waited_ms = (time.monotonic() - asked) * 1e3 - prepared.decode_ms - prepared.preprocess_ms
        return prepared, max(0.0, waited_ms)

    async def _run(self, job: _Job, prepared: Prepared) -> tuple[Lane, Ran]:
        """On the lane that will finish it first; on another one if that fails."""
        failed: list[Lane] = []
        self._arrived(job)
        while True:
            lane = self._soonest(job.work, failed)
            if (called := job.lane) is not None and not called.out_for_s and called not in failed:
                lane = called
            try:
                return lane, await lane.encode(
                    prepared.patches,
                    job.client,
                    lambda: job.deadline,
                    lambda lane=lane: self._draft(job, lane, prepared),  # type: ignore[misc]
                )
            except LaneOut:
                continue
            except LaneFault:
                failed.append(lane)
                if all(lane in failed or lane.out_for_s for lane in self.lanes):
                    raise

    def _soonest(self, work: Work, failed: Sequence[Lane]) -> Lane:
        serving = [lane for lane in self.lanes if not lane.out_for_s and lane not in failed]
        if not serving:
            raise self._no_lane()
        return min(serving, key=lambda lane: lane.backlog_ms() + lane.cost.ms(work))

    def _check_in_service(self) -> None:
        if not self.in_service:
            raise self._no_lane()

    def _no_lane(self) -> NoLane:
        retry_after_s = min(lane.out_for_s for lane in self.lanes)
        return NoLane("every lane of this server is out of service and being tried again", retry_after_s)

    def _draft(self, job: _Job, lane: Lane, prepared: Prepared) -> Draft:
        description = self._description(lane, prepared.patches.grid)
        return self.store.write(job.order.name, description) if self.store else loose_draft(description)

    def _description(self, lane: Lane, grid: Grid) -> Description:
        return Description(
            grid=grid,
            tokens=grid.tokens(self._tower),
            width=lane.width,
            dtype=lane.output_dtype,
            fingerprint=self.fingerprint,
        )

    def _finish_s(self, job: _Job) -> float:
        """About how long a new job will take, given what has its turn before it."""
        queued = self._queue.ahead_of(job.client, job.work.patches)
        ahead = self._share_of_accepted(round(queued) + self._turned_patches)
        own_ms = min(lane.cost.ms(job.work) for lane in self.lanes if not lane.out_for_s)
        return self._wait_s(ahead, len(self._queue) + self._turned.total()) + own_ms / 1e3

    def _share_of_accepted(self, patches: int) -> Work:
        """So many of the patches that have been accepted and are not done."""
        return Work(patches, self._accepted.pairs * patches / max(1, self._accepted.patches))

    def _wait_s(self, work: Work, items: int, lanes: Sequence[Lane] | None = None) -> float:
        """Until so much has run, on these lanes together or on all that are in service."""
        if not items or not work.patches:
            return 0.0
        serving = [lane for lane in self.lanes if not lane.out_for_s] if lanes is None else lanes
        rate = sum(1.0 / max(1e-3, lane.bulk_ms(work, items)) for lane in serving)
        return 1e-3 / rate if rate else _UNKNOWN_WAIT_S
