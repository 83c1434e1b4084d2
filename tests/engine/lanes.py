"""A runtime that does what a test tells it to, and lanes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from sidecar.runtimes.base import Runtime
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

    def __init__(self, before: Callable[[int], object] = lambda value: None, dtype: DType = DType.FLOAT32) -> None:
        self.output_dtype = dtype
        self.before = before
        self.ran: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def run(self, patches: Array, grids: Sequence[Grid], out: Array) -> None:
        value = int(patches[0, 0])
        self.ran.append(value)
        self.entered.release()
        assert self.gate.wait(20)
        self.before(value)
        out[:] = value if self.output_dtype is not DType.BFLOAT16 else 0x7F80


def item(value: int, patches: int = 4) -> Patches:
    """An item of so many patches (a multiple of 4), told apart by a value."""
    return Patches(np.full((patches, TOWER.patch_width), value, np.uint8), Grid(1, 2, patches // 2))
