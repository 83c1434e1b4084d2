"""The scheduler: what may enter, whose turn it is, where it goes, and that nothing that entered is lost."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import time
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lanes import TOWER, FakeRuntime, entered, item, run

from sidecar.engine.cost import Work
from sidecar.engine.lane import Lane
from sidecar.engine.order import Opened, Order, Prepared
from sidecar.engine.scheduler import Encoded, Limits, Scheduler
from sidecar.engine.store import Store
from sidecar.engine.store_directory import StoreDirectory
from sidecar.errors import CannotFinish, InvalidItem, LaneFault, NoLane, Overloaded, ShuttingDown, fault_of
from sidecar.runtimes.base import RuntimeFault
from sidecar.vision.grid import Grid

MakeScheduler = Callable[..., Scheduler]


@pytest.fixture
def make_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeScheduler]:
    """A patch costs 1 ms by every lane's belief, and every item runs alone."""
    monkeypatch.setattr("sidecar.engine.circuit_breaker.FIRST_PAUSE_S", 0.02)
    schedulers: list[Scheduler] = []
    with ThreadPoolExecutor(4) as preprocessing:

        def make(
            *runtimes: FakeRuntime, items: int = 1000, patches: int = 10**6, stored: bool = False, threads: int = 1
        ) -> Scheduler:
            lanes = [Lane(f"lane-{n}", runtime, TOWER, batch_patches=0) for n, runtime in enumerate(runtimes)]
            for lane in lanes:
                for size in (4, 400, 4000):
                    lane.cost.anchor(Work(size, 0.0), float(size))
            directory = StoreDirectory(tmp_path / f"store-{len(schedulers)}")
            store = Store(directory, 1 << 20, 60.0, "model") if stored else None
            schedulers.append(
                Scheduler(
                    lanes,
                    TOWER,
                    "model",
                    store=store,
                    preprocessing=preprocessing,
                    preprocess_threads=threads,
                    limits=Limits(items=items, patches=patches),
                )
            )
            return schedulers[-1]

        yield make
        for scheduler in schedulers:
            assert scheduler.close(10)


def order(
    value: int,
    patches: int = 4,
    *,
    name: str = "",
    client: str = "somebody",
    deadline_s: float = math.inf,
    open: Callable[[], Awaitable[Opened]] | None = None,
) -> Order:
    async def opened() -> Opened:
        ready = item(value, patches)
        return Opened(ready.grid, lambda: Prepared(ready, 0.0, 0.0))

    return Order(
        name=name or f"item-{value}",
        client=client,
        open=open or opened,
        deadline=time.monotonic() + deadline_s,
    )


def value_of(encoded: Encoded) -> int:
    assert encoded.rows is not None
    return int(encoded.rows[0, 0])


def nothing_left(scheduler: Scheduler) -> bool:
    status = scheduler.status()
    lanes = sum(lane.waiting_items + lane.running_items + lane.waiting_patches for lane in status.lanes)
    turns = scheduler._turns
    turned = (
        turns._begun.total() + turns._begun_patches + turns.unprepared + len(turns._waiting) + len(turns._called_in)
    )
    return (status.waiting_items, status.waiting_patches, status.clients, lanes, turned) == (0, 0, 0, 0, 0)


async def settled(scheduler: Scheduler) -> None:
    """Return once nothing is left of what was asked: a lane's threads may still be counting."""
    for _ in range(500):
        if nothing_left(scheduler):
            return
        await asyncio.sleep(0.01)
    assert nothing_left(scheduler), scheduler.status()


def test_more_patches_than_may_wait_are_refused_with_when_to_come_back(make_scheduler: MakeScheduler) -> None:
    runtime = FakeRuntime()
    scheduler = make_scheduler(runtime, patches=100)

    async def ask() -> None:
        runtime.gate.clear()
        waiting = [asyncio.create_task(scheduler.encode(order(value, 40))) for value in (1, 2)]
        await entered(runtime)
        with pytest.raises(Overloaded) as raised:
            await scheduler.encode(order(3, 60))
        assert str(raised.value) == "80 patches are waiting, this item has 60, the limit is 100"
        # 40 of those patches must run before the item has room, and a patch takes 1 ms.
        assert 0.03 < raised.value.retry_after_s < 0.05
        smaller = asyncio.create_task(scheduler.encode(order(4, 20)))  # what fits still enters
        await asyncio.sleep(0)
        runtime.gate.set()
        assert [value_of(encoded) for encoded in await asyncio.gather(*waiting, smaller)] == [1, 2, 4]
        assert value_of(await scheduler.encode(order(3, 60))) == 3  # and comes in later
        await settled(scheduler)

    run(ask())
    assert runtime.ran.count(3) == 1


def test_more_items_than_may_wait_are_refused_before_they_are_opened(make_scheduler: MakeScheduler) -> None:
    runtime = FakeRuntime()
    scheduler = make_scheduler(runtime, items=2)

    async def never() -> Opened:
        raise AssertionError("opened")

    async def ask() -> None:
        runtime.gate.clear()
        waiting = [asyncio.create_task(scheduler.encode(order(value))) for value in (1, 2)]
        await entered(runtime)
        with pytest.raises(Overloaded, match="2 items are waiting, which is the limit"):
            await scheduler.encode(order(3, open=never))
        runtime.gate.set()
        await asyncio.gather(*waiting)

    run(ask())


def test_overload_reaches_the_client_as_resource_exhausted_with_a_delay() -> None:
    status = fault_of(Overloaded("full", retry_after_s=1.25)).status()
    assert status.code == 8
    assert {detail.TypeName() for detail in status.details} == {"google.rpc.ErrorInfo", "google.rpc.RetryInfo"}


def test_an_item_larger_than_the_queue_passes_when_nothing_waits(make_scheduler: MakeScheduler) -> None:
    runtime = FakeRuntime()
    scheduler = make_scheduler(runtime, patches=10)

    async def ask() -> None:
        runtime.gate.clear()
        large = asyncio.create_task(scheduler.encode(order(1, 400)))
        await entered(runtime)
        with pytest.raises(Overloaded) as raised:
            await scheduler.encode(order(2, 400))
        assert 0 < raised.value.retry_after_s < 60
        runtime.gate.set()
        assert value_of(await large) == 1
        await settled(scheduler)
        assert value_of(await scheduler.encode(order(2, 400))) == 2

    run(ask())


def test_a_deadline_that_cannot_be_met_is_refused_at_the_door(make_scheduler: MakeScheduler) -> None:
    runtime = FakeRuntime()
    scheduler = make_scheduler(runtime)

    async def ask() -> None:
        runtime.gate.clear()
        first = asyncio.create_task(scheduler.encode(order(2, 4000)))
        await entered(runtime)
        with pytest.raises(
            CannotFinish, match=r"would take about \d+.\d\d s from now, and its deadline is in (2.00|1.9.) s"
        ):  # by itself it would, but not behind the first
            await scheduler.encode(order(3, 400, deadline_s=2.0))
        in_time = asyncio.create_task(scheduler.encode(order(4, 400, deadline_s=60.0)))
        await asyncio.sleep(0)
        runtime.gate.set()
        assert [value_of(await task) for task in (first, in_time)] == [2, 4]
        await settled(scheduler)

    run(ask())
    assert sorted(runtime.ran) == [2, 4]


def test_who_joins_a_job_in_the_moment_that_it_is_refused_does_not_go_round_in_circles(
    make_scheduler: MakeScheduler,
) -> None:
    """Many equal items with a deadline that cannot be met, behind a lane that is busy."""
    runtime = FakeRuntime()
    scheduler = make_scheduler(runtime)

    async def ask() -> None:
        runtime.gate.clear()
        busy = asyncio.create_task(scheduler.encode(order(1, 4000)))
        await entered(runtime)
        tasks = []
        for _ in range(8):
            tasks.append(asyncio.create_task(scheduler.encode(order(2, 400, name="same", deadline_s=1.0))))
            for _ in range(2):  # somewhere between a job's first step and what is told of its end
                tasks.append(asyncio.create_task(scheduler.encode(order(2, 400, name="same", deadline_s=1.0))))
                await asyncio.sleep(0)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {CannotFinish}
        runtime.gate.set()
        await busy
        await settled(scheduler)

    run(ask())


def test_a_failed_item_is_let_go_at_once(make_scheduler: MakeScheduler) -> None:
    """Not when Python's collector comes: it may hold megabytes."""
    scheduler = make_scheduler(FakeRuntime())
    item_bytes = type("Bytes", (), {})()
    held = weakref.ref(item_bytes)

    async def opened(content: object = item_bytes) -> Opened:
        def prepare() -> Prepared:
            assert content
            raise InvalidItem("rubbish")

        return Opened(Grid(1, 2, 2), prepare)

    async def ask() -> None:
        nonlocal item_bytes, opened
        bad = order(1, open=opened)
        item_bytes = opened = None  # type: ignore[assignment]
        task = asyncio.create_task(scheduler.encode(bad))
        del bad
        with pytest.raises(InvalidItem):
            await task
        del task
        await settled(scheduler)

    gc.disable()
    try:
        run(ask())
        assert held() is None
    finally:
        gc.enable()


def test_an_idle_scheduler_admits_whatever_it_believes(make_scheduler: MakeScheduler) -> None:
    """Else a belief that is wrong would refuse for ever: nothing runs that could correct it."""
    scheduler = make_scheduler(FakeRuntime())

    async def ask() -> None:
        for number in range(3):
            assert value_of(await scheduler.encode(order(number + 1, 4000, deadline_s=2.0))) == number + 1
            await settled(scheduler)
        with pytest.raises(CannotFinish):
            await scheduler.encode(order(9, 4, deadline_s=-1.0))

    run(ask())


def test_an_item_that_was_running_on_two_lanes_when_they_failed_goes_no_further(
    make_scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.engine.watchdog.STUCK_S", 0.1)
    monkeypatch.setattr("sidecar.engine.watchdog.STEP_S", 0.02)
    release = threading.Event()
    runtimes = [FakeRuntime(lambda value: value == 13 and release.wait(20)) for _ in range(3)]
    scheduler = make_scheduler(*runtimes)
    for lane in scheduler.lanes:
        lane.cost.learn(Work(4, 0.0), 1.0)

    async def ask() -> None:
        with pytest.raises(LaneFault, match="several lanes"):
            await scheduler.encode(order(13))
        assert sorted(lane.state for lane in scheduler.status().lanes) == ["out", "out", "serving"]
        assert value_of(await scheduler.encode(order(1))) == 1
        release.set()

    run(ask())


def test_a_client_that_floods_does_not_keep_another_waiting(make_scheduler: MakeScheduler) -> None:
    """Nor do its deadlines suffer: it is told how long it takes by its own share."""
    runtime = FakeRuntime(lambda value: time.sleep(0.001))
    scheduler = make_scheduler(runtime)

    async def ask() -> None:
        runtime.gate.clear()
        flood = [asyncio.create_task(scheduler.encode(order(value, client="flood"))) for value in range(1, 201)]
        await entered(runtime)
        runtime.gate.set()
        assert value_of(await scheduler.encode(order(250, client="other", deadline_s=0.5))) == 250
        assert sum(task.done() for task in flood) < 40
        await asyncio.gather(*flood)
        await settled(scheduler)

    run(ask())


def test_equal_items_at_once_are_encoded_once(make_scheduler: MakeScheduler) -> None:
    runtime = FakeRuntime()
    scheduler = make_scheduler(runtime, stored=True)

    async def ask() -> None:
        runtime.gate.clear()
        tasks = [asyncio.create_task(scheduler.encode(order(7, name="same"))) for _ in range(20)]
        await entered(runtime)
        runtime.gate.set()
        results = await asyncio.gather(*tasks)
        assert {value_of(encoded) for encoded in results} == {7}
        assert [encoded.coalesced for encoded in results] == [False] + [True] * 19
        known = await scheduler.encode(order(7, name="same"))
        assert known.cached and known.entry is not None and known.times.run_ms == 0
        status = scheduler.status()
        assert (status.misses, status.coalesced, status.hits) == (1, 19, 1)

    run(ask())
    assert runtime.ran == [7]


def test_who_joins_what_waits_behind_a_flood_does_not_wait_behind_it(make_scheduler: MakeScheduler) -> None:
    runtime = FakeRuntime(lambda value: time.sleep(0.001))
    scheduler = make_scheduler(runtime)

    async def ask() -> None:
        runtime.gate.clear()
        flood = [asyncio.create_task(scheduler.encode(order(value, client="flood"))) for value in range(1, 201)]
        await entered(runtime)
        joined = asyncio.create_task(scheduler.encode(order(200, client="other")))  # the flood's last one
        await asyncio.sleep(0)
        runtime.gate.set()
        assert value_of(await joined) == 200
        assert sum(task.done() for task in flood) < 40
        await asyncio.gather(*flood)
        await settled(scheduler)

    run(ask())
    assert runtime.ran.count(200) == 1


def test_one_client_does_not_fill_the_queue_for_the_others(make_scheduler: MakeScheduler) -> None:
    runtime = FakeRuntime()
    scheduler = make_scheduler(runtime, items=3, patches=12)

    async def ask() -> None:
        runtime.gate.clear()
        flood = [asyncio.create_task(scheduler.encode(order(value, client="flood"))) for value in (1, 2, 3)]
        await entered(runtime)
        with pytest.raises(Overloaded):
            await scheduler.encode(order(4, client="flood"))
        others = [asyncio.create_task(scheduler.encode(order(5 + n, client=f"other-{n}"))) for n in range(3)]
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):  # its second one is nobody's first
            await scheduler.encode(order(9, client="other-0"))
        with pytest.raises(Overloaded):  # and there is an end to it
            await scheduler.encode(order(10, client="one more"))
        runtime.gate.set()
        assert [value_of(encoded) for encoded in await asyncio.gather(*flood, *others)] == [1, 2, 3, 5, 6, 7]
        await settled(scheduler)
        assert not scheduler._clients

    run(ask())


def test_who_joined_is_answered_when_the_first_one_leaves(make_scheduler: MakeScheduler) -> None:
    runtime = FakeRuntime()
    scheduler = make_scheduler(runtime)

    async def ask() -> None:
        runtime.gate.clear()
        first = asyncio.create_task(scheduler.encode(order(7, name="same")))
        await entered(runtime)
        second = asyncio.create_task(scheduler.encode(order(7, name="same")))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        runtime.gate.set()
        assert value_of(await second) == 7

    run(ask())
    assert runtime.ran == [7]


def test_when_everybody_has_left_it_does_not_run_and_who_comes_then_is_served(make_scheduler: MakeScheduler) -> None:
    runtime = FakeRuntime()
    scheduler = make_scheduler(runtime)

    async def ask() -> None:
        runtime.gate.clear()
        busy = asyncio.create_task(scheduler.encode(order(1)))
        await entered(runtime)
        gone = [asyncio.create_task(scheduler.encode(order(7, name="same"))) for _ in range(3)]
        await asyncio.sleep(0.01)
        for task in gone:
            task.cancel()
        await asyncio.sleep(0)
        late = asyncio.create_task(scheduler.encode(order(8, name="same")))
        await asyncio.sleep(0.01)
        runtime.gate.set()
        assert value_of(await late) == 8
        await busy
        await settled(scheduler)

    run(ask())
    assert runtime.ran == [1, 8]


def test_bad_content_is_opened_once_for_all_who_send_it(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(FakeRuntime())
    reading = asyncio.Event()
    opened = 0

    async def bad() -> Opened:
        nonlocal opened
        opened += 1
        await reading.wait()
        raise InvalidItem("no picture")

    async def ask() -> None:
        orders = [asyncio.create_task(scheduler.encode(order(1, name="same", open=bad))) for _ in range(3)]
        await asyncio.sleep(0)
        reading.set()
        results = await asyncio.gather(*orders, return_exceptions=True)
        assert [type(result) for result in results] == [InvalidItem] * 3
        assert opened == 1

    run(ask())


def test_the_impatience_of_one_caller_fails_no_other(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler(FakeRuntime())
    reading = asyncio.Event()

    async def slow() -> Opened:
        await reading.wait()
        ready = item(7, 4000)
        return Opened(ready.grid, lambda: Prepared(ready, 0.0, 0.0))

    async def ask() -> None:
        hasty = asyncio.create_task(scheduler.encode(order(7, name="same", open=slow, deadline_s=1.0)))
        await asyncio.sleep(0)
        patient = asyncio.create_task(scheduler.encode(order(7, name="same", open=slow, deadline_s=60.0)))
        await asyncio.sleep(0)
        reading.set()
        assert value_of(await patient) == 7
        assert value_of(await hasty) == 7  # it is being done for the other one anyway

    run(ask())


def test_cancelled_and_failed_items_leave_their_room_to_others(make_scheduler: MakeScheduler) -> None:
    def fail(value: int) -> None:
        if value == 13:
            raise RuntimeError

    runtime = FakeRuntime(fail)
    scheduler = make_scheduler(runtime, patches=40)

    async def ask() -> None:
        with pytest.raises(LaneFault):
            await scheduler.encode(order(13, 40))
        await settled(scheduler)
        runtime.gate.clear()
        while runtime.entered.acquire(blocking=False):
            pass
        first = asyncio.create_task(scheduler.encode(order(1, 20)))
        await entered(runtime)
        given_up = asyncio.create_task(scheduler.encode(order(2, 20)))
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):
            await scheduler.encode(order(3, 20))
        given_up.cancel()
        await asyncio.wait([given_up])
        await asyncio.sleep(0)
        second = asyncio.create_task(scheduler.encode(order(4, 20)))
        await asyncio.sleep(0)
        runtime.gate.set()
        assert {value_of(encoded) for encoded in await asyncio.gather(first, second)} == {1, 4}

    run(ask())
    assert 2 not in runtime.ran


def test_an_item_goes_to_the_lane_that_finishes_it_first(make_scheduler: MakeScheduler) -> None:
    slow, fast = FakeRuntime(), FakeRuntime()
    scheduler = make_scheduler(slow, fast)
    for size in (4, 400, 4000) * 6:  # enough for nothing to be left of what the fixture said
        scheduler.lanes[0].cost.anchor(Work(size, 0.0), 8.0 * size)

    async def ask() -> None:
        slow.gate.clear()
        fast.gate.clear()
        tasks = [asyncio.create_task(scheduler.encode(order(1, 400)))]
        await entered(fast)
        # While the fast one is busy for 400 ms, the slow one would need 8 × 40 for the next.
        tasks.append(asyncio.create_task(scheduler.encode(order(2, 40))))
        await entered(slow)
        tasks.append(asyncio.create_task(scheduler.encode(order(3, 400))))  # 3200 there, 800 here
        await asyncio.sleep(0.02)
        slow.gate.set()
        fast.gate.set()
        results = await asyncio.gather(*tasks)
        assert [encoded.lane.name for encoded in results] == ["lane-1", "lane-0", "lane-1"]

    run(ask())


def test_a_slow_lane_takes_the_newest_of_many_that_wait_and_none_of_few(make_scheduler: MakeScheduler) -> None:
    slow, fast = FakeRuntime(), FakeRuntime()
    scheduler = make_scheduler(slow, fast)
    for size in (4, 400, 4000) * 6:
        scheduler.lanes[0].cost.anchor(Work(size, 0.0), 10.0 * size)

    async def ask() -> None:
        slow.gate.clear()
        fast.gate.clear()
        # Four that wait are done by the fast one in 4 × 100 ms: sooner than one by the slow one, in a second.
        tasks = [asyncio.create_task(scheduler.encode(order(value, 100))) for value in range(1, 6)]
        await entered(fast)
        await asyncio.sleep(0.02)
        assert not slow.ran
        tasks += [asyncio.create_task(scheduler.encode(order(value, 100))) for value in range(6, 16)]
        await entered(slow)
        slow.gate.set()
        fast.gate.set()
        results = await asyncio.gather(*tasks)
        assert slow.ran[0] > 5
        assert {encoded.lane.name for encoded in results[:5]} == {"lane-1"}
        await settled(scheduler)

    run(ask())
    assert nothing_left(scheduler)


def test_the_work_of_a_lane_that_fails_moves_on(make_scheduler: MakeScheduler) -> None:
    def fail(_: int) -> None:
        raise RuntimeFault("the device is lost")

    broken, well = FakeRuntime(fail), FakeRuntime()
    scheduler = make_scheduler(broken, well)

    async def ask() -> None:
        broken.gate.clear()
        well.gate.clear()
        tasks = [asyncio.create_task(scheduler.encode(order(value))) for value in range(1, 7)]
        await entered(broken)
        broken.gate.set()
        well.gate.set()
        results = await asyncio.gather(*tasks)
        assert [value_of(encoded) for encoded in results] == [1, 2, 3, 4, 5, 6]
        assert {encoded.lane.name for encoded in results} == {"lane-1"}
        assert scheduler.in_service
        assert [lane.state for lane in scheduler.status().lanes] == ["out", "serving"]

    run(ask())


def test_without_a_lane_items_are_refused_until_one_is_in_service_again(make_scheduler: MakeScheduler) -> None:
    lost = True

    def fail(_: int) -> None:
        if lost:
            raise RuntimeFault("the device is lost")

    scheduler = make_scheduler(FakeRuntime(fail))

    async def ask() -> None:
        nonlocal lost
        with pytest.raises(NoLane):  # the item is not to blame, since the self-test fails too
            await scheduler.encode(order(1))
        assert not scheduler.in_service
        with pytest.raises(NoLane) as raised:
            await scheduler.encode(order(2))
        fault = fault_of(raised.value)
        assert fault.code.name == "UNAVAILABLE" and fault.retry_after_s is not None and fault.retry_after_s > 0
        lost = False
        while not scheduler.in_service:
            await asyncio.sleep(0.01)
        assert value_of(await scheduler.encode(order(3))) == 3

    run(ask())


def test_closing_finishes_what_entered(make_scheduler: MakeScheduler) -> None:
    runtime = FakeRuntime()
    scheduler = make_scheduler(runtime)

    async def ask() -> None:
        runtime.gate.clear()
        tasks = [asyncio.create_task(scheduler.encode(order(value))) for value in (1, 2)]
        await entered(runtime)
        while sum(lane.waiting_items for lane in scheduler.status().lanes) < 1:
            await asyncio.sleep(0.01)
        closing = asyncio.create_task(asyncio.to_thread(scheduler.close, 20))
        await asyncio.sleep(0.02)
        with pytest.raises(ShuttingDown):
            await scheduler.encode(order(3))
        runtime.gate.set()
        assert await closing
        assert [value_of(encoded) for encoded in await asyncio.gather(*tasks)] == [1, 2]

    run(ask())


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(
        st.tuples(
            st.integers(1, 30),  # its value, of which some are equal
            st.sampled_from([4, 8, 16, 40]),
            st.sampled_from(["a", "b", "c"]),
            st.sampled_from([math.inf, math.inf, 0.2, 0.01]),  # deadline
            st.sampled_from([None, None, 0.0, 0.002]),  # cancelled after
        ),
        min_size=1,
        max_size=60,
    ),
    streams=st.integers(1, 2),
    limit=st.sampled_from([60, 10**6]),
)
def test_whatever_is_asked_everybody_is_answered_and_nothing_is_left(
    make_scheduler: MakeScheduler,
    asked: list[tuple[int, int, str, float, float | None]],
    streams: int,
    limit: int,
) -> None:
    def fail(value: int) -> None:
        if value == 13:
            raise RuntimeFault("no")

    scheduler = make_scheduler(FakeRuntime(fail), FakeRuntime(fail, streams=streams), patches=limit)

    async def ask() -> None:
        tasks = []
        for value, patches, client, deadline_s, cancel_s in asked:
            name = f"{value}-{patches}"
            task = asyncio.create_task(
                scheduler.encode(order(value, patches, name=name, client=client, deadline_s=deadline_s))
            )
            tasks.append(task)
            if cancel_s is not None:
                asyncio.get_running_loop().call_later(cancel_s, task.cancel)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        kinds = Counter(type(result) for result in results)
        assert set(kinds) <= {Encoded, Overloaded, CannotFinish, LaneFault, asyncio.CancelledError}
        for (value, patches, _, deadline_s, cancel_s), result in zip(asked, results, strict=True):
            if isinstance(result, Encoded):
                assert value_of(result) == value
                assert result.description.grid == Grid(1, 2, patches // 2)
            elif isinstance(result, LaneFault):
                assert value == 13
            elif isinstance(result, CannotFinish):
                assert deadline_s < math.inf
            elif isinstance(result, asyncio.CancelledError):
                assert cancel_s is not None
        await settled(scheduler)

    run(ask())
