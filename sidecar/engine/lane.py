"""A lane: one runtime on one device, with its own threads, queue and measured cost.

The threads own the runtime, one for each of its streams, or two where it copies one run while another computes. They take what
is waiting in fair order; several small items make one run for as long as that saves time. Work whose caller has gone, or whose
deadline has become out of reach, never runs.

A run that fails is followed by one that is known to be good. If that works, the items were at fault. If it fails too, the lane
goes out of service, what waits is given back, and the good run is tried again after longer and longer pauses.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from sidecar.engine.cost import NOTHING, CostModel, Work
from sidecar.engine.fair_queue import FairQueue
from sidecar.engine.known_good import KnownGood, blank
from sidecar.engine.load_meter import LoadMeter
from sidecar.engine.observer import Observer
from sidecar.engine.status import LaneIdentity, LaneStatus
from sidecar.engine.store import Draft
from sidecar.engine.ticket import LaneOut, Ran, Ticket, work_of
from sidecar.errors import CannotFinish, LaneFault, ShuttingDown
from sidecar.runtimes.base import Runtime
from sidecar.vision.dtypes import all_finite
from sidecar.vision.pixels import Patches
from sidecar.vision.spec import TowerSpec

logger = logging.getLogger(__name__)

# Items share a run while its fixed cost is more than this part of it, by measure; and never more than so many, since eight
# already save seven eighths of what sharing can, and each makes the others wait.
_WORTHWHILE = 0.1
_MOST_SHARED = 8
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


class Lane:
    """Encodes items on its own threads. `encode` and `status` are for the event loop."""

    def __init__(
        self, name: str, runtime: Runtime, tower: TowerSpec, *, batch_patches: int, observer: Observer | None = None
    ) -> None:
        """`batch_patches`: the most patches in one run of several items; 0 for one item a run."""
        self.identity = LaneIdentity(name, runtime.name, runtime.device, runtime.precision)
        self.cost = CostModel()
        self.output_dtype = runtime.output_dtype
        self.width = tower.out_hidden_size
        self.streams = runtime.streams
        self.runtime = runtime
        self._tower = tower
        self._known_good = KnownGood(runtime, tower)
        self._batch_patches = batch_patches
        self._observer = observer or Observer()
        self._changed = threading.Condition()  # guards everything below
        self._queue: FairQueue[Ticket] = FairQueue()
        self._waiting = NOTHING
        self._running = NOTHING
        self._running_items = 0
        self._closing = False
        self._out_until: float | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._meter = LoadMeter(time.monotonic(), runtime.streams)
        self._last_ended = 0.0
        self._runs = self._items = self._patches = self._failures = 0
        self._last_error = ""
        self._threads = [
            threading.Thread(target=self._serve, name=f"lane-{name}-{number}", daemon=True)
            for number in range(runtime.streams * (2 if runtime.pipelined else 1))
        ]
        for thread in self._threads:
            thread.start()

    async def encode(
        self, patches: Patches, client: str, deadline: Callable[[], float], draft: Callable[[], Draft]
    ) -> Ran:
        """Queue an item and wait for its embedding.

        Args:
            deadline: when it must be done, in `time.monotonic` seconds; asked again when its turn comes.
            draft: makes room for the rows; called on the lane's thread.

        Raises:
            LaneFault: if the runtime failed, or gave values that are not finite.
            LaneOut: if the lane went out of service before the item's turn.
            CannotFinish: if the deadline was out of reach by then.
            ShuttingDown: if the lane is closed.
        """
        loop = asyncio.get_running_loop()
        work = Work.of([patches.grid])
        ticket = Ticket(patches, patches.grid, deadline, draft, loop, loop.create_future(), work)
        with self._changed:
            if self._closing:
                raise ShuttingDown("this server is shutting down; send the item to another one")
            if self._out_until is not None:
                raise LaneOut
            self._queue.push(client, ticket, work.patches)
            self._waiting += work
            self._changed.notify()
        try:
            return await ticket.done
        except asyncio.CancelledError:
            ticket.patches = None
            with self._changed:
                if self._queue.remove(client, ticket):
                    self._waiting -= work
            raise

    @property
    def out_for_s(self) -> float:
        """0 in service; else the seconds until it is tried again."""
        out_until = self._out_until
        return 0.0 if out_until is None else max(0.001, out_until - time.monotonic())

    @property
    def run_patches(self) -> int:
        """About how many patches make a run that is worth its fixed cost."""
        one = self.cost.ms(Work(1, 1.0)) - self.cost.fixed_ms
        if one <= 0:
            return self._batch_patches
        return min(self._batch_patches, math.ceil(self.cost.fixed_ms * (1 / _WORTHWHILE - 1) / one))

    def backlog_ms(self) -> float:
        """Predicted time to finish all that it has."""
        with self._changed:
            work, items = self._waiting + self._running, len(self._queue) + self._running_items
        return self.bulk_ms(work, items) if items else 0.0

    def bulk_ms(self, work: Work, items: int) -> float:
        """Predicted time for so many items together, in runs as large as pays, on all streams."""
        runs = min(items, math.ceil(work.patches / max(1, self.run_patches)))
        return (self.cost.ms(work) + self.cost.fixed_ms * (runs - 1)) / self.streams

    def busy(self) -> float:
        """The share of the last seconds that it spent running."""
        with self._changed:
            return self._meter.busy(time.monotonic())

    def warm_up(self, budget_s: float) -> None:
        """Take the first runs of everything upon itself, and learn what they cost; larger ones only while the time lasts.

        Raises:
            RuntimeFault: if the runtime fails.
        """
        self._known_good.warm_up(self.cost, budget_s)

    def close(self, timeout_s: float | None = None) -> bool:
        """Take no more, finish what is queued, and end the threads. Returns whether that was done within `timeout_s`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        until = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def status(self) -> LaneStatus:
        backlog_ms = self.backlog_ms()
        with self._changed:
            return LaneStatus(
                name=self.identity.name,
                runtime=self.identity.runtime,
                device=self.identity.device,
                precision=self.identity.precision,
                state="serving" if self._out_until is None else "out",
                streams=self.streams,
                waiting_items=len(self._queue),
                waiting_patches=self._waiting.patches,
                running_items=self._running_items,
                backlog_ms=backlog_ms,
                busy=self._meter.busy(time.monotonic()),
                runs=self._runs,
                items=self._items,
                patches=self._patches,
                failures=self._failures,
                last_error=self._last_error,
                cost=self.cost.curve(),
            )

    def _serve(self) -> None:
        while self._step():
            pass

    def _step(self) -> bool:
        """One run, in a frame of its own so that an idle lane holds none of its memory. False: it is over."""
        run = self._next_run()
        if run:
            self._carry_out(run)
        elif run is not None:
            self._try_again()
        return run is not None

    def _next_run(self) -> list[Ticket] | None:
        """What to run now, in fair order. Nothing of it: the lane is out of service and due for a try. None: it is over."""
        with self._changed:
            while True:
                if self._out_until is not None:
                    if self._closing:
                        return None
                    pause_s = self._out_until - time.monotonic()
                    if pause_s <= 0:
                        self._out_until = time.monotonic() + self._pause_s  # of several threads one tries
                        return []
                    self._changed.wait(pause_s)
                elif run := self._gather():
                    return run
                elif self._closing:
                    return None
                else:
                    self._changed.wait()

    def _gather(self) -> list[Ticket]:
        run: list[Ticket] = []
        while (ticket := self._queue.pop(lambda more: self._pays(run, more))) is not None:
            total = work_of(run)
            self._waiting -= ticket.work
            if ticket.patches is None or ticket.done.cancelled():
                continue
            if ticket.deadline() < time.monotonic() + self.cost.ms(total + ticket.work) / 1e3:
                ticket.answer(CannotFinish("the item's turn came too late for its deadline"))
                continue
            run.append(ticket)
        self._running += work_of(run)
        self._running_items += len(run)
        return run

    def _pays(self, run: Sequence[Ticket], more: Ticket) -> bool:
        """Whether one more item in a run saves more by sharing its fixed cost than the others lose by waiting for it."""
        first = run[0].patches if run else None
        if first is None or more.patches is None:
            return True  # it is the first, or nobody wants it and it is skipped
        together = work_of(run) + more.work
        return (
            len(run) < _MOST_SHARED
            and together.patches <= self._batch_patches
            and self.cost.fixed_ms > _WORTHWHILE * self.cost.ms(together)
            and first.values.dtype == more.patches.values.dtype
        )

    def _carry_out(self, run: list[Ticket]) -> None:
        with self._changed:
            self._meter.begin(time.monotonic())
        try:
            if self._attempt(run) is None:
                return
            if not self._is_well():
                self._go_out()
                failed = run
            elif len(run) > 1:
                # One of them is at fault, and its neighbours are not.
                failed = [ticket for ticket in run if self._attempt([ticket]) is not None]
            else:
                failed = run
            for ticket in failed:
                ticket.answer(self._fault())
        finally:
            with self._changed:
                self._meter.end(time.monotonic())
                for ticket in run:
                    self._running -= ticket.work
                self._running_items -= len(run)

    def _attempt(self, run: list[Ticket]) -> BaseException | None:
        """Run, and answer each item. Returns what the runtime threw, if it did."""
        try:
            self._run(run)
        except BaseException as error:  # nothing that a runtime throws must end the lane
            grids = ", ".join(str(tuple(ticket.grid)) for ticket in run)
            logger.error("%s failed on %s", self.identity.name, grids, exc_info=error)
            with self._changed:
                self._failures += 1
                self._last_error = f"{type(error).__name__} on a run of {len(run)}"
            run[0].tell(self._observer.run_failed, self.identity.name)
            return error
        return None

    def _run(self, run: list[Ticket]) -> None:
        started = time.monotonic()
        patches = [ticket.patches for ticket in run if ticket.patches is not None]
        if len(patches) < len(run):  # a caller has gone in this very moment
            patches = [ticket.patches or blank(ticket.grid, self._tower) for ticket in run]
        grids = [ticket.grid for ticket in run]
        drafts: list[Draft] = []
        try:
            if len(run) == 1:
                # Straight into the store's file.
                drafts.append(run[0].draft())
                self.runtime.run(patches[0].values, grids, drafts[0].rows)
                rows = [drafts[0].rows]
            else:
                together = np.concatenate([item.values for item in patches])
                whole = self.runtime.encode(together, grids, self._tower)
                ends = np.cumsum([grid.tokens(self._tower) for grid in grids])
                rows = np.split(whole, ends[:-1])
            ran_at = time.monotonic()
            self._count(run, started, ran_at)
            for number, ticket in enumerate(run):
                if len(run) > 1:
                    drafts.append(ticket.draft())
                    drafts[number].rows[:] = rows[number]
                self._deliver(ticket, drafts[number], started, ran_at)
        finally:
            for draft in drafts:
                draft.discard()

    def _deliver(self, ticket: Ticket, draft: Draft, started: float, ran_at: float) -> None:
        begun = time.monotonic()
        if not all_finite(draft.rows, self.output_dtype):
            ticket.answer(
                LaneFault("the embedding is not finite; the input or the artifact's precision is out of range")
            )
            return
        entry = draft.publish(self.identity)
        took_ms = (time.monotonic() - begun) * 1e3
        queue_ms = (started - ticket.queued_at) * 1e3
        ticket.answer(Ran(draft.rows, entry, queue_ms, (ran_at - started) * 1e3, took_ms))

    def _fault(self) -> LaneFault:
        runtime = self.identity.runtime
        return LaneFault(f"the {runtime} runtime failed on this item; the server's log has the details")

    def _is_well(self) -> bool:
        try:
            self._known_good.run()
        except BaseException:
            logger.exception("%s failed on an item that is known to be good", self.identity.name)
            return False
        return True

    def _go_out(self) -> None:
        """Out of service: what waits is given back, for other lanes."""
        with self._changed:
            self._out_until = time.monotonic() + self._pause_s
            logger.error("%s is out of service and is tried again in %g s", self.identity.name, self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            left = self._queue.clear()
            self._waiting = NOTHING
            self._changed.notify_all()
        for ticket in left:
            ticket.answer(LaneOut())

    def _try_again(self) -> None:
        well = self._is_well()
        with self._changed:
            if well:
                self._out_until, self._pause_s = None, _FIRST_PAUSE_S
                logger.warning("%s is in service again", self.identity.name)
            else:
                self._out_until = time.monotonic() + self._pause_s
                self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            self._changed.notify_all()

    def _count(self, run: Sequence[Ticket], started: float, ended: float) -> None:
        work, run_ms = work_of(run), (ended - started) * 1e3
        with self._changed:
            # A pipelined run that began while another was computing cost the lane only what came after that one's end.
            begun = max(started, self._last_ended) if self.runtime.pipelined else started
            self._last_ended = max(self._last_ended, ended)
            self.cost.learn(work, max(0.0, ended - begun) * 1e3)
            self._runs += 1
            self._items += len(run)
            self._patches += work.patches
        run[0].tell(self._observer.run, self.identity.name, len(run), work.patches, run_ms)
