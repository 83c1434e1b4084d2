"""What the engine is asked for: one item, as functions that give its size and its patches when they are needed."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sidecar.vision.grid import Grid
from sidecar.vision.pixels import Patches


@dataclass(frozen=True, slots=True)
class Prepared:
    """Patches, and the milliseconds that decoding and the rest took."""

    patches: Patches
    decode_ms: float
    preprocess_ms: float


@dataclass(frozen=True, slots=True)
class Opened:
    """An item whose size is known. `prepare` decodes, resizes and cuts it; it runs on a preprocessing thread.

    `decoded_pixels`: of an encoded picture, which may be far more than its grid holds.
    `memory_bytes`: about what preparing it holds at its peak.
    """

    grid: Grid
    prepare: Callable[[], Prepared]
    decoded_pixels: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """One item.

    Attributes:
        name: its identity within the model, a plain file name: orders of one name are of equal content, and encoded once.
        client: whose share of the server it takes.
        open: finds out its size without decoding it.
        deadline: when the caller's patience ends, in `time.monotonic` seconds.
    """

    name: str
    client: str
    open: Callable[[], Awaitable[Opened]]
    deadline: float = math.inf
