"""RGB → patches, bit for bit as transformers' Pillow processor makes them; normalised patches → pixels without loss."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.vision.grid import Grid, GridError
from sidecar.vision.images import decode_image
from sidecar.vision.pixels import (
    PixelError,
    given_patches,
    image_grid,
    image_patches,
    video_grid,
    video_patches,
)
from sidecar.vision.spec import PixelSpec, TowerSpec

Array = np.ndarray[Any, Any]

TOWER = TowerSpec(
    depth=2, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=64, fullatt_block_indexes=(1,)
)
SPEC = PixelSpec()
PHOTOS = {
    path.stem: decode_image(path.read_bytes()) for path in (Path(__file__).parents[2] / "export/photos").glob("*-*")
}
RAW = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}


def picture(height: int, width: int, seed: int = 0) -> Array:
    """Noise over a ramp: every pixel matters, and resizing meets both smooth and sharp places."""
    random = np.random.default_rng([seed, height, width])
    ramp = np.linspace(0, 190, height * width).reshape(height, width, 1)
    return (ramp + random.integers(0, 66, (height, width, 3))).astype(np.uint8)


@pytest.fixture(scope="session")
def torchvision() -> Any:
    """torchvision or, where it is not installed, None. PyPI's build is for CUDA: on CPU torch its import fails until
    the two operators that its compiled half would have brought are declared."""
    try:
        import torchvision
    except ImportError:
        return None
    except RuntimeError:
        import torch

        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision.declared_here = library  # the declarations go when the object does
    return torchvision


@pytest.fixture(scope="session")
def reference(torchvision: Any) -> Callable[..., tuple[Array, Grid]]:
    """transformers' Pillow processor: (rgb, bounds…) → patches as float32 and the grid."""
    processors = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    from PIL import Image

    def process(rgb: Array, min_pixels: int = SPEC.min_pixels, max_pixels: int = SPEC.max_pixels) -> tuple[Array, Grid]:
        processor = processors.Qwen2VLImageProcessorPil(min_pixels=min_pixels, max_pixels=max_pixels)
        made = processor(Image.fromarray(rgb), **RAW)
        return made["pixel_values"], Grid(*made["image_grid_thw"][0].tolist())

    return process


SIZES = [
    *[(1, 1), (1, 2), (2, 1), (3, 3), (1, 199), (200, 1), (13, 14), (14, 28), (27, 57), (28, 28), (42, 70), (55, 57)],
    *[(56, 56), (100, 37), (224, 224), (333, 500), (481, 640), (1080, 1920), (1001, 1003), (3000, 150), (2448, 3264)],
]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_an_image_of_any_size_becomes_transformers_patches(height: int, width: int, reference: Any) -> None:
    rgb = picture(height, width)
    patches = image_patches(rgb, TOWER, SPEC)
    expected, grid = reference(rgb)
    assert patches.grid == grid == image_grid(height, width, TOWER, SPEC)
    assert patches.values.dtype == np.uint8
    np.testing.assert_array_equal(patches.values, expected)


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("bounds", [(), (3136, 50_000), (1_000_000, 2_000_000), (60_000, 30_000)])
def test_a_real_photo_within_any_bounds_becomes_transformers_patches(name: str, bounds: Any, reference: Any) -> None:
    patches = image_patches(PHOTOS[name], TOWER, SPEC, *bounds)
    expected, grid = reference(PHOTOS[name], *bounds)
    assert patches.grid == grid
    np.testing.assert_array_equal(patches.values, expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 60_000), st.integers(0, 200_000))
def test_random_sizes_and_bounds_become_transformers_patches(
    reference: Any, height: int, width: int, low: int, more: int
) -> None:
    rgb = picture(height, width)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(GridError, match="aspect ratio"):
            image_patches(rgb, TOWER, SPEC, low, low + more)
        return
    patches = image_patches(rgb, TOWER, SPEC, low, low + more)
    expected, grid = reference(rgb, low, low + more)
    assert patches.grid == grid
    np.testing.assert_array_equal(patches.values, expected)


def test_a_patch_holds_the_pixels_of_its_place() -> None:
    rgb = picture(84, 112)  # three by four tokens: no resizing
    patches = image_patches(rgb, TOWER, SPEC)
    assert patches.grid == Grid(1, 6, 8)
    # Token 5 is the second of the second row; its third patch is the lower left one.
    patch = patches.values[5 * 4 + 2].reshape(3, 2, 14, 14)
    for temporal in (0, 1):
        np.testing.assert_array_equal(patch[:, temporal], rgb[42:56, 28:42].transpose(2, 0, 1))


@pytest.mark.parametrize("frames", [1, 2, 3, 6])
@pytest.mark.parametrize("bounds", [(), (3136, 9000)])
def test_a_video_is_its_frames_resized_and_the_last_repeated(frames: int, bounds: Any, reference: Any) -> None:
    video = np.stack([picture(90, 130, seed) for seed in range(frames)])
    patches = video_patches(video, TOWER, SPEC, *bounds)
    assert patches.grid == video_grid(frames, 90, 130, TOWER, SPEC, *bounds)
    assert patches.grid.t == -(-frames // 2)
    assert patches.values.shape == (patches.grid.patches, 1176)
    by_pair = patches.values.reshape(patches.grid.t, -1, 3, 2, 196)
    for slot in range(2 * patches.grid.t):
        alone, grid = reference(
            video[min(slot, frames - 1)], *(bounds or (SPEC.video_min_pixels, SPEC.video_max_pixels))
        )
        assert grid[1:] == patches.grid[1:]
        np.testing.assert_array_equal(by_pair[slot // 2, :, :, slot % 2], alone.reshape(-1, 3, 2, 196)[:, :, 0])


@pytest.mark.parametrize("kind", ["image", "video"])
def test_torchvision_processors_are_within_two_levels(kind: str, torchvision: Any) -> None:
    if torchvision is None:
        pytest.skip("torchvision is not installed; transformers' default processors need it")
    import torch
    from transformers.models.qwen2_vl import image_processing_qwen2_vl as images
    from transformers.models.qwen2_vl import video_processing_qwen2_vl as videos

    for name, rgb in PHOTOS.items():
        if kind == "image":
            ours = image_patches(rgb, TOWER, SPEC)
            theirs = images.Qwen2VLImageProcessor()(rgb.copy(), **RAW | {"return_tensors": "pt"})
            values, grid = theirs["pixel_values"], theirs["image_grid_thw"]
        else:
            video = np.stack([rgb, rgb[::-1], rgb[:, ::-1]])
            ours = video_patches(video, TOWER, SPEC)
            tensor = torch.from_numpy(video.transpose(0, 3, 1, 2).copy())
            theirs = videos.Qwen2VLVideoProcessor()(videos=[tensor], **RAW | {"return_tensors": "pt"})
            values, grid = theirs["pixel_values_videos"], theirs["video_grid_thw"]
        assert tuple(grid[0].tolist()) == ours.grid
        apart = np.abs(values.numpy().astype(int) - ours.values)
        assert apart.max() <= 2, name
        assert (apart > 1).mean() < 1e-3, name


# The normalisations of transformers with Pillow, transformers with torchvision, and vLLM on its device, all in float32.
MEAN = np.array(SPEC.image_mean, np.float32)[:, None]
STD = np.array(SPEC.image_std, np.float32)[:, None]
BY_FORMULA: dict[str, Callable[[Array], Array]] = {
    "two steps": lambda x: ((x.astype(np.float64) * SPEC.rescale_factor).astype(np.float32) - MEAN) / STD,
    "fused mean and std": lambda x: (x.astype(np.float32) - MEAN * np.float32(255)) / (STD * np.float32(255)),
    "scale and shift": lambda x: x.astype(np.float32) * (np.float32(SPEC.rescale_factor) / STD) - MEAN / STD,
}


def to_bf16_bits(values: Array) -> Array:
    """Round to nearest even, as torch does."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


BY_DTYPE: dict[str, Callable[[Array], Array]] = {
    "float32": lambda x: x,
    "float16": lambda x: x.astype(np.float16),
    "bfloat16": to_bf16_bits,
}


def normalised(patches: Array, formula: str, dtype: str = "float32") -> Array:
    by_channel = patches.reshape(len(patches), 3, -1)
    return BY_DTYPE[dtype](BY_FORMULA[formula](by_channel).astype(np.float32).reshape(patches.shape))


def every_level(width: int) -> Array:
    """Four patches that show all 256 levels in each channel."""
    levels = np.arange(4 * width // 3, dtype=np.uint8).reshape(4, 1, -1)
    return np.tile(levels, (1, 3, 1)).reshape(4, width)


@pytest.mark.parametrize("formula", BY_FORMULA)
@pytest.mark.parametrize("dtype", BY_DTYPE)
def test_normalised_patches_come_back_as_the_bytes_they_were(formula: str, dtype: str) -> None:
    sent = every_level(1176)
    assert all(len(np.unique(channel)) == 256 for channel in sent.reshape(4, 3, -1).transpose(1, 0, 2))
    values = given_patches(normalised(sent, formula, dtype), Grid(1, 2, 2), TOWER, SPEC, normalised=True).values
    assert values.dtype == np.uint8
    if (
        dtype == "bfloat16"
    ):  # bright neighbours share a number there: what comes back need only give the same number again
        np.testing.assert_array_equal(normalised(values, formula, dtype), normalised(sent, formula, dtype))
    else:
        np.testing.assert_array_equal(values, sent)


@pytest.mark.parametrize("formula", BY_FORMULA)
@pytest.mark.parametrize("dtype", BY_DTYPE)
def test_pixels_between_two_levels_are_not_rounded(formula: str, dtype: str) -> None:
    sent = every_level(1176).astype(np.float32)
    sent[3, 300] += 0.4 if sent[3, 300] < 200 else -0.4
    values = given_patches(normalised(sent, formula, dtype), Grid(1, 2, 2), TOWER, SPEC, normalised=True).values
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, sent, atol={"float32": 2e-4, "float16": 0.07, "bfloat16": 0.56}[dtype])


def test_one_pixel_between_two_levels_keeps_the_whole_item_from_rounding() -> None:
    grid = Grid(1, 40, 40)
    sent = np.tile(every_level(1176), (400, 1)).astype(np.float32)
    sent[0, 0] = 0.5
    values = given_patches(normalised(sent, "two steps"), grid, TOWER, SPEC, normalised=True).values
    np.testing.assert_allclose(values, sent, atol=2e-4)
    assert values[0, 0] == pytest.approx(0.5, abs=2e-4)


def test_an_image_may_send_one_of_its_equal_temporal_slices() -> None:
    whole = image_patches(PHOTOS["cat-451x300"], TOWER, SPEC)
    once = np.ascontiguousarray(whole.values.reshape(-1, 3, 2, 196)[:, :, 0]).reshape(-1, TOWER.image_patch_width)
    for values, is_normalised in ((once, False), (normalised(once, "two steps"), True)):
        patches = given_patches(values, whole.grid, TOWER, SPEC, normalised=is_normalised)
        assert patches.values.dtype == np.uint8
        assert patches.values.flags.c_contiguous
        np.testing.assert_array_equal(patches.values, whole.values)


def test_bytes_that_are_patches_already_are_not_copied() -> None:
    values = image_patches(picture(60, 60), TOWER, SPEC)
    assert given_patches(values.values, values.grid, TOWER, SPEC, normalised=False).values is values.values


@pytest.mark.parametrize(
    ("values", "grid", "is_normalised", "error", "why"),
    [
        (np.zeros((24, 1176), np.uint8), (1, 4, 5), False, GridError, "is odd"),
        (np.zeros((0, 1176), np.uint8), (1, 0, 0), False, GridError, "too small"),
        (np.zeros((20, 1176), np.uint8), (1, 4, 6), False, PixelError, "means 24 patches, but 20 were sent"),
        (np.zeros((0, 1176), np.uint8), (1, 4, 6), False, PixelError, "means 24 patches, but 0 were sent"),
        (
            np.zeros((24, 1000), np.uint8),
            (1, 4, 6),
            False,
            PixelError,
            r"1176\), or \(patches, 588\).*got \(24, 1000\)",
        ),
        (np.zeros(24 * 1176, np.uint8), (1, 4, 6), False, PixelError, r"got \(28224,\)"),
        (np.zeros((48, 588), np.uint8), (2, 4, 6), False, PixelError, "hold one temporal slice, which only an image"),
        (np.zeros((24, 1176), np.float32), (1, 4, 6), False, PixelError, "must be uint8, got float32"),
        (np.zeros((24, 1176), np.uint8), (1, 4, 6), True, PixelError, "must be float32, float16 .*got uint8"),
        (np.zeros((24, 1176), np.float64), (1, 4, 6), True, PixelError, "got float64"),
        (np.full((24, 1176), np.nan, np.float32), (1, 4, 6), True, PixelError, "must be finite .* nan"),
        (np.full((24, 588), np.inf, np.float16), (1, 4, 6), True, PixelError, "must be finite .* inf"),
        (np.full((24, 1176), 0xFF80, np.uint16), (1, 4, 6), True, PixelError, "must be finite .* -inf"),
        (np.full((24, 1176), 128, np.float32), (1, 4, 6), True, PixelError, "were they normalised"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_patches_that_do_not_fit_are_refused(
    values: Array, grid: tuple[int, int, int], is_normalised: bool, error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        given_patches(values, Grid(*grid), TOWER, SPEC, normalised=is_normalised)


@pytest.mark.parametrize(
    ("call", "error", "why"),
    [
        (lambda: image_patches(picture(1, 5000), TOWER, SPEC), GridError, "5000×1 pixels has an aspect ratio of 5000"),
        (lambda: image_patches(picture(0, 9), TOWER, SPEC), GridError, "no area"),
        (lambda: image_patches(np.zeros((9, 9), np.uint8), TOWER, SPEC), PixelError, r"got uint8 of shape \(9, 9\)"),
        (lambda: image_patches(np.zeros((3, 9, 9), np.uint8), TOWER, SPEC), PixelError, r"\(height, width, 3\)"),
        (lambda: image_patches(np.zeros((9, 9, 3), np.float32), TOWER, SPEC), PixelError, "got float32"),
        (lambda: image_patches(picture(9, 9), TOWER, SPEC, max_pixels=0), PixelError, "max_pixels must be at least 1"),
        (
            lambda: video_patches(picture(9, 9), TOWER, SPEC),
            PixelError,
            r"\(frames, height, width, 3\), got .*\(9, 9, 3\)",
        ),
        (lambda: video_patches(np.zeros((0, 9, 9, 3), np.uint8), TOWER, SPEC), PixelError, "at least one frame"),
        (lambda: video_patches(picture(1, 5000)[None], TOWER, SPEC), GridError, "aspect ratio"),
        (lambda: image_patches(picture(9, 9), TOWER, SPEC, 10**18, 10**19), PixelError, "over 178956970 in all; lower"),
    ],
)
def test_pixels_that_cannot_be_encoded_are_refused(call: Callable[[], Any], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        call()


def test_running_out_of_memory_is_an_error_of_this_image_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def resize(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.Image.Image.resize", resize)
    with pytest.raises(PixelError, match="not enough memory for 16 patches"):
        image_patches(picture(9, 9), TOWER, SPEC)
