"""The window plan: in which order patches go through the tower, so that windows are a batch axis and not a mask.

Qwen2.5-VL attends inside windows of 8×8 patches except in a few full-attention blocks, where a patch sees its whole frame.
Attention does not care about the order of its keys, so the order is ours to choose:

    [ full windows of every frame | ragged windows of every frame ]

The full windows are then one reshape to (windows, 64, …): no gather, no mask. Only the ragged windows on the right and
bottom edges are gathered into padded windows, and only in the few full-attention blocks are patches gathered by frame. Both
masks are per key, (windows, 64) and (frames, longest frame): nothing of N×N exists.

A plan covers a list of items of any sizes, so several images go through one run of one graph.
The reference for the membership of windows is `get_vision_window_index` in transformers' vision_utils.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from sidecar.vision.grid import Grid
from sidecar.vision.spec import TowerSpec

Index = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

# Added to the scores of keys that are only padding. Finite, so that no row can become NaN in any precision.
MASKED = np.float32(-30000.0)


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Index arrays for one run over N patches, T = N / merge_unit tokens.

    `patch_order` (N,) picks the caller's patches into the tower's order; the tower never sees the caller's order.
    The remaining arrays are the tower's inputs, in the order of `tower_inputs`:

    - `rotary_cos`, `rotary_sin` (N, head_dim): position encoding per patch, in the tower's order
    - `ragged_index` (R, 64): positions of each ragged window's patches; padding points at one of its own patches
    - `ragged_mask` (R, 64): 0, or `MASKED` where padding
    - `ragged_return` (N_r,): where each of the N_r ragged patches lies in the flattened (R·64)
    - `frame_index` (F, L), `frame_mask` (F, L), `frame_return` (N,): the same for whole frames, L patches in the longest
    - `token_order` (T,): picks rows of the tower's output back into the caller's order
    """

    patch_order: Index
    rotary_cos: Floats
    rotary_sin: Floats
    ragged_index: Index
    ragged_mask: Floats
    ragged_return: Index
    frame_index: Index
    frame_mask: Floats
    frame_return: Index
    token_order: Index

    @property
    def tower_inputs(self) -> dict[str, npt.NDArray[np.int32] | npt.NDArray[np.float32]]:
        return {name: getattr(self, name) for name in TOWER_PLAN_INPUTS}


TOWER_PLAN_INPUTS = tuple(name for name in WindowPlan.__dataclass_fields__ if name != "patch_order")


@dataclass(frozen=True, slots=True)
class FramePlan:
    """One frame of one grid: its patches (in merge order) sorted by window, and the windows' lengths."""

    full: Index  # (full windows, 64) positions in the frame
    ragged: tuple[Index, ...]  # one array of positions per ragged window
    rows: Index  # (h·w,) row of each patch in the frame, in patches
    columns: Index


@lru_cache(maxsize=64)
def frame_plan(h: int, w: int, merge: int, window_side: int) -> FramePlan:
    token_h, token_w, unit = h // merge, w // merge, merge * merge
    tokens = np.arange(token_h * token_w, dtype=np.int32).reshape(token_h, token_w)
    patches_of = np.arange(unit, dtype=np.int32)
    full: list[Index] = []
    ragged: list[Index] = []
    for top in range(0, token_h, window_side):
        for left in range(0, token_w, window_side):
            window = tokens[top : top + window_side, left : left + window_side].reshape(-1, 1)
            members = (window * unit + patches_of).reshape(-1)
            (full if members.size == window_side**2 * unit else ragged).append(members)
    # Merge order: (h/merge, w/merge, merge, merge).
    row, column = np.meshgrid(np.arange(h, dtype=np.int32), np.arange(w, dtype=np.int32), indexing="ij")
    blocks = (token_h, merge, token_w, merge)
    rows, columns = (axis.reshape(blocks).transpose(0, 2, 1, 3).reshape(-1) for axis in (row, column))
    stacked = np.stack(full) if full else np.empty((0, window_side**2 * unit), np.int32)
    return FramePlan(stacked, tuple(ragged), rows, columns)


def plan_windows(grids: Sequence[Grid], spec: TowerSpec) -> WindowPlan:
    """Plan one run over `grids`, whose patches the caller concatenates in that order.

    Raises:
        GridError: if a grid does not suit the tower.
        ValueError: if there is no grid at all.
    """
    if not grids:
        raise ValueError("a window plan needs at least one grid")
    window = spec.window_patches
    full: list[Index] = []
    ragged: list[Index] = []
    frames: list[Index] = []  # caller's positions of each frame's patches
    rows: list[Index] = []
    columns: list[Index] = []
    start = 0
    for grid in grids:
        grid.check(spec)
        frame = frame_plan(grid.h, grid.w, spec.spatial_merge_size, spec.window_side)
        for _ in range(grid.t):
            full.append(frame.full.reshape(-1) + start)
            ragged.extend(members + start for members in frame.ragged)
            frames.append(np.arange(start, start + grid.h * grid.w, dtype=np.int32))
            rows.append(frame.rows)
            columns.append(frame.columns)
            start += grid.h * grid.w

    patch_order = np.concatenate(full + ragged).astype(np.int32)
    position_of = np.empty(start, np.int32)  # the tower's position of each of the caller's patches
    position_of[patch_order] = np.arange(start, dtype=np.int32)

    ragged_index, ragged_mask, ragged_return = _padded([position_of[members] for members in ragged], window)
    # Sorted, so that one image alone is read in the tower's own order.
    by_frame = [np.sort(position_of[members]) for members in frames]
    frame_index, frame_mask, frame_slots = _padded(by_frame, max(len(members) for members in frames))
    frame_return = np.empty(start, np.int32)
    frame_return[np.concatenate(by_frame)] = frame_slots

    cos, sin = _rotary(np.concatenate(rows)[patch_order], np.concatenate(columns)[patch_order], spec)
    return WindowPlan(
        patch_order=patch_order,
        rotary_cos=cos,
        rotary_sin=sin,
        ragged_index=ragged_index,
        ragged_mask=ragged_mask,
        ragged_return=ragged_return,
        frame_index=frame_index,
        frame_mask=frame_mask,
        frame_return=frame_return,
        token_order=position_of[:: spec.merge_unit] // spec.merge_unit,
    )


def _padded(groups: Sequence[Index], length: int) -> tuple[Index, Floats, Index]:
    """Stack groups of positions into (groups, length), with the mask per key and each member's slot when flattened."""
    index = np.zeros((len(groups), length), np.int32)
    mask = np.full((len(groups), length), MASKED, np.float32)
    slots: list[Index] = [np.empty(0, np.int32)]
    for row, members in enumerate(groups):
        index[row, : len(members)] = members
        index[row, len(members) :] = members[0]
        mask[row, : len(members)] = 0
        slots.append(np.arange(row * length, row * length + len(members), dtype=np.int32))
    return index, mask, np.concatenate(slots)


def _rotary(rows: Index, columns: Index, spec: TowerSpec) -> tuple[Floats, Floats]:
    """cos and sin (N, head_dim): the first quarter turns with the row, the second with the column, both repeated
    (Qwen2_5_VLVisionRotaryEmbedding)."""
    quarter = spec.head_dim // 4
    exponents = np.arange(quarter, dtype=np.float32) * np.float32(2) / np.float32(spec.head_dim // 2)
    frequencies = (np.float32(1) / np.float32(spec.rope_theta) ** exponents).astype(np.float32)
    angles = np.concatenate([axis[:, None].astype(np.float32) * frequencies for axis in (rows, columns)], axis=1)
    angles = np.concatenate([angles, angles], axis=1)
    return np.cos(angles), np.sin(angles)
