"""The scheduler: whether an item may enter, and which lane it goes to."""

from __future__ import annotations

from collections.abc import Sequence

from sidecar.engine.lane import Encoded, Lane
from sidecar.errors import Overloaded
from sidecar.vision.pixels import Patches


class Scheduler:
    """Admits items up to `max_queue_patches` over all lanes and gives each to the lane with the fewest patches waiting."""

    def __init__(self, lanes: Sequence[Lane], max_queue_patches: int) -> None:
        self.lanes = tuple(lanes)
        self._max_queue_patches = max_queue_patches
        self._waiting = dict.fromkeys(self.lanes, 0)
        self._ms_per_patch = 1.0

    async def encode(self, patches: Patches) -> Encoded:
        """Encode one item.

        Raises:
            Overloaded: if too much is waiting; an item larger than the whole queue still passes when nothing is.
            LaneFault: if the lane failed on it.
        """
        cost = patches.grid.patches
        waiting = sum(self._waiting.values())
        if waiting and waiting + cost > self._max_queue_patches:
            raise Overloaded(
                f"{waiting} patches are waiting, this item has {cost}, the limit is {self._max_queue_patches}",
                retry_after_s=self._retry_after_s(waiting, cost),
            )
        lane = min(self.lanes, key=self._waiting.__getitem__)
        self._waiting[lane] += cost
        try:
            encoded = await lane.encode(patches)
        finally:
            self._waiting[lane] -= cost
        self._ms_per_patch = encoded.run_ms / cost
        return encoded

    def _retry_after_s(self, waiting: int, cost: int) -> float:
        """Until enough of what is waiting has run, at the speed of the last run."""
        excess = min(waiting, waiting + cost - self._max_queue_patches)
        return self._ms_per_patch * excess / len(self.lanes) / 1e3

    def close(self, timeout_s: float | None = None) -> bool:
        """Finish what is queued on every lane; see `Lane.close`."""
        closed = [lane.close(timeout_s) for lane in self.lanes]
        return all(closed)
