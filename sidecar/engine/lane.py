"""A lane: one runtime on one device, one thread, one queue.

The thread owns the runtime. Work whose caller has gone is skipped when its turn comes, so cancelled work never runs.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

from sidecar.errors import LaneFault, ShuttingDown
from sidecar.runtimes.base import Runtime
from sidecar.vision.dtypes import Array, all_finite
from sidecar.vision.grid import Grid
from sidecar.vision.pixels import Patches
from sidecar.vision.spec import TowerSpec

logger = logging.getLogger(__name__)

_WARM_UP_TOKENS = ((4, 4), (5, 6))  # a whole window; whole and ragged ones


@dataclass(frozen=True, slots=True)
class Encoded:
    """An embedding (tokens, out_hidden_size) in the lane's output dtype, and what it took."""

    rows: Array
    lane: Lane
    queue_ms: float
    run_ms: float


@dataclass(slots=True)
class _Work:
    """`patches` is None once the caller has gone, so that what waits for its turn to be skipped takes no memory."""

    patches: Patches | None
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[Encoded]
    queued_at: float = field(default_factory=time.perf_counter)


class Lane:
    """Encodes one item after another on its own thread."""

    def __init__(self, runtime: Runtime, tower: TowerSpec) -> None:
        self.runtime = runtime
        self._tower = tower
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._closing = False
        self._entrance = threading.Lock()  # nothing gets into the queue behind its end
        self._thread = threading.Thread(target=self._serve, name=f"lane-{runtime.name}", daemon=True)
        self._thread.start()

    async def encode(self, patches: Patches) -> Encoded:
        """Queue an item and wait for its embedding.

        Raises:
            LaneFault: if the runtime failed, or gave values that are not finite.
            ShuttingDown: if the lane is closed.
        """
        loop = asyncio.get_running_loop()
        work = _Work(patches, loop, loop.create_future())
        with self._entrance:
            if self._closing:
                raise ShuttingDown("this server is shutting down; send the item to another one")
            self._queue.put(work)
        try:
            return await work.done
        except asyncio.CancelledError:
            work.patches = None
            raise

    def warm_up(self) -> None:
        """Run small items, so that the first caller does not pay for what a runtime sets up at first use.

        Raises:
            RuntimeFault: if the runtime fails.
        """
        import numpy as np

        for token_h, token_w in _WARM_UP_TOKENS:
            merge = self._tower.spatial_merge_size
            grid = Grid(1, token_h * merge, token_w * merge)
            self.runtime.encode(np.zeros((grid.patches, self._tower.patch_width), np.uint8), [grid], self._tower)

    def close(self, timeout_s: float | None = None) -> bool:
        """Take no more, finish what is queued, and end the thread. Returns whether that was done within `timeout_s`."""
        with self._entrance:
            self._closing = True
            self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        while (work := self._queue.get()) is not None:
            patches = work.patches
            if patches is None or work.done.cancelled():
                continue
            started = time.perf_counter()
            result: Encoded | LaneFault
            try:
                rows = self.runtime.encode(patches.values, [patches.grid], self._tower)
                if not all_finite(rows, self.runtime.output_dtype):
                    raise LaneFault(
                        "the embedding is not finite; the input or the artifact's precision is out of range"
                    )
                finished = time.perf_counter()
                result = Encoded(rows, self, (started - work.queued_at) * 1e3, (finished - started) * 1e3)
            except LaneFault as fault:
                result = fault
            except BaseException:  # whatever a runtime throws must not end the lane
                logger.exception("%s failed on %s", self.runtime.name, tuple(patches.grid))
                result = LaneFault(
                    f"the {self.runtime.name} runtime failed on this item; the server's log has the details"
                )
            with suppress(RuntimeError):  # a loop that was closed has nobody left who waits
                work.loop.call_soon_threadsafe(_resolve, work.done, result)


def _resolve(done: asyncio.Future[Encoded], result: Encoded | LaneFault) -> None:
    if done.cancelled():
        return
    if isinstance(result, LaneFault):
        done.set_exception(result)
    else:
        done.set_result(result)
