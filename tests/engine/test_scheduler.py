"""The scheduler: what may enter, where it goes, and that nothing that entered is lost."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lanes import TOWER, FakeRuntime, item

from sidecar.engine.lane import Encoded, Lane
from sidecar.engine.scheduler import Scheduler
from sidecar.errors import LaneFault, Overloaded, ShuttingDown, fault_of

MakeScheduler = Callable[..., Scheduler]


@pytest.fixture
def make_scheduler() -> Iterator[MakeScheduler]:
    schedulers: list[Scheduler] = []

    def make(*runtimes: FakeRuntime, max_queue_patches: int) -> Scheduler:
        schedulers.append(Scheduler([Lane(runtime, TOWER) for runtime in runtimes], max_queue_patches))
        return schedulers[-1]

    yield make
    for scheduler in schedulers:
        assert scheduler.close(10)


async def entered(runtime: FakeRuntime) -> None:
    assert await asyncio.to_thread(runtime.entered.acquire, timeout=20)


def test_more_than_may_wait_is_refused_with_when_to_come_back(make_scheduler: MakeScheduler) -> None:
    runtime = FakeRuntime(lambda value: time.sleep(0.1))
    scheduler = make_scheduler(runtime, max_queue_patches=100)

    async def ask() -> None:
        await scheduler.encode(item(0, 100))  # it took 100 ms, so a patch takes 1 ms
        runtime.gate.clear()
        waiting = [asyncio.create_task(scheduler.encode(item(value, 40))) for value in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as raised:
            await scheduler.encode(item(3, 60))
        assert str(raised.value) == "80 patches are waiting, this item has 60, the limit is 100"
        # 40 of those patches must run before the item has room.
        assert 0.03 < raised.value.retry_after_s < 0.2
        smaller = asyncio.create_task(scheduler.encode(item(4, 20)))  # what fits still enters
        await asyncio.sleep(0)
        runtime.gate.set()
        assert [int(encoded.rows[0, 0]) for encoded in await asyncio.gather(*waiting, smaller)] == [1, 2, 4]
        assert int((await scheduler.encode(item(3, 60))).rows[0, 0]) == 3  # and comes in later

    asyncio.run(asyncio.wait_for(ask(), 20))
    assert runtime.ran.count(3) == 1


def test_overload_reaches_the_client_as_resource_exhausted_with_a_delay() -> None:
    status = fault_of(Overloaded("full", retry_after_s=1.25)).status()
    assert status.code == 8
    assert {detail.TypeName() for detail in status.details} == {"google.rpc.ErrorInfo", "google.rpc.RetryInfo"}


def test_an_item_larger_than_the_queue_passes_when_nothing_waits(make_scheduler: MakeScheduler) -> None:
    runtime = FakeRuntime()
    scheduler = make_scheduler(runtime, max_queue_patches=10)

    async def ask() -> None:
        runtime.gate.clear()
        large = asyncio.create_task(scheduler.encode(item(1, 400)))
        await entered(runtime)
        with pytest.raises(Overloaded) as raised:
            await scheduler.encode(item(2, 400))
        assert 0 < raised.value.retry_after_s < 60
        runtime.gate.set()
        assert isinstance(await large, Encoded)
        assert isinstance(await scheduler.encode(item(2, 400)), Encoded)

    asyncio.run(asyncio.wait_for(ask(), 20))


def test_cancelled_and_failed_items_leave_their_room_to_others(make_scheduler: MakeScheduler) -> None:
    def fail(value: int) -> None:
        if value == 13:
            raise RuntimeError

    runtime = FakeRuntime(fail)
    scheduler = make_scheduler(runtime, max_queue_patches=40)

    async def ask() -> None:
        with pytest.raises(LaneFault):
            await scheduler.encode(item(13, 40))
        runtime.gate.clear()
        first = asyncio.create_task(scheduler.encode(item(1, 20)))
        await entered(runtime)  # the failed one
        await entered(runtime)
        given_up = asyncio.create_task(scheduler.encode(item(2, 20)))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await scheduler.encode(item(3, 20))
        given_up.cancel()
        await asyncio.wait([given_up])
        second = asyncio.create_task(scheduler.encode(item(4, 20)))
        await asyncio.sleep(0)
        runtime.gate.set()
        assert {int(encoded.rows[0, 0]) for encoded in await asyncio.gather(first, second)} == {1, 4}

    asyncio.run(asyncio.wait_for(ask(), 20))
    assert 2 not in runtime.ran


def test_items_are_spread_over_lanes(make_scheduler: MakeScheduler) -> None:
    fast, busy = FakeRuntime(), FakeRuntime()
    scheduler = make_scheduler(busy, fast, max_queue_patches=10_000)

    async def ask() -> None:
        busy.gate.clear()
        fast.gate.clear()
        tasks = [asyncio.create_task(scheduler.encode(item(1, 400)))]
        tasks += [asyncio.create_task(scheduler.encode(item(value, 40))) for value in range(2, 8)]
        await entered(busy)
        busy.gate.set()
        fast.gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(asyncio.wait_for(ask(), 20))
    assert busy.ran == [1]  # who has a long item is given no more meanwhile
    assert fast.ran == [2, 3, 4, 5, 6, 7]


def test_closing_finishes_what_entered(make_scheduler: MakeScheduler) -> None:
    runtimes = [FakeRuntime(), FakeRuntime()]
    scheduler = make_scheduler(*runtimes, max_queue_patches=1000)

    async def ask() -> None:
        for runtime in runtimes:
            runtime.gate.clear()
        tasks = [asyncio.create_task(scheduler.encode(item(value))) for value in range(8)]
        for runtime in runtimes:
            await entered(runtime)
        assert await asyncio.to_thread(scheduler.close, 0.02) is False
        with pytest.raises(ShuttingDown):
            await scheduler.encode(item(9))
        for runtime in runtimes:
            runtime.gate.set()
        assert await asyncio.to_thread(scheduler.close, 20) is True
        assert sorted(int(encoded.rows[0, 0]) for encoded in await asyncio.gather(*tasks)) == list(range(8))

    asyncio.run(asyncio.wait_for(ask(), 20))


# What a caller does: sends an item of so many patches (its value decides whether the runtime fails), or gives one up.
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["send", "send", "fail", "give up", "pause"]), st.integers(1, 20)), max_size=40
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS)
def test_no_item_is_ever_lost(make_scheduler: MakeScheduler, actions: list[tuple[str, int]]) -> None:
    """Every item ends in exactly one way: rows that are its own, a fault, a refusal, or its caller's giving up."""

    def fail(value: int) -> None:
        if value % 2:
            raise RuntimeError

    scheduler = make_scheduler(FakeRuntime(fail), FakeRuntime(fail), max_queue_patches=160)

    async def ask() -> Counter[str]:
        tasks: dict[int, asyncio.Task[Encoded]] = {}
        ends: Counter[str] = Counter()
        for number, (action, size) in enumerate(actions):
            if action in ("send", "fail"):
                value = 2 * number + (action == "fail")
                tasks[value] = asyncio.create_task(scheduler.encode(item(value, 4 * size)))
            elif action == "give up" and tasks:
                list(tasks.values())[size % len(tasks)].cancel()
            else:
                await asyncio.sleep(0.0002 * size)
        results = await asyncio.gather(*tasks.values(), return_exceptions=True)
        for value, result in zip(tasks, results, strict=True):
            if isinstance(result, Encoded):
                assert value % 2 == 0 and (result.rows == value).all()
            else:
                assert isinstance(result, (LaneFault, Overloaded, asyncio.CancelledError)), result
                if isinstance(result, LaneFault):
                    assert value % 2
            ends[type(result).__name__] += 1
        # Nothing is left over: an item as large as the whole queue enters.
        assert isinstance(await scheduler.encode(item(0, 160)), Encoded)
        return ends

    ends = asyncio.run(asyncio.wait_for(ask(), 20))
    assert sum(ends.values()) == sum(action in ("send", "fail") for action, _ in actions)
