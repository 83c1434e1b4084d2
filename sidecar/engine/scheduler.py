"""The scheduler: is it known already? may it enter? when is its turn? which lane finishes it first?

The way of an order: answered from the store; or joined to an equal one under way; or admitted, opened for its size, judged by
it, given its turn in fair order, prepared, and run on a lane.

Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace

from sidecar.engine.cost import Work
from sidecar.engine.lane import Lane
from sidecar.engine.lanes import Lanes
from sidecar.engine.memory import Memory
from sidecar.engine.observer import Observer, StageTimes
from sidecar.engine.order import Opened, Order, Prepared
from sidecar.engine.status import EngineStatus, LaneIdentity
from sidecar.engine.store import Draft, Entry, Store, loose_draft
from sidecar.engine.ticket import LaneOut, Ran
from sidecar.engine.turns import Turn, Turns
from sidecar.errors import CannotFinish, LaneFault, Overloaded, ShuttingDown
from sidecar.store_file import Description
from sidecar.vision.dtypes import Array
from sidecar.vision.grid import Grid
from sidecar.vision.spec import TowerSpec

# Decoding takes its time too, on threads that all clients share: a picture of many pixels that becomes few patches is not cheap.
_DECODED_PIXELS_A_PATCH = 4096
# So many times a limit is where clients that have nothing under way are refused too.
_NEWCOMERS = 2
# Where nothing tells how long it will take until there is room, as while items are still being opened.
_LEAST_PAUSE_S = 0.1
# An item that was running on so many lanes when they failed may be the cause, and gets no further one.
_MOST_FAILED_LANES = 2
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
    turn: Turn | None = None  # once its size is known
    task: asyncio.Task[Encoded] | None = field(init=False, default=None)  # until it has ended


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
        memory: Memory | None = None,
    ) -> None:
        self.lanes = tuple(lanes)
        self.fingerprint = fingerprint
        self.store = store
        self._lanes = Lanes(self.lanes)
        self._turns = Turns(self._lanes, preprocess_threads, memory)
        self._tower = tower
        self._preprocessing = preprocessing
        self._limits = limits
        self._observer = observer or Observer()
        self._jobs: dict[str, _Job] = {}
        self._clients: Counter[str] = Counter()  # jobs of each
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
                if job.turn is not None and self._turns.hasten(job.turn, order.client):
                    self._count_out(job.client)
                    self._clients[order.client] += 1
                    job.client = order.client
                self._coalesced += 1
                self._observer.coalesced()
            try:
                encoded = await self._join(job)
            except CannotFinish:
                if not joined:
                    raise
                continue  # the other one had less patience
            return replace(encoded, coalesced=True) if joined else encoded

    def status(self) -> EngineStatus:
        return EngineStatus(
            fingerprint=self.fingerprint,
            waiting_items=len(self._jobs),
            waiting_patches=self._turns.accepted.patches,
            max_items=self._limits.items,
            max_patches=self._limits.patches,
            clients=self._turns.clients,
            preprocessing=self._turns.unprepared,
            hits=self._hits,
            misses=self._misses,
            coalesced=self._coalesced,
            lanes=tuple(lane.status() for lane in self.lanes),
            store=self.store.status() if self.store else None,
        )

    @property
    def in_service(self) -> bool:
        """Whether any lane is."""
        return bool(self._lanes.serving)

    def close(self, timeout_s: float | None = None) -> bool:
        """Take no more, and finish what the lanes have; see `Lane.close`. Not for the event loop: it waits."""
        self._closing = True
        until = None if timeout_s is None else time.monotonic() + timeout_s
        closed = [lane.close(None if until is None else max(0.0, until - time.monotonic())) for lane in self.lanes]
        return all(closed)

    def _begin(self, order: Order) -> _Job:
        if self._closing:
            raise ShuttingDown("this server is shutting down; send the item to another one")
        self._lanes.check_in_service()
        # One more for a client that has nothing under way: nobody fills the queue for the others.
        most = self._limits.items * (1 if self._clients[order.client] else _NEWCOMERS)
        if len(self._jobs) >= most:
            raise Overloaded(
                f"{len(self._jobs)} items are waiting, which is the limit",
                retry_after_s=max(_LEAST_PAUSE_S, self._lanes.wait_s(self._turns.accepted, 1)),
            )
        job = _Job(order, order.deadline, order.client)
        self._clients[job.client] += 1
        job.task = asyncio.create_task(self._carry_out(job))
        job.task.add_done_callback(lambda task: self._end(job, task))
        self._jobs[order.name] = job
        return job

    def _end(self, job: _Job, task: asyncio.Task[Encoded]) -> None:
        # Task, error, frames and job would refer to one another, and keep the item's bytes until the collector comes.
        job.task = None
        self._count_out(job.client)
        if not task.cancelled() and (error := task.exception()) is not None:
            traceback.clear_frames(error.__traceback__)

    def _leave(self, job: _Job) -> None:
        """Nobody may join it any more."""
        if self._jobs.get(job.order.name) is job:
            del self._jobs[job.order.name]

    def _count_out(self, client: str) -> None:
        self._clients[client] -= 1
        if not self._clients[client]:
            del self._clients[client]

    async def _join(self, job: _Job) -> Encoded:
        """Wait for a job; the last who leaves ends it."""
        assert job.task is not None
        job.waiters += 1
        try:
            return await asyncio.shield(job.task)
        finally:
            job.waiters -= 1
            if not job.waiters and job.task is not None:
                job.task.cancel()
                self._leave(job)

    async def _carry_out(self, job: _Job) -> Encoded:
        try:
            return await self._encode(job)
        finally:
            # At once, and not when its end is told: who joined a job that has failed would find it again and again.
            self._leave(job)

    async def _encode(self, job: _Job) -> Encoded:
        arrived = time.monotonic()
        opened = await job.order.open()
        work = Work.of([opened.grid])
        self._admit(job, work)
        self._misses += 1
        self._observer.miss()
        share = work.patches + opened.decoded_pixels // _DECODED_PIXELS_A_PATCH
        job.turn = Turn(job.client, work, share, opened.memory_bytes)
        async with self._turns.wait(job.turn):
            turn_ms = (time.monotonic() - arrived) * 1e3
            prepared, waited_ms = await self._prepare(job.turn, opened)
            lane, ran = await self._run(job, job.turn, prepared)
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

    def _admit(self, job: _Job, work: Work) -> None:
        """Refuse now what would wait in vain."""
        self._lanes.check_in_service()
        waiting = self._turns.accepted.patches
        most = self._limits.patches * (1 if self._clients[job.client] > 1 else _NEWCOMERS)
        if waiting and waiting + work.patches > most:
            excess = min(waiting, waiting + work.patches - self._limits.patches)
            raise Overloaded(
                f"{waiting} patches are waiting, this item has {work.patches}, the limit is {self._limits.patches}",
                retry_after_s=self._lanes.wait_s(self._turns.accepted, len(self._jobs)) * excess / waiting,
            )
        left_s = job.deadline - time.monotonic()
        # Where nothing else is under way, time is not lost to anybody, and what the lanes believe of it may be wrong.
        needed_s = self._turns.finish_s(job.client, work) if waiting else 0.0
        if left_s < needed_s:
            raise CannotFinish(
                f"this item would take about {needed_s:.2f} s from now, and its deadline is in {max(0.0, left_s):.2f} s"
            )

    async def _prepare(self, turn: Turn, opened: Opened) -> tuple[Prepared, float]:
        """On a preprocessing thread; also returns the milliseconds that it waited for one."""
        asked = time.monotonic()
        loop = asyncio.get_running_loop()

        def done(_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._turns.prepared, turn)

        preparing = self._preprocessing.submit(opened.prepare)
        # By the thread, which goes on, and holds its memory, where the caller leaves.
        preparing.add_done_callback(done)
        prepared = await asyncio.wrap_future(preparing)
        self._turns.keep(turn, prepared.patches.values.nbytes)
        waited_ms = (time.monotonic() - asked) * 1e3 - prepared.decode_ms - prepared.preprocess_ms
        return prepared, max(0.0, waited_ms)

    async def _run(self, job: _Job, turn: Turn, prepared: Prepared) -> tuple[Lane, Ran]:
        """On the lane that will finish it first; on another one if that fails."""
        failed: list[Lane] = []
        self._turns.arrived(turn)
        while True:
            lane = self._lanes.soonest(turn.work, failed)
            if (called := turn.lane) is not None and not called.out_for_s and called not in failed:
                lane = called
            try:
                return lane, await lane.encode(
                    prepared.patches,
                    job.client,
                    lambda: job.deadline,
                    lambda lane=lane: self._draft(job, lane, prepared),  # type: ignore[misc]
                )
            except LaneOut as out:
                if out.running:
                    failed.append(lane)
                if len(failed) >= _MOST_FAILED_LANES:
                    raise LaneFault("this item was running on several lanes when they failed") from out
            except LaneFault:
                failed.append(lane)
                if all(lane in failed or lane.out_for_s for lane in self.lanes):
                    raise

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
