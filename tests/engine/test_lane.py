"""A lane: one runtime, one thread, one queue. Nobody waits for ever, whatever the runtime does."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator

import numpy as np
import pytest
from lanes import TOWER, FakeRuntime, item

from sidecar.engine.lane import Encoded, Lane
from sidecar.errors import LaneFault, ShuttingDown, fault_of
from sidecar.runtimes.base import RuntimeFault
from sidecar.vision.dtypes import DType

MakeLane = Callable[[FakeRuntime], Lane]


@pytest.fixture
def make_lane() -> Iterator[MakeLane]:
    lanes: list[Lane] = []

    def make(runtime: FakeRuntime) -> Lane:
        lanes.append(Lane(runtime, TOWER))
        return lanes[-1]

    yield make
    for lane in lanes:
        assert lane.close(timeout_s=10)


def run(work: Awaitable[object]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(work, 20)

    asyncio.run(limited())


async def entered(runtime: FakeRuntime) -> None:
    """Return once a run has begun."""
    assert await asyncio.to_thread(runtime.entered.acquire, timeout=20)


def test_an_item_gets_its_rows_and_what_they_took(make_lane: MakeLane) -> None:
    lane = make_lane(FakeRuntime())

    async def ask() -> None:
        encoded = await lane.encode(item(7, patches=8))
        assert encoded.rows.tolist() == [[7.0] * 4] * 2
        assert encoded.lane is lane
        assert min(encoded.queue_ms, encoded.run_ms) >= 0

    run(ask())


def test_items_run_one_after_another_in_the_order_they_came(make_lane: MakeLane) -> None:
    running = threading.Lock()

    def alone(_: int) -> None:
        assert running.acquire(blocking=False)
        running.release()

    runtime = FakeRuntime(alone)
    lane = make_lane(runtime)

    async def ask() -> None:
        results = await asyncio.gather(*(lane.encode(item(value)) for value in range(50)))
        assert [int(result.rows[0, 0]) for result in results] == list(range(50))

    run(ask())
    assert runtime.ran == list(range(50))


def test_cancelled_work_is_skipped(make_lane: MakeLane) -> None:
    runtime = FakeRuntime()
    lane = make_lane(runtime)

    async def ask() -> None:
        runtime.gate.clear()
        tasks = [asyncio.create_task(lane.encode(item(value))) for value in range(5)]
        await entered(runtime)
        for index in (0, 1, 3):  # the first is running by now
            tasks[index].cancel()
        runtime.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [
            *(asyncio.CancelledError, asyncio.CancelledError, Encoded, asyncio.CancelledError, Encoded)
        ]

    run(ask())
    assert runtime.ran == [0, 2, 4]


def test_cancelled_work_that_waits_takes_no_memory(make_lane: MakeLane) -> None:
    """Callers that give up and come again behind one long run must not fill the memory with what they gave up."""
    runtime = FakeRuntime()
    lane = make_lane(runtime)

    async def ask() -> None:
        runtime.gate.clear()
        first = asyncio.create_task(lane.encode(item(1)))
        await entered(runtime)
        patches = item(2)
        memory = weakref.ref(patches.values)
        given_up = asyncio.create_task(lane.encode(patches))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        del patches, given_up
        assert memory() is None
        runtime.gate.set()
        await first

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
def test_whatever_a_runtime_raises_is_a_fault_of_the_lane_and_it_goes_on(
    make_lane: MakeLane, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(value: int) -> None:
        if value == 13:
            raise error

    lane = make_lane(FakeRuntime(fail))

    async def ask() -> None:
        before, failed, after = await asyncio.gather(
            *(lane.encode(item(value)) for value in (1, 13, 2)), return_exceptions=True
        )
        assert isinstance(before, Encoded) and isinstance(after, Encoded)
        assert isinstance(failed, LaneFault)
        assert "the fake runtime failed on this item" in str(failed)
        assert "secret" not in fault_of(failed).message

    with caplog.at_level(logging.ERROR):
        run(ask())
    (record,) = caplog.records
    assert record.exc_info and record.exc_info[1] is error  # the log has what the client must not see


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16])
def test_an_embedding_that_is_not_finite_is_a_fault(make_lane: MakeLane, bad: float, dtype: DType) -> None:
    runtime = FakeRuntime(dtype=dtype)
    whole = runtime.run

    def spoil(patches: np.ndarray, grids: object, out: np.ndarray) -> None:
        whole(patches, grids, out)  # type: ignore[arg-type]
        out[-1, -1] = bad

    runtime.run = spoil  # type: ignore[method-assign]
    lane = make_lane(runtime)

    async def ask() -> None:
        with pytest.raises(LaneFault, match="not finite"):
            await lane.encode(item(1))

    run(ask())


def test_an_infinite_bfloat16_is_a_fault_too(make_lane: MakeLane) -> None:
    """numpy knows no bfloat16: its bits must be looked at."""
    lane = make_lane(FakeRuntime(dtype=DType.BFLOAT16))

    async def ask() -> None:
        with pytest.raises(LaneFault, match="not finite"):
            await lane.encode(item(1))

    run(ask())


def test_closing_finishes_what_is_queued_and_takes_no_more(make_lane: MakeLane) -> None:
    runtime = FakeRuntime()
    lane = make_lane(runtime)

    async def ask() -> None:
        runtime.gate.clear()
        tasks = [asyncio.create_task(lane.encode(item(value))) for value in range(4)]
        await entered(runtime)
        assert await asyncio.to_thread(lane.close, 0.05) is False  # it is not done, and says so
        with pytest.raises(ShuttingDown):
            await lane.encode(item(9))
        runtime.gate.set()
        assert await asyncio.to_thread(lane.close, 20) is True
        assert [int(encoded.rows[0, 0]) for encoded in await asyncio.gather(*tasks)] == [0, 1, 2, 3]

    run(ask())
    assert runtime.ran == [0, 1, 2, 3]


def test_a_caller_whose_loop_has_gone_does_not_end_the_lane(make_lane: MakeLane) -> None:
    runtime = FakeRuntime()
    lane = make_lane(runtime)
    runtime.gate.clear()
    loop = asyncio.new_event_loop()
    left = loop.create_task(lane.encode(item(1)))
    loop.run_until_complete(entered(runtime))
    loop.close()
    runtime.gate.set()

    async def ask() -> None:
        assert int((await lane.encode(item(2))).rows[0, 0]) == 2

    run(ask())
    assert not left.done()
    left._log_destroy_pending = False  # type: ignore[attr-defined]  # it is meant


def test_warming_up_runs_a_whole_window_and_ragged_ones_and_tells_a_fault() -> None:
    shapes: list[int] = []

    class Counting(FakeRuntime):
        def run(self, patches: np.ndarray, grids: object, out: np.ndarray) -> None:
            shapes.append(len(patches))
            self.before(0)

    def fail(_: int) -> None:
        raise RuntimeFault("no")

    healthy, broken = Lane(Counting(), TOWER), Lane(Counting(fail), TOWER)
    healthy.warm_up()
    assert TOWER.window_patches in shapes and any(count % TOWER.window_patches for count in shapes)
    with pytest.raises(RuntimeFault):
        broken.warm_up()
    assert healthy.close(10) and broken.close(10)
