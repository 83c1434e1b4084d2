"""RGB pixels → patches: resized as Qwen2-VL's processors do, cut into 14×14 patches, in merge order. Pure functions.

Patches stay uint8: normalisation is the tower's first step, so that what waits in queues and travels between processes
is a quarter of the size, and nobody has to guess whether it was done already. Callers who made patches themselves hand
them to `given_patches`, which brings normalised ones back to pixels.

The reference is transformers' Qwen2VLImageProcessorPil with do_rescale and do_normalize off, matched bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sidecar.vision.dtypes import bfloat16_to_float32
from sidecar.vision.grid import Grid, resized_size
from sidecar.vision.spec import PixelSpec, TowerSpec

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# No image has more pixels, before or after resizing, whatever a caller allows: here lie vLLM's default
# (VLLM_MAX_IMAGE_PIXELS) and the end of what Pillow's WEBP and TIFF readers take at all.
MAX_IMAGE_PIXELS = 178_956_970

# Bits in the significand of each dtype in which normalised patches may be sent; uint16 holds the bits of bfloat16.
_SIGNIFICAND_BITS = {np.dtype(np.float32): 24, np.dtype(np.float16): 11, np.dtype(np.uint16): 8}
# What float32 arithmetic may add to a pixel on its way there and back, as a part of white (8 units in the last place).
# Processors round differently: transformers with Pillow computes (x·r - mean) / std, with torchvision
# (x - mean/r) / (std/r), and vLLM on its device x·(r/std) - mean/std.
_ARITHMETIC_SLACK = 2.0**-21
# Rows of patches brought back to pixels at a time, so that the intermediate arrays stay in the processor's cache.
_ROWS_AT_A_TIME = 128


class PixelError(ValueError):
    """Pixels, or bytes that should be pixels, that cannot be encoded; the message says why and what would do."""


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """One item, ready for the tower.

    `values` (N, patch_width) in pixel units, 0…255: uint8, or float32 where a caller's pixels were no whole numbers.
    Inside a patch C, T, P, P; patches in merge order (t, h/merge, w/merge, merge, merge). It may be read-only.
    """

    values: Bytes | Floats
    grid: Grid


def image_grid(
    height: int,
    width: int,
    tower: TowerSpec,
    pixels: PixelSpec,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Grid:
    """The grid that `image_patches` would give an image of this size, at no cost: what admission can go by.

    Raises:
        GridError: if the size has no area or an aspect ratio over 200.
        PixelError: if a bound is below 1 or asks for an image of over `MAX_IMAGE_PIXELS`.
    """
    return _grid(1, height, width, tower, _bounds(pixels.min_pixels, pixels.max_pixels, min_pixels, max_pixels))


def video_grid(
    frames: int,
    height: int,
    width: int,
    tower: TowerSpec,
    pixels: PixelSpec,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Grid:
    """The grid that `video_patches` would give `frames` frames of this size. Raises as `image_grid` does."""
    bounds = _bounds(pixels.video_min_pixels, pixels.video_max_pixels, min_pixels, max_pixels)
    return _grid(frames, height, width, tower, bounds)


def image_patches(
    rgb: Bytes | Image.Image,
    tower: TowerSpec,
    pixels: PixelSpec,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Patches:
    """Resize one image, uint8 of shape (height, width, 3) or Pillow's in mode RGB, and cut it up; all temporal slices of a patch
    are equal.

    `min_pixels` and `max_pixels` replace the bounds in `pixels` for this call. As in transformers, an area over the
    upper bound is shrunk without regard to the lower. Large bounds are costly: whoever takes them from strangers asks
    `image_grid` first.

    Raises:
        PixelError: if the array is not RGB in uint8, a bound is below 1 or asks for over `MAX_IMAGE_PIXELS`, or memory
            runs out.
        GridError: if the image has no area or an aspect ratio over 200.
    """
    if isinstance(rgb, Image.Image):
        width, height = rgb.size
    else:
        _check_rgb("an image", rgb, ("height", "width"), tower)
        height, width, _ = rgb.shape
    return _cut([rgb], image_grid(height, width, tower, pixels, min_pixels, max_pixels), tower)


def video_patches(
    frames: Bytes,
    tower: TowerSpec,
    pixels: PixelSpec,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Patches:
    """Resize a video's frames, uint8 of shape (frames, height, width, 3), one by one and cut them up.

    Which frames to take of a film is the caller's choice. The last one is repeated until `temporal_patch_size` divides
    their number, and the bounds (`video_min_pixels`, `video_max_pixels`, or those given here) hold for one frame, as in
    transformers' Qwen2VLVideoProcessor. That one resizes with torchvision's bicubic on uint8, this one with Pillow's:
    the two differ by a level or two in some pixels.

    Raises as `image_patches` does.
    """
    _check_rgb("a video", frames, ("frames", "height", "width"), tower)
    count, height, width, _ = frames.shape
    return _cut(frames, video_grid(count, height, width, tower, pixels, min_pixels, max_pixels), tower)


def given_patches(
    values: npt.NDArray[Any], grid: Grid, tower: TowerSpec, pixels: PixelSpec, *, normalised: bool
) -> Patches:
    """Take patches that the caller's own processor made: (N, patch_width) or, for an image, whose temporal slices are
    all the same, (N, image_patch_width) with one of them.

    Not normalised they are uint8. Normalised they are float32, float16, or uint16 holding the bits of bfloat16, and are
    brought back to pixels: to uint8 where that loses nothing, which means that every value is what some whole pixel
    from 0 to 255 gives when it is normalised and rounded to the dtype it was sent in (give or take the last places of
    float32, in which processors differ); else to float32, x · std / rescale_factor + mean / rescale_factor.

    Raises:
        GridError: if the tower cannot take the grid.
        PixelError: if shape, dtype or number of patches do not fit, or normalised values are not finite or far from any
            pixel.
    """
    count = grid.check(tower).patches
    if normalised and values.dtype not in _SIGNIFICAND_BITS:
        raise PixelError(
            f"normalised patches must be float32, float16 or uint16 holding the bits of bfloat16, got {values.dtype}"
        )
    if not normalised and values.dtype != np.uint8:
        raise PixelError(f"patches that are not normalised must be uint8, got {values.dtype}")
    if values.ndim != 2 or values.shape[1] not in (tower.patch_width, tower.image_patch_width):
        raise PixelError(
            f"patches must have the shape (patches, {tower.patch_width}), or (patches, {tower.image_patch_width}) for "
            f"an image sent as one temporal slice; got {values.shape}"
        )
    if values.shape[1] != tower.patch_width and grid.t != 1:
        raise PixelError(
            f"patches of {values.shape[1]} values hold one temporal slice, which only an image (t = 1) may send; grid "
            f"{tuple(grid)} needs {tower.patch_width}"
        )
    if len(values) != count:
        raise PixelError(f"grid {tuple(grid)} means {count} patches, but {len(values)} were sent")
    if normalised:
        values = _denormalised(values, tower, pixels)
    if values.shape[1] != tower.patch_width:
        slices = values.reshape(count, tower.in_channels, 1, -1)
        values = np.repeat(slices, tower.temporal_patch_size, axis=2).reshape(count, tower.patch_width)
    return Patches(np.ascontiguousarray(values), grid)


def _bounds(low: int, high: int, min_pixels: int | None, max_pixels: int | None) -> tuple[int, int]:
    for name, bound in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if bound is not None and bound < 1:
            raise PixelError(f"{name} must be at least 1, got {bound}")
    return low if min_pixels is None else min_pixels, high if max_pixels is None else max_pixels


def _grid(frames: int, height: int, width: int, tower: TowerSpec, bounds: tuple[int, int]) -> Grid:
    patch = tower.patch_size
    new_height, new_width = resized_size(
        height, width, factor=patch * tower.spatial_merge_size, min_pixels=bounds[0], max_pixels=bounds[1]
    )
    if new_height * new_width > MAX_IMAGE_PIXELS:
        raise PixelError(
            f"min_pixels {bounds[0]} and max_pixels {bounds[1]} make {width}×{height} pixels {new_width}×{new_height}, "
            f"over {MAX_IMAGE_PIXELS} in all; lower them"
        )
    return Grid(-(-frames // tower.temporal_patch_size), new_height // patch, new_width // patch)


def _check_rgb(what: str, pixels: npt.NDArray[Any], axes: tuple[str, ...], tower: TowerSpec) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != len(axes) + 1 or pixels.shape[-1] != tower.in_channels:
        raise PixelError(
            f"{what} must be RGB in uint8 of shape ({', '.join(axes)}, {tower.in_channels}), got {pixels.dtype} of "
            f"shape {pixels.shape}"
        )
    if pixels.shape[0] == 0 and axes[0] == "frames":
        raise PixelError(f"{what} needs at least one frame, got none")


def _cut(frames: Sequence[Bytes | Image.Image] | Bytes, grid: Grid, tower: TowerSpec) -> Patches:
    """Resize frames (frames, H, W, C) to the grid's size and write each once, to where its patches belong."""
    merge, patch, slices = tower.spatial_merge_size, tower.patch_size, tower.temporal_patch_size
    blocks = (grid.h // merge, grid.w // merge)
    try:
        values = np.empty((grid.patches, tower.patch_width), np.uint8)
        places = values.reshape(grid.t, *blocks, merge, merge, tower.in_channels, slices, patch, patch)
        for index, frame in enumerate(frames):
            first = index % slices
            # The last frame also fills the slices that are left; an image is a video of one frame.
            beyond = slices if index == len(frames) - 1 else first + 1
            resized = _resized(frame, grid.h * patch, grid.w * patch)
            cut = resized.reshape(blocks[0], merge, patch, blocks[1], merge, patch, tower.in_channels)
            cut = cut.transpose(0, 3, 1, 4, 6, 2, 5)
            places[index // slices, ..., first:beyond, :, :] = cut[..., None, :, :]
    except MemoryError as error:
        raise PixelError(f"not enough memory for {grid.patches} patches; lower max_pixels") from error
    return Patches(values, grid)


def _resized(rgb: Bytes | Image.Image, height: int, width: int) -> Bytes:
    if isinstance(rgb, np.ndarray):
        if rgb.shape[:2] == (height, width):
            return rgb
        rgb = Image.fromarray(rgb)
    return np.asarray(rgb.resize((width, height), Image.Resampling.BICUBIC))


def _denormalised(values: npt.NDArray[Any], tower: TowerSpec, pixels: PixelSpec) -> Bytes | Floats:
    """Normalised patches (N, C·…) in pixel units; see `given_patches`."""
    scale = (np.array(pixels.image_std) / pixels.rescale_factor).astype(np.float32)[:, None]
    offset = (np.array(pixels.image_mean) / pixels.rescale_factor).astype(np.float32)[:, None]
    # Half the distance between neighbours in the sent dtype, over the distance between neighbours in float32.
    half_step = np.float32(2.0 ** (24 - _SIGNIFICAND_BITS[values.dtype]) / 2)
    slack = np.float32(_ARITHMETIC_SLACK / pixels.rescale_factor)
    whole = np.empty(values.shape, np.uint8)
    exact = np.empty(values.shape, np.float32)
    lossless = True
    for start in range(0, len(values), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        sent = bfloat16_to_float32(values[rows]) if values.dtype == np.uint16 else values[rows].astype(np.float32)
        sent = sent.reshape(len(sent), tower.in_channels, -1)
        with np.errstate(over="ignore", invalid="ignore"):
            units = sent * scale + offset
        low, high = units.min(), units.max()
        if not (low >= -255 and high <= 510):  # NaN fails here too
            raise PixelError(
                "normalised patches must be finite and stand for pixels of about 0…255, these stand for "
                f"{low!s} to {high!s}: were they normalised, and with this checkpoint's image_mean and image_std?"
            )
        exact[rows] = units.reshape(len(units), -1)
        if lossless:
            nearest = np.clip(np.rint(units), 0, 255)
            tolerance = np.spacing(np.abs(sent)) * (half_step * scale) + slack
            lossless = bool((np.abs(units - nearest) <= tolerance).all())
            whole[rows] = nearest.reshape(len(units), -1)
    return whole if lossless else exact
