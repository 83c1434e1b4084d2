"""Items known to be good: what a lane runs before the first caller's, and again after a fault, to see who is to blame."""

from __future__ import annotations

import time

import numpy as np

from sidecar.engine.cost import CostModel, Work
from sidecar.runtimes.base import Runtime
from sidecar.vision.grid import Grid
from sidecar.vision.pixels import Patches
from sidecar.vision.spec import TowerSpec

# Run twice each before a lane is ready, the smallest first: a whole window, ragged ones, and sizes to fit the cost to.
_WARM_UP_TOKENS = ((4, 4), (5, 6), (8, 8), (16, 16), (32, 32))
_LEAST_WARM_UP = 3


def blank(grid: Grid, tower: TowerSpec) -> Patches:
    """A black picture of this size."""
    return Patches(np.zeros((grid.patches, tower.patch_width), np.uint8), grid)


class KnownGood:
    """Runs them on a lane's runtime."""

    def __init__(self, runtime: Runtime, tower: TowerSpec) -> None:
        self._runtime = runtime
        self._tower = tower

    def run(self, tokens: tuple[int, int] = _WARM_UP_TOKENS[0]) -> float:
        """One of this size in tokens (h, w); returns the milliseconds it took. Raises whatever the runtime does."""
        grid = self._grid(tokens)
        values = blank(grid, self._tower).values
        started = time.monotonic()
        self._runtime.encode(values, [grid], self._tower)
        return (time.monotonic() - started) * 1e3

    def warm_up(self, cost: CostModel, budget_s: float) -> None:
        """Run items of growing size, so that the first caller does not pay for what a runtime sets up at first use and so that
        the cost is known; larger ones only while the time lasts."""
        started = time.monotonic()
        for number, tokens in enumerate(_WARM_UP_TOKENS):
            work = Work.of([self._grid(tokens)])
            left_ms = (budget_s - (time.monotonic() - started)) * 1e3
            if number >= _LEAST_WARM_UP and 2 * cost.ms(work) > left_ms:
                break
            self.run(tokens)  # the first at a size is slower
            cost.anchor(work, self.run(tokens))

    def _grid(self, tokens: tuple[int, int]) -> Grid:
        merge = self._tower.spatial_merge_size
        return Grid(1, tokens[0] * merge, tokens[1] * merge)
