"""Memory that OpenVINO holds of its largest run, and when to give it back.

A compiled model keeps the intermediate tensors of the largest run it ever did. `CompiledModel.release_memory` frees them,
but OpenVINO 2026.2 then fails on a run of the same shapes as the last one ("Memory has not been allocated": the inputs of RoPE
are allocated only when their shape changes). So two small runs that have no shape in common stand before and after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

from sidecar.vision.grid import Grid
from sidecar.vision.spec import TowerSpec

# Below that many patches what is held is of no account; for so long none of that size must have come.
_LEAST_PATCHES = 4096
_AFTER_S = 30.0
# How long giving memory back waits for a run to end.
RELEASE_WAIT_S = 1.0


class CompiledModel(Protocol):
    """OpenVINO's."""

    def release_memory(self) -> None: ...


class Held:
    """The largest run since memory was last given back, and when there was one of that size."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._largest = 0
        self._last_large_s = clock()

    def ran(self, patches: int) -> None:
        """Note a run."""
        self._largest = max(self._largest, patches)
        if 2 * patches >= self._largest:
            self._last_large_s = self._clock()

    @property
    def due(self) -> bool:
        """Whether memory is held for runs of a size that no longer comes."""
        return self._largest >= _LEAST_PATCHES and self._clock() - self._last_large_s >= _AFTER_S

    def released(self) -> None:
        """Note that it was given back."""
        self._largest = 0


def release(compiled: Iterable[CompiledModel], tower: TowerSpec, run: Callable[[Grid], None]) -> None:
    """Free what compiled models hold, and leave them ready to run.

    Args:
        compiled: the models; none may be running.
        tower: the tower's sizes.
        run: carries out a run of one item of that grid, through all of the models.

    Raises:
        RuntimeError: if the models cannot run any more.
    """
    merge = tower.spatial_merge_size
    run(Grid(1, merge, merge))
    for model in compiled:
        model.release_memory()
    wide = (tower.window_side + 1) * merge
    try:
        run(Grid(2, merge, wide))  # two frames of two windows each: unlike the run before in every shape
    except RuntimeError:
        run(Grid(3, merge, 2 * wide))
