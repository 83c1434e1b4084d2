"""CUDA graphs over a few sizes: a run of up to 8192 patches is one launch instead of three hundred.

A graph is for a number of rows, not for grids: which patches form windows, frames and tokens are values that it reads when it is
replayed. A run takes the smallest that holds it, an eighth larger than itself at most from 1024 rows on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sidecar.runtimes.torch_packed import PackedEncoder, PackedRun, PackedTower, Room
from sidecar.vision.grid import Grid
from sidecar.vision.packing import PackedPlan, pack

logger = logging.getLogger(__name__)

# Larger runs keep the GPU busy for longer than their launches take.
_LARGEST = 8192
# Room for windows that are half empty on average. Empty frames cost more: one for an image alone, and as many as share a run.
_ROWS_A_WINDOW = 32
_FRAMES = (1, 8)
# A cold start is bounded: sizes for which there was no time run without a graph.
_CAPTURE_S = 30.0


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    room: Room
    plan: Tensor
    embeddings: Tensor


def graph_sizes(largest: int = _LARGEST) -> Iterator[int]:
    """Rows of each graph: four in an octave up to 1024, then eight."""
    octave, step = 256, 64
    while octave < largest:
        yield from range(octave, 2 * octave, step)
        octave *= 2
        step = octave // (4 if octave < 1024 else 8)
    yield largest


class GraphedEncoder:
    """One CUDA graph for each size, over shared memory; what no graph holds is run by `PackedEncoder`."""

    def __init__(self, tower: PackedTower, device: torch.device, output_dtype: torch.dtype) -> None:
        self._eager = PackedEncoder(tower)
        self._tower = tower
        self._device = device
        self._captured: list[_Captured] = []  # the smallest first
        spec = tower.spec
        self._patches = torch.zeros(_LARGEST, spec.patch_width, dtype=torch.uint8, device=device)
        self._embeddings = torch.zeros(
            _LARGEST // spec.merge_unit, spec.out_hidden_size, dtype=output_dtype, device=device
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run once, which compiles what is to be compiled.

        Raises:
            Whatever a compiler raises.
        """
        spec = self._tower.spec
        plan = pack([Grid(1, 2 * spec.spatial_merge_size, 3 * spec.spatial_merge_size)] * 3, spec)
        run = self._eager.place(plan, self._eager.exact_room(plan))
        vector = torch.from_numpy(run.arrays["plan"]).to(self._device)
        self._eager.encode(run, self._patches[: run.rows], {"plan": vector})
        torch.cuda.synchronize(self._device)

    def capture(self) -> None:
        """Record the graphs, the largest first, since the others then find room in its memory."""
        started = time.perf_counter()
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        for rows, frames in sorted(product(graph_sizes(), _FRAMES), reverse=True):
            if time.perf_counter() - started > _CAPTURE_S:
                logger.warning("no time is left for CUDA graphs of %d rows and fewer", rows)
                break
            room = Room(rows, rows // _ROWS_A_WINDOW, frames, self._tower.spec.merge_unit)
            self._captured.insert(0, self._capture(room, pool, stream))
        logger.info("%d CUDA graphs in %.1f s", len(self._captured), time.perf_counter() - started)

    def plan(self, grids: Sequence[Grid]) -> PackedRun:
        plan = pack(grids, self._tower.spec)
        captured = self._fitting(plan)
        return self._eager.place(plan, captured.room if captured else self._eager.exact_room(plan))

    def encode(self, run: PackedRun, patches: Tensor, plan: Mapping[str, Tensor]) -> Tensor:
        captured = next((captured for captured in self._captured if captured.room is run.room), None)
        if captured is None or patches.dtype != self._patches.dtype:
            return self._eager.encode(run, patches, plan)
        self._patches[: len(patches)].copy_(patches)
        captured.plan.copy_(plan["plan"])
        captured.graph.replay()
        return captured.embeddings

    def _fitting(self, plan: PackedPlan) -> _Captured | None:
        return next((captured for captured in self._captured if captured.room.holds(plan)), None)

    @torch.inference_mode()
    def _capture(self, room: Room, pool: Any, stream: torch.cuda.Stream) -> _Captured:
        spec = self._tower.spec
        side = spec.window_side * spec.spatial_merge_size
        windows = pack([Grid(1, side, side)] * min(room.frames, room.rows // spec.window_patches), spec)
        vector = torch.from_numpy(room.vector(windows)).to(self._device)
        inputs = room.inputs(self._patches[: room.rows], vector)
        embeddings = self._embeddings[: room.rows // spec.merge_unit]

        def run() -> None:
            embeddings.copy_(self._tower(inputs, room.rows))

        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            run()  # sets up what may not be set up while a graph is recorded
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            run()
        return _Captured(graph, room, vector, embeddings)
