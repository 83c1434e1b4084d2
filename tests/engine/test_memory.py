"""One budget of bytes: large pictures wait until it has room for them, small ones pass them, and one alone always passes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from sidecar.engine.cost import Work
from sidecar.engine.memory import Memory, Share
from sidecar.engine.turns import Turn, Turns
from sidecar.errors import Overloaded

MB = 1 << 20


class Lanes(SimpleNamespace):
    """None to run on; there is always room for what was prepared."""

    def __init__(self) -> None:
        super().__init__(all=(), serving=())


def turns(memory: Memory, threads: int) -> Turns:
    lanes: Any = Lanes()
    return Turns(lanes, threads, memory)


def large(client: str, size: int) -> Turn:
    return Turn(client, Work(1, 0.0), 1, size)


async def begun(
    waiting: list[asyncio.Task[None]], order: list[str], turns: Turns, turn: Turn, over: asyncio.Event
) -> None:
    async def hold() -> None:
        async with turns.wait(turn):
            order.append(turn.client)
            await over.wait()
            turns.prepared(turn)

    waiting.append(asyncio.create_task(hold()))
    await asyncio.sleep(0)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_large_pictures_are_decoded_one_after_another_where_memory_is_short(threads: int) -> None:
    async def ask() -> None:
        memory, order = Memory(300 * MB), []
        queue = turns(memory, threads)
        memory.take(100 * MB)  # requests
        tasks: list[asyncio.Task[None]] = []
        events = [asyncio.Event() for _ in range(3)]
        await begun(tasks, order, queue, large("first", 900 * MB), events[0])
        await begun(tasks, order, queue, large("second", 150 * MB), events[1])
        await begun(tasks, order, queue, large("small", 1 * MB), events[2])
        assert order == ["first", "small"]
        assert (memory.held, memory.decoding) == (100 * MB, 901 * MB)
        memory.check(200 * MB)  # a picture being decoded refuses no call
        events[0].set()
        await asyncio.sleep(0.01)
        assert order == ["first", "small", "second"]
        for event in events:
            event.set()
        await asyncio.gather(*tasks)
        assert (memory.held, memory.decoding) == (100 * MB, 0)

    asyncio.run(ask())


def test_large_pictures_leave_a_thread_to_small_ones() -> None:
    async def ask() -> None:
        order: list[str] = []
        queue, over = turns(Memory(10_000 * MB), 4), asyncio.Event()
        tasks: list[asyncio.Task[None]] = []
        for number in range(4):
            await begun(tasks, order, queue, large(f"large {number}", 100 * MB), over)
        await begun(tasks, order, queue, large("small", 0), over)
        assert order == ["large 0", "large 1", "small"]
        over.set()
        await asyncio.gather(*tasks)
        assert len(order) == 5

    asyncio.run(ask())


def test_what_is_fetched_counts_until_nobody_holds_it() -> None:
    memory = Memory(100)
    alone = Share(memory)
    alone.add(90)
    alone.add(90)  # alone, whatever its size
    other = Share(memory)
    with pytest.raises(Overloaded, match="max_held_bytes"):
        other.add(1)
    del alone
    other.add(60)
    assert memory.held == 60
    del other
    assert memory.held == 0
