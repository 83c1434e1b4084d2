"""Turns: what a lane has called in, and what becomes of it when the caller leaves in that very moment."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from lanes import TOWER, FakeRuntime, run

from sidecar.engine.cost import Work
from sidecar.engine.lane import Lane
from sidecar.engine.lanes import Lanes
from sidecar.engine.turns import Turn, Turns

THREADS = 1
AT_ONCE = THREADS + 2 * 2  # with two lanes of one stream, of one client


@pytest.fixture
def slow_and_fast() -> Iterator[tuple[Lane, Lane]]:
    """A patch costs ten milliseconds and one."""
    slow, fast = (Lane(name, FakeRuntime(), TOWER, batch_patches=0) for name in ("slow", "fast"))
    for size in (4, 400, 4000):
        slow.cost.anchor(Work(size, 0.0), 10.0 * size)
        fast.cost.anchor(Work(size, 0.0), 1.0 * size)
    yield slow, fast
    for lane in (slow, fast):
        assert lane.close(10)


def test_a_lane_may_call_in_again_when_what_it_called_in_leaves_in_that_moment(
    slow_and_fast: tuple[Lane, Lane],
) -> None:
    slow, _ = slow_and_fast

    async def ask() -> None:
        turns, ready, over = Turns(Lanes(slow_and_fast), THREADS), asyncio.Event(), asyncio.Event()

        async def hold(turn: Turn, prepared: bool) -> None:
            async with turns.wait(turn):
                if not prepared:
                    await ready.wait()
                turns.prepared(turn)
                await over.wait()

        first, *others = (Turn("somebody", Work(100, 0.0), 100) for _ in range(40))
        tasks = []
        async with turns.wait(first):
            turns.prepared(first)
            for number, turn in enumerate(others, 2):
                # The last two that get their turn are not prepared yet, which keeps the lane from calling in.
                tasks.append(asyncio.create_task(hold(turn, prepared=number <= AT_ONCE - 2)))
                await asyncio.sleep(0)
            assert turns.unprepared == THREADS + 1 and not any(turn.lane for turn in others)
            ready.set()
            await asyncio.sleep(0)
        # Its leaving let the slow lane call in the newest, who leaves before hearing of it.
        assert others[-1].lane is slow
        tasks[-1].cancel()
        await asyncio.sleep(0.01)
        assert others[-2].lane is slow
        over.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert turns.accepted.patches == turns.clients == turns.unprepared == 0

    run(ask())
