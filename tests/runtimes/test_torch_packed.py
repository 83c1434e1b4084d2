"""The packed tower gives what the tower gives, on runs of every kind. Attention over sequences is done one by one here, since
torch has it on CUDA only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sidecar.runtimes import torch_packed
from sidecar.runtimes.torch_packed import PackedEncoder, PackedTower, Room
from sidecar.runtimes.torch_padded import PaddedEncoder
from sidecar.vision.grid import Grid
from sidecar.vision.packing import pack
from sidecar.vision.spec import PixelSpec, TowerSpec
from sidecar.vision.tower import Tower

SPEC = TowerSpec(
    depth=3, hidden_size=64, num_heads=4, intermediate_size=100, out_hidden_size=48, fullatt_block_indexes=(1,)
)
RUNS = (
    [Grid(1, 8, 8)],
    [Grid(1, 2, 2)],
    [Grid(1, 16, 24)],
    [Grid(1, 10, 22)],
    [Grid(3, 12, 20)],
    [Grid(2, 16, 8)],
    [Grid(1, 16, 8), Grid(2, 10, 6), Grid(1, 34, 14)],
    [Grid(1, 4, 6)] * 5,
)


def attention_one_by_one(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, key_ends: Tensor, longest: int, longest_key: int
) -> Tensor:
    """Rows that no sequence has are NaN: whoever reads one shows it."""
    assert torch.equal(ends, key_ends) and longest == longest_key
    mixed = torch.full_like(query, torch.nan)
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        assert 0 <= end - start <= longest
        if end > start:
            heads = (part[start:end].transpose(0, 1) for part in (query, key, value))
            mixed[start:end] = functional.scaled_dot_product_attention(*heads).transpose(0, 1)
    return mixed


@pytest.fixture
def tower(monkeypatch: pytest.MonkeyPatch) -> Tower:
    monkeypatch.setattr(torch_packed, "varlen_attn", attention_one_by_one)
    torch.manual_seed(3)
    tower = Tower(SPEC, PixelSpec())
    for name, weight in tower.named_parameters():
        spread = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
        torch.nn.init.normal_(weight, 1.0 if "norm" in name or "ln_q" in name else 0.0, spread)
    return tower.eval()


def patches(grids: Sequence[Grid], rows: int) -> Tensor:
    count = sum(grid.patches for grid in grids)
    values = torch.full((rows, SPEC.patch_width), torch.nan)
    random = np.random.default_rng(count).integers(0, 256, (count, SPEC.patch_width), dtype=np.uint8)
    values[:count] = torch.from_numpy(random)
    return values


def expected(tower: Tower, grids: Sequence[Grid]) -> Tensor:
    encoder = PaddedEncoder(tower)
    plan = encoder.plan(grids)
    arrays = {name: torch.from_numpy(array) for name, array in plan.arrays.items()}
    return encoder.encode(plan, patches(grids, plan.rows), arrays)


@pytest.mark.parametrize("grids", RUNS, ids=str)
def test_packed_equals_padded(tower: Tower, grids: list[Grid]) -> None:
    reference = expected(tower, grids)
    encoder = PackedEncoder(PackedTower(tower))
    plan = encoder.plan(grids)
    assert plan.rows % 64 == 0
    got = encoder.encode(plan, patches(grids, plan.rows), {"plan": torch.from_numpy(plan.arrays["plan"])})
    assert (got[: plan.tokens] - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_a_run_in_a_room_that_is_larger_than_it_needs_is_the_same(tower: Tower) -> None:
    grids = [Grid(1, 10, 22), Grid(1, 16, 8)]
    reference = expected(tower, grids)
    packed = PackedTower(tower)
    room = Room(rows=512, windows=40, frames=16, merge_unit=SPEC.merge_unit)
    plan = pack(grids, SPEC)
    assert room.holds(plan)
    vector = torch.from_numpy(room.vector(plan))
    got = packed(room.inputs(patches(grids, 512), vector), 512)
    tokens = len(plan.token_order)
    assert (got[:tokens] - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_a_room_says_what_it_cannot_hold() -> None:
    room = Room(rows=128, windows=4, frames=2, merge_unit=4)
    assert room.holds(pack([Grid(1, 8, 16)], SPEC))
    assert not room.holds(pack([Grid(1, 8, 18)], SPEC))  # rows
    assert not room.holds(pack([Grid(1, 2, 40)], SPEC))  # windows
    assert not room.holds(pack([Grid(3, 2, 2)], SPEC))  # frames
