"""A runtime that does what a test tells it to, and what lanes and schedulers of it need."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from sidecar.engine.lane import Lane
from sidecar.engine.store import Draft, loose_draft
from sidecar.engine.ticket import Ran
from sidecar.runtimes.base import Runtime
from sidecar.store_file import Description
from sidecar.vision.dtypes import Array, DType
from sidecar.vision.grid import Grid
from sidecar.vision.pixels import Patches
from sidecar.vision.spec import TowerSpec

TOWER = TowerSpec(
    depth=1, hidden_size=8, num_heads=2, intermediate_size=8, out_hidden_size=4, fullatt_block_indexes=(0,)
)


class FakeRuntime(Runtime):
    """Fills an item's rows with the value of its first pixel; the others tell what to do.

    `before` is called with that value on the lane's thread, in the place of a run. `gate`, while it is not set, holds
    every run up; `entered` is released once for each run that begins.
    """

    name = "fake"
    device = "nowhere"
    precision = "f32"

    def __init__(
        self, before: Callable[[int], object] = lambda value: None, dtype: DType = DType.FLOAT32, streams: int = 1
    ) -> None:
        self.output_dtype = dtype
        self.streams = streams
        self.before = before
        self.ran: list[int] = []
        self.runs: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def run(self, patches: Array, grids: Sequence[Grid], out: Array) -> None:
        ends = np.cumsum([grid.patches for grid in grids])
        values = [int(part[0, 0]) for part in np.split(patches, ends[:-1])]
        self.runs.append(values)
        self.ran += values
        self.entered.release()
        assert self.gate.wait(20)
        tokens = np.cumsum([grid.tokens(TOWER) for grid in grids])
        for value, rows in zip(values, np.split(out, tokens[:-1]), strict=True):
            self.before(value)
            rows[:] = value if self.output_dtype is not DType.BFLOAT16 else 0x7F80


def item(value: int, patches: int = 4) -> Patches:
    """An item of so many patches (a multiple of 4), told apart by a value; 0 is what lanes try themselves with."""
    return Patches(np.full((patches, TOWER.patch_width), value, np.uint8), Grid(1, 2, patches // 2))


def draft(patches: Patches, dtype: DType = DType.FLOAT32) -> Draft:
    return loose_draft(
        Description(
            grid=patches.grid,
            tokens=patches.grid.tokens(TOWER),
            width=TOWER.out_hidden_size,
            dtype=dtype,
            fingerprint="model",
        )
    )


async def encode(lane: Lane, patches: Patches, client: str = "somebody", deadline: float = math.inf) -> Ran:
    return await lane.encode(patches, client, lambda: deadline, lambda: draft(patches, lane.output_dtype))


async def entered(runtime: FakeRuntime) -> None:
    """Return once a run has begun."""
    assert await asyncio.to_thread(runtime.entered.acquire, timeout=20)


def run(work: Awaitable[object]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(work, 20)

    asyncio.run(limited())
