"""The window plan against transformers' own window index, and what the tower relies on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from sidecar.vision.grid import Grid, GridError
from sidecar.vision.spec import TowerSpec
from sidecar.vision.windows import MASKED, plan_windows

SPEC = TowerSpec(
    depth=2, hidden_size=64, num_heads=4, intermediate_size=96, out_hidden_size=48, fullatt_block_indexes=(1,)
)

grids = st.builds(
    Grid, st.integers(1, 3), st.integers(1, 20).map(lambda n: 2 * n), st.integers(1, 20).map(lambda n: 2 * n)
)


def transformers_windows(items: list[Grid]) -> set[frozenset[int]]:
    """Each window as the set of its patches, in the caller's numbering."""
    index, bounds = get_vision_window_index(torch.tensor(items), spatial_merge_size=2, window_size=112, patch_size=14)
    patches = (index[:, None] * 4 + torch.arange(4)).reshape(-1).tolist()
    return {frozenset(patches[a:b]) for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)}


@settings(max_examples=150, deadline=None)
@given(st.lists(grids, min_size=1, max_size=4))
def test_windows_hold_the_patches_that_transformers_puts_together(items: list[Grid]) -> None:
    plan = plan_windows(items, SPEC)
    whole = len(plan.patch_order) - len(plan.ragged_return)
    windows = {frozenset(part.tolist()) for part in plan.patch_order[:whole].reshape(-1, SPEC.window_patches)}
    for index, mask in zip(plan.ragged_index, plan.ragged_mask, strict=True):
        windows.add(frozenset(plan.patch_order[index[mask == 0]].tolist()))
    assert windows == transformers_windows(items)


@settings(max_examples=100, deadline=None)
@given(st.lists(grids, min_size=1, max_size=4))
def test_every_patch_finds_its_way_back(items: list[Grid]) -> None:
    plan = plan_windows(items, SPEC)
    count = sum(grid.patches for grid in items)
    assert sorted(plan.patch_order.tolist()) == list(range(count))
    tower_order = np.arange(count)
    whole = count - len(plan.ragged_return)
    np.testing.assert_array_equal(plan.ragged_index.reshape(-1)[plan.ragged_return], tower_order[whole:])
    np.testing.assert_array_equal(plan.frame_index.reshape(-1)[plan.frame_return], tower_order)
    tokens = plan.patch_order.reshape(-1, 4)[plan.token_order]
    np.testing.assert_array_equal(tokens, np.arange(count).reshape(-1, 4))


@settings(max_examples=100, deadline=None)
@given(st.lists(grids, min_size=1, max_size=4))
def test_a_patch_sees_all_of_its_frame_and_nothing_else(items: list[Grid]) -> None:
    plan = plan_windows(items, SPEC)
    sizes = [grid.h * grid.w for grid in items for _ in range(grid.t)]
    starts = np.cumsum([0, *sizes])
    assert len(plan.frame_index) == len(sizes)
    for index, mask, start, size in zip(plan.frame_index, plan.frame_mask, starts, sizes, strict=False):
        seen = sorted(plan.patch_order[index[mask == 0]].tolist())
        assert seen == list(range(start, start + size))
    assert set(np.unique(plan.frame_mask)) <= {np.float32(0), MASKED}


def test_positions_turn_as_in_transformers() -> None:
    items = [Grid(1, 6, 10), Grid(2, 12, 4)]
    plan = plan_windows(items, SPEC)
    positions = get_vision_position_ids(torch.tensor(items), 2).numpy()[plan.patch_order]
    frequencies = 1 / 10000.0 ** (np.arange(0, 8, 2) / 8)
    angles = np.concatenate([positions[:, axis, None] * frequencies for axis in (0, 1, 0, 1)], axis=1)
    np.testing.assert_allclose(plan.rotary_cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(plan.rotary_sin, np.sin(angles), atol=1e-6)


@pytest.mark.parametrize("grid", [Grid(1, 3, 4), Grid(1, 4, 5), Grid(0, 4, 4), Grid(1, 0, 4)])
def test_a_grid_that_no_tower_takes_is_named(grid: Grid) -> None:
    with pytest.raises(GridError, match="grid"):
        plan_windows([Grid(1, 4, 4), grid], SPEC)


def test_a_plan_holds_nothing_that_grows_with_the_square() -> None:
    """1080p: every array together stays near the size of the patches."""
    plan = plan_windows([Grid(1, 78, 138)], SPEC)
    held = sum(array.nbytes for array in plan.tower_inputs.values())
    assert held < 78 * 138 * 600
