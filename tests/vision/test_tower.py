"""The tower against transformers' own, in float32, on random grids: images, several at once, videos."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from sidecar.vision.grid import Grid
from sidecar.vision.spec import PixelSpec, TowerSpec
from sidecar.vision.tower import Tower
from sidecar.vision.windows import plan_windows

SPEC = TowerSpec(
    depth=4, hidden_size=64, num_heads=4, intermediate_size=100, out_hidden_size=48, fullatt_block_indexes=(1, 3)
)
PIXELS = PixelSpec()
LIMIT = 1e-4

sides = st.integers(1, 18).map(lambda n: 2 * n)
images = st.builds(Grid, st.just(1), sides, sides)
videos = st.builds(Grid, st.integers(2, 4), sides, sides)


@pytest.fixture(scope="module")
def theirs() -> Qwen2_5_VisionTransformerPretrainedModel:
    torch.manual_seed(7)
    config = Qwen2_5_VLVisionConfig(
        depth=SPEC.depth,
        hidden_size=SPEC.hidden_size,
        num_heads=SPEC.num_heads,
        intermediate_size=SPEC.intermediate_size,
        out_hidden_size=SPEC.out_hidden_size,
        fullatt_block_indexes=list(SPEC.fullatt_block_indexes),
    )
    model = Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa").float().eval()
    for name, weight in model.named_parameters():
        spread = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
        torch.nn.init.normal_(weight, 1.0 if "norm" in name or "ln_q" in name else 0.0, spread)
    return model


@pytest.fixture(scope="module")
def ours(theirs: Qwen2_5_VisionTransformerPretrainedModel) -> Tower:
    tower = Tower(SPEC, PIXELS)
    tower.load_state_dict(theirs.state_dict(), strict=True)
    return tower.eval()


@torch.inference_mode()
def error(ours: Tower, theirs: torch.nn.Module, items: list[Grid], seed: int = 0) -> float:
    """Largest difference over the largest value of the reference."""
    count = sum(grid.patches for grid in items)
    patches = np.random.default_rng(seed).integers(0, 256, (count, SPEC.patch_width), dtype=np.uint8)
    plan = plan_windows(items, SPEC)
    inputs = [torch.from_numpy(array.copy()) for array in plan.tower_inputs.values()]
    got = ours(torch.from_numpy(patches[plan.patch_order]), *inputs)
    mean = torch.tensor(PIXELS.image_mean).repeat_interleave(392)
    std = torch.tensor(PIXELS.image_std).repeat_interleave(392)
    expected = theirs((torch.from_numpy(patches) / 255 - mean) / std, torch.tensor(items)).pooler_output
    return float((got - expected).abs().max() / expected.abs().max())


@settings(max_examples=100, deadline=None)
@given(images, st.integers(0, 2**32 - 1))
def test_an_image_of_any_grid(
    ours: Tower, theirs: Qwen2_5_VisionTransformerPretrainedModel, grid: Grid, seed: int
) -> None:
    assert error(ours, theirs, [grid], seed) <= LIMIT


@settings(max_examples=60, deadline=None)
@given(st.lists(images, min_size=2, max_size=4))
def test_several_images_in_one_run(
    ours: Tower, theirs: Qwen2_5_VisionTransformerPretrainedModel, items: list[Grid]
) -> None:
    assert error(ours, theirs, items) <= LIMIT


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(images, videos), min_size=1, max_size=3).filter(lambda items: any(g.t > 1 for g in items)))
def test_videos_alone_and_among_images(
    ours: Tower, theirs: Qwen2_5_VisionTransformerPretrainedModel, items: list[Grid]
) -> None:
    assert error(ours, theirs, items) <= LIMIT


def test_float_pixels_give_what_the_same_bytes_give(ours: Tower) -> None:
    plan = plan_windows([Grid(1, 6, 10)], SPEC)
    patches = np.random.default_rng(1).integers(0, 256, (60, SPEC.patch_width), dtype=np.uint8)[plan.patch_order]
    inputs = [torch.from_numpy(array.copy()) for array in plan.tower_inputs.values()]
    with torch.inference_mode():
        as_bytes = ours(torch.from_numpy(patches), *inputs)
        as_floats = ours(torch.from_numpy(patches.astype(np.float32)), *inputs)
    assert torch.equal(as_bytes, as_floats)


def test_a_neighbour_in_the_run_changes_nothing(ours: Tower) -> None:
    """What an image's embedding is does not depend on what it was batched with."""
    first, second = Grid(1, 10, 6), Grid(2, 8, 12)
    patches = np.random.default_rng(2).integers(0, 256, (first.patches + second.patches, SPEC.patch_width), np.uint8)

    def rows(items: list[Grid], values: np.ndarray) -> torch.Tensor:
        plan = plan_windows(items, SPEC)
        inputs = [torch.from_numpy(array.copy()) for array in plan.tower_inputs.values()]
        with torch.inference_mode():
            return ours(torch.from_numpy(values[plan.patch_order]), *inputs)

    alone = rows([first], patches[: first.patches])
    together = rows([first, second], patches)[: first.tokens(SPEC)]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
