"""The packed plan: the order of patches for attention over sequences of any length that lie one after another.

    [ windows of frame 1 | windows of frame 2 | … ]

Where a runtime has such an attention ("variable length", from the ends of the sequences), windows and frames are both stretches
of one order: nothing is gathered, padded or masked, whatever the grids. `WindowPlan` is for runtimes that have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sidecar.vision.grid import Grid
from sidecar.vision.spec import TowerSpec
from sidecar.vision.windows import Index, frame_plan


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """Index arrays for one run over N patches, T = N / merge_unit tokens, int32.

    - `patch_order` (N,) picks the caller's patches into this order
    - `positions` (N, 2): row and column of each patch in its frame, in this order
    - `window_ends` (W + 1,), `frame_ends` (F + 1,): where each sequence begins and the last one ends, from 0 to N
    - `token_order` (T,) picks rows of the tower's output back into the caller's order
    """

    patch_order: Index
    positions: Index
    window_ends: Index
    frame_ends: Index
    token_order: Index

    @property
    def patches(self) -> int:
        return len(self.patch_order)

    @property
    def longest_frame(self) -> int:
        return int(np.diff(self.frame_ends).max())


@dataclass(frozen=True, slots=True)
class _Frame:
    order: Index
    positions: Index
    window_lengths: Index
    token_order: Index


@lru_cache(maxsize=256)
def _frame(h: int, w: int, merge: int, window_side: int) -> _Frame:
    plan = frame_plan(h, w, merge, window_side)
    order = np.concatenate([plan.full.reshape(-1), *plan.ragged]).astype(np.int32)
    lengths = [plan.full.shape[1]] * len(plan.full) + [len(members) for members in plan.ragged]
    position_of = np.empty(len(order), np.int32)
    position_of[order] = np.arange(len(order), dtype=np.int32)
    return _Frame(
        order,
        np.stack((plan.rows, plan.columns), axis=1)[order],
        np.array(lengths, np.int32),
        position_of[:: merge * merge] // (merge * merge),
    )


def pack(grids: Sequence[Grid], spec: TowerSpec) -> PackedPlan:
    """Plan one run over `grids`, whose patches the caller concatenates in that order.

    Raises:
        GridError: if a grid does not suit the tower.
        ValueError: if there is no grid at all.
    """
    if not grids:
        raise ValueError("a packed plan needs at least one grid")
    frames: list[_Frame] = []
    for grid in grids:
        grid.check(spec)
        frames += [_frame(grid.h, grid.w, spec.spatial_merge_size, spec.window_side)] * grid.t
    frame_ends = _ends([np.array([len(frame.order) for frame in frames], np.int32)])
    starts = frame_ends[:-1]
    return PackedPlan(
        patch_order=np.concatenate([frame.order + start for frame, start in zip(frames, starts, strict=True)]),
        positions=np.concatenate([frame.positions for frame in frames]),
        window_ends=_ends([frame.window_lengths for frame in frames]),
        frame_ends=frame_ends,
        token_order=np.concatenate(
            [frame.token_order + start // spec.merge_unit for frame, start in zip(frames, starts, strict=True)]
        ),
    )


def _ends(lengths: Sequence[Index]) -> Index:
    return np.concatenate([np.zeros(1, np.int32), *lengths]).cumsum(dtype=np.int32)
