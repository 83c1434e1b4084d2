"""A lane: one runtime on one device, with its own threads, queue and measured cost.

The threads own the runtime, one for each of its streams, or two where it copies one run while another computes. They take what
is waiting in fair order; several small items make one run for as long as that saves time. Work whose caller has gone, or whose
deadline has become out of reach, never runs.

A run that fails, or gives values that are not finite, is followed by the self-test. If the lane passes it, the items were at
fault. If not, the circuit breaker takes the lane out of service: what waits is given back, and the self-test is tried again after
longer and longer pauses. A run that takes many times its predicted time takes the lane out of service too, until it returns.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from sidecar.engine.circuit_breaker import CircuitBreaker
from sidecar.engine.cost import NOTHING, CostModel, Work, attention_share
from sidecar.engine.execution import carry_out
from sidecar.engine.fair_queue import FairQueue
from sidecar.engine.load_meter import LoadMeter
from sidecar.engine.observer import Observer
from sidecar.engine.self_test import SelfTest, SelfTestError
from sidecar.engine.status import LaneIdentity, LaneStatus
from sidecar.engine.store import Draft
from sidecar.engine.ticket import LaneOut, Ran, Ticket, work_of
from sidecar.engine.watchdog import STEP_S, Run, Watchdog
from sidecar.errors import CannotFinish, EncoderError, LaneFault, ShuttingDown
from sidecar.runtimes.base import Runtime
from sidecar.vision.pixels import Patches
from sidecar.vision.spec import TowerSpec

logger = logging.getLogger(__name__)

# Items share a run while its fixed cost is more than this part of it, by measure; and never more than so many, since eight
# already save seven eighths of what sharing can, and each makes the others wait.
_WORTHWHILE = 0.1
_MOST_SHARED = 8
# The self-test comes again after so long, and after so many times what it took: whether the lane is still right, and what runs
# have come to cost where there were none.
_TEST_EVERY_S, _TEST_EVERY_TIMES = 60.0, 100.0
# How long one may take that nothing is known of.
_FIRST_TEST_MS = 10_000.0


class Lane:
    """Encodes items on its own threads. `encode` and `status` are for the event loop."""

    def __init__(
        self,
        name: str,
        runtime: Runtime,
        tower: TowerSpec,
        *,
        batch_patches: int,
        observer: Observer | None = None,
        self_test: SelfTest | None = None,
    ) -> None:
        """`batch_patches`: the most patches in one run of several items; 0 for one item a run. `self_test`: one that knows the
        artifact's references; without it the lane is only compared with itself."""
        self.identity = LaneIdentity(name, runtime.name, runtime.device, runtime.precision)
        self.cost = CostModel(attention_share(tower))
        self.output_dtype = runtime.output_dtype
        self.width = tower.out_hidden_size
        self.streams = runtime.streams
        self.runtime = runtime
        self._tower = tower
        self._self_test = self_test or SelfTest(runtime, tower)
        self._batch_patches = batch_patches
        self._observer = observer or Observer()
        self._changed = threading.Condition()  # guards everything below
        self._queue: FairQueue[Ticket] = FairQueue()
        self._waiting = NOTHING
        self._running = NOTHING
        self._running_items = 0
        self._test_at = math.inf  # not before it is warm
        self._closing = False
        self._breaker = CircuitBreaker()
        self._meter = LoadMeter(time.monotonic(), runtime.streams)
        self._last_ended = 0.0
        self._runs = self._items = self._patches = self._failures = 0
        self._last_error = ""
        self._threads = [
            threading.Thread(target=self._serve, name=f"lane-{name}-{number}", daemon=True)
            for number in range(runtime.streams * (2 if runtime.pipelined else 1))
        ]
        self._watchdog = Watchdog(f"lane-{name}", self._abandon)
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
            LaneFault: if the item made the runtime fail, or give values that are not finite.
            LaneOut: if the lane is out of service, or failed with the item.
            CannotFinish: if the deadline was out of reach by then.
            ShuttingDown: if the lane is closed.
        """
        loop = asyncio.get_running_loop()
        work = Work.of([patches.grid])
        ticket = Ticket(patches, patches.grid, deadline, draft, loop, loop.create_future(), work)
        with self._changed:
            if self._closing:
                raise ShuttingDown("this server is shutting down; send the item to another one")
            if self._breaker.is_open:
                raise LaneOut
            ticket.found_idle = not self._running_items and not len(self._queue)
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
        return self._breaker.retry_in_s

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
        """Pass the self-test, take the first runs of everything upon itself, and learn what they cost; larger ones only while the
        time lasts. A lane that does not pass is out of service from the start.

        Raises:
            RuntimeFault: if the runtime fails.
        """
        try:
            self._self_test.warm_up(self.cost, budget_s)
        except SelfTestError as error:
            self._go_out(str(error))
        self._plan_test()

    def close(self, timeout_s: float | None = None) -> bool:
        """Take no more, finish what is queued, and end the threads. Without a limit of time, one that is stuck is left to itself.

        Returns:
            Whether all of them ended within `timeout_s`.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            while thread.is_alive() and (left_s := until - time.monotonic()) > 0:
                if timeout_s is None and self._watchdog.is_stuck(thread):
                    break
                thread.join(min(left_s, STEP_S))
        if not any(thread.is_alive() and not self._watchdog.is_stuck(thread) for thread in self._threads):
            self._watchdog.stop()
        return not any(thread.is_alive() for thread in self._threads)

    def status(self) -> LaneStatus:
        backlog_ms = self.backlog_ms()
        with self._changed:
            return LaneStatus(
                name=self.identity.name,
                runtime=self.identity.runtime,
                device=self.identity.device,
                precision=self.identity.precision,
                state="out" if self._breaker.is_open else "serving",
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
            self._test()
        return run is not None

    def _next_run(self) -> list[Ticket] | None:
        """What to run now, in fair order. Nothing of it: the self-test is due. None: it is over."""
        with self._changed:
            while True:
                if self._breaker.is_open:
                    if self._closing:
                        return None
                    if self._breaker.take_attempt():
                        return []
                    self._changed.wait(self._breaker.retry_in_s)
                elif (test_in_s := self._test_at - time.monotonic()) <= 0 and not self._closing:
                    self._test_at = math.inf
                    return []
                elif run := self._gather():
                    return run
                elif self._closing:
                    return None
                else:
                    self._changed.wait(min(test_in_s, _TEST_EVERY_S))

    def _gather(self) -> list[Ticket]:
        run: list[Ticket] = []
        while (ticket := self._queue.pop(lambda more: self._pays(run, more))) is not None:
            total = work_of(run)
            self._waiting -= ticket.work
            if ticket.patches is None or ticket.done.cancelled():
                continue
            # An item that found the lane idle runs whatever the lane believes: only runs can tell it that it is wrong.
            needed_s = 0.0 if ticket.found_idle else self.cost.ms(total + ticket.work) / 1e3
            if ticket.deadline() < time.monotonic() + needed_s:
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

    def _carry_out(self, tickets: list[Ticket]) -> None:
        work = work_of(tickets)
        run = Run.of(tickets, self.cost.ms(work), measured=self.cost.is_measured(work))
        self._watchdog.begin(run)
        with self._changed:
            self._meter.begin(time.monotonic())
        try:
            failed = self._attempt(run, tickets)
            if failed and (trouble := self._self_test_error()):
                self._go_out(trouble)
                for ticket in failed:
                    ticket.answer(LaneOut(running=True))
                return
            if len(tickets) > 1:
                # One of them is at fault, and its neighbours are not.
                failed = {ticket: fault for alone in failed for ticket, fault in self._attempt(run, [alone]).items()}
            for ticket, fault in failed.items():
                ticket.answer(fault)
        finally:
            abandoned = self._watchdog.end()
            with self._changed:
                self._meter.end(time.monotonic())
                if not abandoned:
                    self._forget(run)

    def _forget(self, run: Run) -> None:
        """It takes none of the lane's time any more."""
        for ticket in run.tickets:
            self._running -= ticket.work
        self._running_items -= len(run.tickets)

    def _attempt(self, run: Run, tickets: list[Ticket]) -> dict[Ticket, EncoderError]:
        """Run some of a run's items, and answer those that come out well. Returns the others, and what is to be said of them."""
        try:
            failed = carry_out(run, tickets, self.runtime, self._tower, self.identity, self._count)
            if not failed:
                return {}
            what = "values that are not finite"
            logger.error("lane %s gave %s for %s", self.identity.name, what, _grids(failed))
        except BaseException as error:  # nothing that a runtime throws must end the lane
            what = type(error).__name__
            logger.error("lane %s failed on %s", self.identity.name, _grids(tickets), exc_info=error)
            fault = f"the {self.identity.runtime} runtime failed on this item; the server's log has the details"
            failed = {ticket: LaneFault(fault) for ticket in tickets}
        if run.abandoned:  # its items have been answered
            return {}
        self._fail(f"{what} on a run of {len(tickets)}", tickets)
        return failed

    def _fail(self, what: str, tickets: Sequence[Ticket]) -> None:
        with self._changed:
            self._failures += 1
            self._last_error = what
        for ticket in tickets[:1]:
            ticket.tell(self._observer.run_failed, self.identity.name)

    def _self_test_error(self) -> str:
        """Why the self-test fails; empty if it passes."""
        try:
            self._self_test.run()
        except BaseException as error:
            return str(error) or type(error).__name__
        return ""

    def _go_out(self, reason: str) -> None:
        """Out of service: what waits is given back, for other lanes."""
        with self._changed:
            pause_s = self._breaker.trip()
            self._last_error = reason
            left = self._queue.clear()
            self._waiting = NOTHING
            self._changed.notify_all()
        logger.error("lane %s is out of service, next try in %g s: %s", self.identity.name, pause_s, reason)
        for ticket in left:
            ticket.answer(LaneOut())

    def _test(self) -> None:
        """The self-test of a lane that is out of service, or whose time for one has come."""
        self._watchdog.begin(Run.of([], self._self_test.predicted_ms(self.cost) or _FIRST_TEST_MS))
        try:
            if self._self_test.passed:
                self._self_test.run(self.cost)
            else:  # from the start, so that nothing is known of what runs cost
                self._self_test.warm_up(self.cost, 0.0)
        except BaseException as error:
            self._fail("the self-test failed", ())
            self._go_out(str(error) or type(error).__name__)
            return
        finally:
            self._watchdog.end()
            self._plan_test()
        with self._changed:
            if self._breaker.is_open:
                logger.warning("lane %s is in service again", self.identity.name)
            self._breaker.reset()
            self._changed.notify_all()

    def _plan_test(self) -> None:
        took_s = self._self_test.predicted_ms(self.cost) / 1e3
        with self._changed:
            self._test_at = time.monotonic() + max(_TEST_EVERY_S, _TEST_EVERY_TIMES * took_s)
            self._changed.notify_all()

    def _abandon(self, run: Run) -> None:
        """Give up a run that is stuck. The lane is out of service until one of its threads is free and passes the self-test."""
        with self._changed:
            self._forget(run)
        what = f"a run of {len(run.tickets)} items" if run.tickets else "the self-test"
        reason = f"{what} has not returned for {run.watched_s:.0f} s"
        self._fail(reason, run.tickets)
        self._go_out(reason)
        for ticket in run.tickets:
            ticket.answer(LaneOut(running=True))

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


def _grids(tickets: Iterable[Ticket]) -> str:
    return ", ".join(str(tuple(ticket.grid)) for ticket in tickets)
