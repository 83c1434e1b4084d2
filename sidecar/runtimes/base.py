"""What a runtime is: it loads one graph on one device and turns the patches of a run into embeddings.

A runtime knows nothing of requests, queues or files of embeddings. It is called from as many threads at a time as it
has streams, or twice as many where it is pipelined.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sidecar.vision.dtypes import Array, DType
from sidecar.vision.grid import Grid
from sidecar.vision.spec import PixelSpec, TowerSpec


class RuntimeFault(RuntimeError):
    """A runtime could not be loaded, or failed on a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a runtime needs to load.

    `device` is in the runtime's own terms (`cpu`, `cuda:0`). `threads` 0 leaves the number to the runtime. `streams`: runs that
    may go on side by side, sharing the threads; a runtime that has no such thing takes one.
    `cache_dir`: where compiled models may be kept for the next start, or None.
    """

    graph: Path
    precision: str
    tower: TowerSpec
    pixels: PixelSpec
    output_dtype: DType
    device: str = "cpu"
    threads: int = 0
    streams: int = 1
    cache_dir: Path | None = None


class Runtime(ABC):
    """One loaded graph.

    Attributes:
        name: `openvino`, `onnx`, `torch` or `optimum`.
        version: of the library that runs.
        device: what really runs, read back from the runtime after loading.
        precision: what the graph computes in, as the artifact names it.
        output_dtype: dtype of the embeddings.
        streams: how many runs it carries out side by side.
        pipelined: each stream may be called by two threads: one run is copied while another computes.
    """

    name: str
    version: str = ""
    device: str
    precision: str
    output_dtype: DType
    streams: int = 1
    pipelined: bool = False

    @abstractmethod
    def run(self, patches: Array, grids: Sequence[Grid], out: Array) -> None:
        """Encode the items of one run.

        Args:
            patches: (N, patch_width), uint8 or float32 in pixel units, the items one after another in merge order.
            grids: one for each item.
            out: (T, out_hidden_size) of `output_dtype.storage`, C-contiguous; filled in place, the items in their order.

        Raises:
            RuntimeFault: if the runtime failed.
        """

    def release_memory(self) -> bool:
        """Give back memory that is held of runs of a size that no longer comes. May be called at any time, from any thread.

        Returns:
            Whether there was any.

        Raises:
            RuntimeFault: if the runtime failed.
        """
        return False

    def encode(self, patches: Array, grids: Sequence[Grid], tower: TowerSpec) -> Array:
        """`run` into a new array."""
        tokens = sum(grid.tokens(tower) for grid in grids)
        out = np.empty((tokens, tower.out_hidden_size), self.output_dtype.storage)
        self.run(patches, grids, out)
        return out
