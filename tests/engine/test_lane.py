"""A lane: one runtime, its threads, one queue. Nobody waits for ever, whatever the runtime does."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from lanes import TOWER, FakeRuntime, draft, encode, entered, item, run

from sidecar.engine.cost import Work
from sidecar.engine.lane import Lane
from sidecar.engine.store import Draft
from sidecar.engine.ticket import LaneOut, Ran
from sidecar.engine.watchdog import STEP_S, STUCK_S, Run, Watchdog
from sidecar.errors import CannotFinish, LaneFault, ShuttingDown, fault_of
from sidecar.runtimes.base import RuntimeFault
from sidecar.vision.dtypes import Array, DType

MakeLane = Callable[..., Lane]


@pytest.fixture
def make_lane(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeLane]:
    """One item a run unless told otherwise, and out of service for a moment only."""
    monkeypatch.setattr("sidecar.engine.circuit_breaker.FIRST_PAUSE_S", 0.02)
    lanes: list[Lane] = []

    def make(runtime: FakeRuntime, batch_patches: int = 0) -> Lane:
        lanes.append(Lane("lane", runtime, TOWER, batch_patches=batch_patches))
        return lanes[-1]

    yield make
    for lane in lanes:
        assert lane.close(timeout_s=10)


def expensive_start(lane: Lane) -> None:
    """Let a lane believe that a run costs 10 ms, and a patch almost nothing."""
    for patches in (4, 400, 4000):
        lane.cost.anchor(Work(patches, 0.0), 10.0 + patches * 1e-4)


def test_an_item_gets_its_rows_and_what_they_took(make_lane: MakeLane) -> None:
    lane = make_lane(FakeRuntime())

    async def ask() -> None:
        ran = await encode(lane, item(7, patches=8))
        assert ran.rows.tolist() == [[7.0] * 4] * 2
        assert min(ran.queue_ms, ran.run_ms, ran.publish_ms) >= 0

    run(ask())


def test_the_runtime_writes_into_the_drafts_own_memory(make_lane: MakeLane) -> None:
    """No copy of an embedding on its way into the store."""
    runtime = FakeRuntime()
    outs: list[Array] = []
    whole = runtime.run
    runtime.run = lambda patches, grids, out: (outs.append(out), whole(patches, grids, out))  # type: ignore[assignment]
    lane = make_lane(runtime)
    room = draft(item(1))

    async def ask() -> None:
        await lane.encode(item(1), "somebody", lambda: math.inf, lambda: room)

    run(ask())
    assert outs[0] is room.rows


def test_items_of_a_client_run_in_the_order_they_came(make_lane: MakeLane) -> None:
    running = threading.Lock()

    def alone(_: int) -> None:
        assert running.acquire(blocking=False)
        running.release()

    runtime = FakeRuntime(alone)
    lane = make_lane(runtime)

    async def ask() -> None:
        results = await asyncio.gather(*(encode(lane, item(value)) for value in range(50)))
        assert [int(result.rows[0, 0]) for result in results] == list(range(50))

    run(ask())
    assert runtime.ran == list(range(50))


def test_clients_take_turns(make_lane: MakeLane) -> None:
    runtime = FakeRuntime()
    lane = make_lane(runtime)

    async def ask() -> None:
        runtime.gate.clear()
        tasks = [asyncio.create_task(encode(lane, item(1)))]
        await entered(runtime)
        tasks += [asyncio.create_task(encode(lane, item(value), "flood")) for value in range(10, 20)]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(encode(lane, item(2), "other")))
        await asyncio.sleep(0)
        runtime.gate.set()
        await asyncio.gather(*tasks)

    run(ask())
    assert runtime.ran.index(2) <= 2


def test_small_items_share_a_run_where_that_pays(make_lane: MakeLane) -> None:
    runtime = FakeRuntime()
    lane = make_lane(runtime, batch_patches=64)
    expensive_start(lane)

    async def ask() -> None:
        runtime.gate.clear()
        tasks = [asyncio.create_task(encode(lane, item(1)))]
        await entered(runtime)
        tasks += [asyncio.create_task(encode(lane, item(value, 16))) for value in range(2, 12)]
        await asyncio.sleep(0)
        runtime.gate.set()
        results = await asyncio.gather(*tasks)
        assert [int(result.rows[-1, -1]) for result in results] == list(range(1, 12))  # each has its own rows

    run(ask())
    assert runtime.runs == [[1], [2, 3, 4, 5], [6, 7, 8, 9], [10, 11]]  # never over 64 patches


def test_large_items_run_alone(make_lane: MakeLane) -> None:
    """Where a run's fixed cost is small beside the item, sharing it saves nothing and makes the first one wait."""
    runtime = FakeRuntime()
    lane = make_lane(runtime, batch_patches=1 << 20)
    for patches in (4, 400, 4000):
        lane.cost.anchor(Work(patches, 0.0), 0.01 + patches)

    async def ask() -> None:
        runtime.gate.clear()
        tasks = [asyncio.create_task(encode(lane, item(value, 16))) for value in range(5)]
        await entered(runtime)
        runtime.gate.set()
        await asyncio.gather(*tasks)

    run(ask())
    assert runtime.runs == [[0], [1], [2], [3], [4]]


def test_streams_run_side_by_side(make_lane: MakeLane) -> None:
    runtime = FakeRuntime(streams=3)
    lane = make_lane(runtime)

    async def ask() -> None:
        runtime.gate.clear()
        tasks = [asyncio.create_task(encode(lane, item(value))) for value in range(3)]
        for _ in range(3):
            await entered(runtime)
        assert lane.status().running_items == 3
        runtime.gate.set()
        await asyncio.gather(*tasks)

    run(ask())


def test_cancelled_work_is_skipped(make_lane: MakeLane) -> None:
    runtime = FakeRuntime()
    lane = make_lane(runtime)

    async def ask() -> None:
        runtime.gate.clear()
        tasks = [asyncio.create_task(encode(lane, item(value))) for value in range(5)]
        await entered(runtime)
        for index in (0, 1, 3):  # the first is running by now
            tasks[index].cancel()
        runtime.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [
            *(asyncio.CancelledError, asyncio.CancelledError, Ran, asyncio.CancelledError, Ran)
        ]
        assert (lane.status().waiting_items, lane.status().waiting_patches) == (0, 0)

    run(ask())
    assert runtime.ran == [0, 2, 4]


def test_work_whose_deadline_has_come_too_near_is_skipped(make_lane: MakeLane) -> None:
    runtime = FakeRuntime()
    lane = make_lane(runtime)
    lane.cost.anchor(Work(4, 0.0), 50.0)

    async def ask() -> None:
        runtime.gate.clear()
        first = asyncio.create_task(encode(lane, item(1)))
        await entered(runtime)
        # When its turn comes, there is time left, but less than a run takes.
        late = asyncio.create_task(encode(lane, item(2), deadline=time.monotonic() + 0.09))
        patient = asyncio.create_task(encode(lane, item(3)))
        await asyncio.sleep(0.05)
        runtime.gate.set()
        await first
        with pytest.raises(CannotFinish):
            await late
        await patient

    run(ask())
    assert runtime.ran == [1, 3]


def test_cancelled_work_that_waits_takes_no_memory(make_lane: MakeLane) -> None:
    """Callers that give up and come again behind one long run must not fill the memory with what they gave up."""
    runtime = FakeRuntime()
    lane = make_lane(runtime)

    async def ask() -> None:
        runtime.gate.clear()
        first = asyncio.create_task(encode(lane, item(1)))
        await entered(runtime)
        patches = item(2)
        memory = weakref.ref(patches.values)
        given_up = asyncio.create_task(encode(lane, patches))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        del patches, given_up
        assert memory() is None
        runtime.gate.set()
        await first

    run(ask())


def test_a_closed_lane_lets_its_model_go_at_once() -> None:
    """Not when Python's collector comes: a reload has two models in memory as it is."""
    runtime = FakeRuntime()
    memory = weakref.ref(runtime)
    lane = Lane("lane", runtime, TOWER, batch_patches=0)
    lane.warm_up(0)
    gc.disable()
    try:
        assert lane.close(10)
        del lane, runtime
        ends = time.monotonic() + 10
        while memory() is not None and time.monotonic() < ends:
            time.sleep(0.01)  # the watchdog's thread is on its way out
        assert memory() is None
    finally:
        gc.enable()


def test_an_idle_lane_holds_no_memory_of_its_last_run(make_lane: MakeLane) -> None:
    lane = make_lane(FakeRuntime())

    async def ask() -> None:
        patches = item(2)
        memory = weakref.ref(patches.values)
        await encode(lane, patches)
        del patches
        for _ in range(200):  # the lane's thread may still be on its way
            if memory() is None:
                break
            await asyncio.sleep(0.01)
        assert memory() is None

    run(ask())


@pytest.mark.parametrize(
    "error",
    [
        RuntimeFault("out of memory at /secret/path"),
        RuntimeError("/secret/path"),
        MemoryError(),
        ValueError("/secret/path"),
        AssertionError(),
        OSError(5, "/secret/path"),
        KeyboardInterrupt(),
        SystemExit(3),
        GeneratorExit(),
        type("Unheard", (BaseException,), {})(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_runtime_raises_is_a_fault_of_the_item_and_the_lane_goes_on(
    make_lane: MakeLane, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(value: int) -> None:
        if value == 13:
            raise error

    lane = make_lane(FakeRuntime(fail))

    async def ask() -> None:
        before, failed, after = await asyncio.gather(
            *(encode(lane, item(value)) for value in (1, 13, 2)), return_exceptions=True
        )
        assert isinstance(before, Ran) and isinstance(after, Ran)
        assert isinstance(failed, LaneFault)
        assert "the fake runtime failed on this item" in str(failed)
        assert "secret" not in fault_of(failed).message
        assert lane.status().state == "serving"

    with caplog.at_level(logging.ERROR):
        run(ask())
    (record,) = caplog.records
    assert record.exc_info and record.exc_info[1] is error  # the log has what the client must not see


def test_an_item_that_fails_costs_its_neighbours_in_the_run_nothing(make_lane: MakeLane) -> None:
    def fail(value: int) -> None:
        if value == 13:
            raise RuntimeFault("no")

    runtime = FakeRuntime(fail)
    lane = make_lane(runtime, batch_patches=1000)
    expensive_start(lane)

    async def ask() -> None:
        runtime.gate.clear()
        tasks = [asyncio.create_task(encode(lane, item(1)))]
        await entered(runtime)
        tasks += [asyncio.create_task(encode(lane, item(value))) for value in (2, 13, 3)]
        await asyncio.sleep(0)
        runtime.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [Ran, Ran, LaneFault, Ran]

    run(ask())
    assert [2, 13, 3] in runtime.runs  # they did share it
    status = lane.status()
    assert (status.running_items, status.backlog_ms, status.state) == (0, 0.0, "serving")


def test_a_lane_whose_runtime_keeps_failing_goes_out_of_service_and_is_tried_again(make_lane: MakeLane) -> None:
    broken = threading.Event()
    broken.set()

    def fail(_: int) -> None:
        if broken.is_set():
            raise RuntimeFault("the device is lost")

    runtime = FakeRuntime(fail)
    lane = make_lane(runtime)

    async def ask() -> None:
        runtime.gate.clear()
        first = asyncio.create_task(encode(lane, item(1)))
        await entered(runtime)
        waiting = asyncio.create_task(encode(lane, item(2)))
        await asyncio.sleep(0)
        runtime.gate.set()
        with pytest.raises(LaneOut) as ran:
            await first
        with pytest.raises(LaneOut) as never_ran:
            await waiting
        assert ran.value.running and not never_ran.value.running
        assert lane.status().state == "out" and lane.out_for_s > 0
        with pytest.raises(LaneOut):
            await encode(lane, item(3))
        tried = len(runtime.ran)
        await entered(runtime)
        while len(runtime.ran) == tried:  # it is tried by itself
            await asyncio.sleep(0.01)
        broken.clear()
        while lane.out_for_s:
            await asyncio.sleep(0.01)
        assert int((await encode(lane, item(4))).rows[0, 0]) == 4

    run(ask())
    assert 2 not in runtime.ran and 3 not in runtime.ran


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16])
def test_an_embedding_that_is_not_finite_is_a_fault(make_lane: MakeLane, bad: float, dtype: DType) -> None:
    runtime = FakeRuntime(dtype=dtype)
    whole = runtime.run

    def spoil(patches: np.ndarray, grids: object, out: np.ndarray) -> None:
        whole(patches, grids, out)  # type: ignore[arg-type]
        if patches[0, 0] == 1:
            out[-1, -1] = bad

    runtime.run = spoil  # type: ignore[method-assign]
    lane = make_lane(runtime)

    async def ask() -> None:
        with pytest.raises(LaneFault, match="not finite"):
            await encode(lane, item(1))
        assert lane.status().state == "serving"  # the item is to blame

    run(ask())


def test_an_infinite_bfloat16_is_a_fault_too(make_lane: MakeLane) -> None:
    """numpy knows no bfloat16: its bits must be looked at. Here the self-test gives infinity as well."""
    lane = make_lane(FakeRuntime(dtype=DType.BFLOAT16))

    async def ask() -> None:
        with pytest.raises(LaneOut):
            await encode(lane, item(1))
        assert lane.status().state == "out"

    run(ask())


def test_closing_finishes_what_is_queued_and_takes_no_more(make_lane: MakeLane) -> None:
    runtime = FakeRuntime()
    lane = make_lane(runtime)

    async def ask() -> None:
        runtime.gate.clear()
        tasks = [asyncio.create_task(encode(lane, item(value))) for value in range(4)]
        await entered(runtime)
        assert await asyncio.to_thread(lane.close, 0.05) is False  # it is not done, and says so
        with pytest.raises(ShuttingDown):
            await encode(lane, item(9))
        runtime.gate.set()
        assert await asyncio.to_thread(lane.close, 20) is True
        assert [int(ran.rows[0, 0]) for ran in await asyncio.gather(*tasks)] == [0, 1, 2, 3]

    run(ask())
    assert runtime.ran == [0, 1, 2, 3]


def test_a_caller_whose_loop_has_gone_does_not_end_the_lane(make_lane: MakeLane) -> None:
    runtime = FakeRuntime()
    lane = make_lane(runtime)
    runtime.gate.clear()
    loop = asyncio.new_event_loop()
    left = loop.create_task(encode(lane, item(1)))
    loop.run_until_complete(entered(runtime))
    loop.close()
    runtime.gate.set()

    async def ask() -> None:
        assert int((await encode(lane, item(2))).rows[0, 0]) == 2

    run(ask())
    assert not left.done()
    left._log_destroy_pending = False  # type: ignore[attr-defined]  # it is meant


def test_warming_up_measures_small_sizes_always_and_larger_ones_while_time_lasts() -> None:
    shapes: list[int] = []

    class Counting(FakeRuntime):
        def run(self, patches: np.ndarray, grids: object, out: np.ndarray) -> None:
            shapes.append(len(patches))
            self.before(len(patches))
            out[:] = 1.0

    def fail(_: int) -> None:
        raise RuntimeFault("no")

    hasty, patient = (
        Lane("lane", Counting(lambda size: time.sleep(size * 1e-5)), TOWER, batch_patches=0) for _ in "12"
    )
    hasty.warm_up(budget_s=0)
    window = TOWER.window_patches
    assert {bool(count % window) for count in shapes} == {True, False}  # ragged windows, and whole ones alone
    largest = max(shapes)
    patient.warm_up(budget_s=30)
    assert max(shapes) > largest
    # A patch takes 0.01 ms there; the machine may be busy.
    assert 5 < patient.cost.ms(Work(1024, 1024.0**2)) < 100
    broken = Lane("lane", Counting(fail), TOWER, batch_patches=0)
    with pytest.raises(RuntimeFault):
        broken.warm_up(budget_s=0)
    assert hasty.close(10) and patient.close(10) and broken.close(10)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are stuck after a moment."""
    monkeypatch.setattr("sidecar.engine.watchdog.STUCK_S", 0.2)
    monkeypatch.setattr("sidecar.engine.watchdog.STEP_S", 0.02)


@pytest.mark.usefixtures("impatient")
def test_a_run_that_does_not_return_takes_the_lane_out_until_it_does(make_lane: MakeLane) -> None:
    runtime = FakeRuntime()
    lane = make_lane(runtime)

    async def ask() -> None:
        runtime.gate.clear()
        stuck = asyncio.create_task(encode(lane, item(1)))
        await entered(runtime)
        waiting = asyncio.create_task(encode(lane, item(2)))
        with pytest.raises(LaneOut) as ran:
            await stuck
        with pytest.raises(LaneOut) as never_ran:
            await waiting
        assert ran.value.running and not never_ran.value.running
        status = lane.status()
        assert (status.state, status.failures, status.running_items, status.waiting_items) == ("out", 1, 0, 0)
        assert "a run of 1 items has not returned" in status.last_error
        # The thread cannot be ended, and does not keep the process from ending.
        runtime.gate.set()
        while lane.out_for_s:
            await asyncio.sleep(0.01)
        assert int((await encode(lane, item(3))).rows[0, 0]) == 3
        while lane.status().running_items:  # the lane's thread may still be counting
            await asyncio.sleep(0.01)

    run(ask())


@pytest.mark.usefixtures("impatient")
def test_a_stuck_run_does_not_keep_the_lane_from_closing(make_lane: MakeLane) -> None:
    runtime = FakeRuntime()
    lane = make_lane(runtime)

    async def ask() -> None:
        runtime.gate.clear()
        with pytest.raises(LaneOut):
            await encode(lane, item(1))
        assert await asyncio.to_thread(lane.close) is False  # without a limit of time
        runtime.gate.set()

    run(ask())


def test_time_in_which_the_process_was_stopped_finds_no_run_guilty(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP, or a laptop's lid: the clock goes on, and the watchdog makes one step."""
    found: list[object] = []
    watchdog = Watchdog("lane", found.append)
    watchdog.stop()
    watchdog.begin(Run.of([], predicted_ms=1e3))
    with monkeypatch.context() as later:
        later.setattr(time, "monotonic", lambda: 1e9)
        assert watchdog._step() == []
    steps = 0
    while not watchdog._step():
        steps += 1
    assert steps * STEP_S == pytest.approx(10.0, abs=2 * STEP_S)  # ten times what was predicted
    assert watchdog.is_stuck(threading.current_thread()) and watchdog.end()


def test_a_size_that_was_never_run_has_more_time(make_lane: MakeLane) -> None:
    """Its prediction is an extrapolation, and a false alarm would fail a healthy lane's callers."""
    lane = make_lane(FakeRuntime())
    lane.cost.anchor(Work(4, 0.0), 1000.0)
    assert lane.cost.is_measured(Work(8, 0.0)) and not lane.cost.is_measured(Work(9, 0.0))
    known, unknown = Run.of([], 1000.0), Run.of([], 1000.0, measured=False)
    assert (known.limit_s, unknown.limit_s) == (10.0, 100.0)
    assert Run.of([], 1.0).limit_s == STUCK_S


def test_an_item_that_finds_the_lane_idle_runs_whatever_the_lane_believes(make_lane: MakeLane) -> None:
    lane = make_lane(FakeRuntime())
    lane.cost.anchor(Work(4, 0.0), 60_000.0)

    async def ask() -> None:
        assert (await encode(lane, item(1), deadline=time.monotonic() + 10)).rows[0, 0] == 1
        assert lane.cost.ms(Work(4, 0.0)) < 1000  # it has learned
        with pytest.raises(CannotFinish):
            await encode(lane, item(2), deadline=time.monotonic() - 1)

    run(ask())


def test_a_lane_tests_itself_now_and_then_and_learns(make_lane: MakeLane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.engine.lane._TEST_EVERY_S", 0.05)
    wrong = threading.Event()

    def fail(_: int) -> None:
        if wrong.is_set():
            raise RuntimeFault("the device is lost")

    lane = make_lane(FakeRuntime(fail))
    lane.warm_up(0)
    lane.cost.anchor(Work(4, 0.0), 60_000.0)
    ends = time.monotonic() + 10
    while lane.cost.ms(Work(4, 0.0)) > 1000:
        assert time.monotonic() < ends
        time.sleep(0.01)
    wrong.set()
    while not lane.out_for_s:
        assert time.monotonic() < ends
        time.sleep(0.01)
    wrong.clear()
    while lane.out_for_s:
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_an_item_that_gives_values_that_are_not_finite_costs_its_neighbours_nothing(make_lane: MakeLane) -> None:
    runtime = FakeRuntime()
    whole = runtime.run

    def spoil(patches: np.ndarray, grids: list[object], out: np.ndarray) -> None:
        whole(patches, grids, out)  # type: ignore[arg-type]
        out[out == 13] = math.nan

    runtime.run = spoil  # type: ignore[method-assign, assignment]
    lane = make_lane(runtime, batch_patches=1000)
    expensive_start(lane)

    async def ask() -> None:
        runtime.gate.clear()
        tasks = [asyncio.create_task(encode(lane, item(1)))]
        await entered(runtime)
        tasks += [asyncio.create_task(encode(lane, item(value))) for value in (2, 13, 3)]
        await asyncio.sleep(0)
        runtime.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [Ran, Ran, LaneFault, Ran]

    run(ask())
    assert lane.status().failures == 2  # in the run that they shared, and alone
    assert lane.status().state == "serving"


def test_a_lane_that_is_never_idle_tests_itself_too(make_lane: MakeLane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.engine.lane._TEST_EVERY_S", 0.05)
    wrong = threading.Event()

    def fail(value: int) -> None:
        if wrong.is_set() and value == 255:  # the self-test alone
            raise RuntimeFault("the device is lost")

    lane = make_lane(FakeRuntime(fail))
    lane.warm_up(0)

    async def ask() -> None:
        async def caller(number: int) -> None:
            while not lane.out_for_s:
                with contextlib.suppress(LaneOut):
                    await encode(lane, item(number))

        callers = [asyncio.create_task(caller(number)) for number in range(1, 9)]
        wrong.set()
        await asyncio.gather(*callers)
        wrong.clear()

    run(ask())


def test_what_a_caller_left_behind_is_never_delivered(make_lane: MakeLane) -> None:
    """A shared run fails, its items are run one by one, and one of the callers has gone meanwhile."""
    left: list[asyncio.Task[Ran]] = []
    delivered: list[int] = []

    def fail(value: int) -> None:
        if value == 2:
            raise RuntimeFault("out of memory")
        if value == 255:  # the self-test between the shared run and those after it
            left[0].get_loop().call_soon_threadsafe(left[0].cancel)
            time.sleep(0.1)

    runtime = FakeRuntime(fail)
    lane = make_lane(runtime, batch_patches=1000)
    expensive_start(lane)

    async def ask() -> None:
        runtime.gate.clear()
        first = asyncio.create_task(encode(lane, item(1)))
        await entered(runtime)
        patches = item(3)

        def watched() -> Draft:
            delivered.append(3)
            return draft(patches)

        gone = asyncio.create_task(lane.encode(patches, "somebody", lambda: math.inf, watched))
        left.append(gone)
        bad = asyncio.create_task(encode(lane, item(2)))
        await asyncio.sleep(0)
        runtime.gate.set()
        await first
        with pytest.raises(LaneFault):
            await bad
        with pytest.raises(asyncio.CancelledError):
            await gone

    run(ask())
    assert any(3 in shared and 2 in shared for shared in runtime.runs)
    assert runtime.runs.count([3]) == 0 and delivered == []
