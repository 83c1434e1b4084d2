"""What a client asks for: one image or video as the contract's `Item`. Knows nothing of connections or replies.

What can be seen to be wrong before anything is sent raises ValueError here. Whether bytes are an image at all, and
whether the tower takes the size, only the server can tell: it answers that item with an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sidecar.pb import encoder_pb2
from sidecar.vision.dtypes import DType
from sidecar.vision.grid import Grid

Item = encoder_pb2.Item

WIRE_DTYPES = {
    DType.UINT8: encoder_pb2.UINT8,
    DType.FLOAT32: encoder_pb2.FLOAT32,
    DType.FLOAT16: encoder_pb2.FLOAT16,
    DType.BFLOAT16: encoder_pb2.BFLOAT16,
}


def image_item(data: bytes, *, key: str = "", min_pixels: int | None = None, max_pixels: int | None = None) -> Item:
    """An encoded picture: JPEG, PNG, WEBP, … as read from a file.

    `key`, here and below, is the caller's name for the content (vLLM's mm_hash or uuid), by which it can be fetched; without one
    the server derives it. The answer is of this content, whatever the key has named before. `min_pixels` and
    `max_pixels` bound the area after resizing; None leaves the model's own.

    Raises:
        ValueError: if there are no bytes, or a bound is below 1.
    """
    if not data:
        raise ValueError("an encoded image must have at least one byte")
    return Item(key=key, image=bytes(data), **_bounds(min_pixels, max_pixels))


def rgb_image_item(
    rgb: npt.NDArray[np.uint8], *, key: str = "", min_pixels: int | None = None, max_pixels: int | None = None
) -> Item:
    """A decoded picture, uint8 of shape (height, width, 3).

    Raises:
        ValueError: if dtype or shape differ or a side is 0, or a bound is below 1.
    """
    height, width = _rgb_size("an RGB image", rgb, ("height", "width"))
    picture = encoder_pb2.RgbImage(height=height, width=width, data=rgb.tobytes())
    return Item(key=key, rgb_image=picture, **_bounds(min_pixels, max_pixels))


def rgb_video_item(
    frames: npt.NDArray[np.uint8], *, key: str = "", min_pixels: int | None = None, max_pixels: int | None = None
) -> Item:
    """A decoded video, uint8 of shape (frames, height, width, 3); the bounds hold for one frame.

    Raises:
        ValueError: if dtype or shape differ or a side is 0, or a bound is below 1.
    """
    count, height, width = _rgb_size("an RGB video", frames, ("frames", "height", "width"))
    video = encoder_pb2.RgbVideo(frames=count, height=height, width=width, data=frames.tobytes())
    return Item(key=key, rgb_video=video, **_bounds(min_pixels, max_pixels))


def patches_item(
    values: npt.NDArray[Any], grid: Grid, dtype: DType, *, single_slice: bool = False, key: str = ""
) -> Item:
    """Patches from the caller's own processor (its `pixel_values`), of shape (grid.patches, values per patch).

    `dtype` says what the array holds, because numpy cannot (bfloat16 comes as the uint16 of its bits) and because a
    wrong guess would give wrong embeddings in silence: UINT8 means pixels, 0…255; a float dtype means normalised.
    `single_slice`: each patch holds one of an image's equal temporal slices, half the values.

    Raises:
        ValueError: if array and dtype, rows and grid, or grid and single_slice do not fit together.
    """
    if values.dtype != dtype.storage:
        raise ValueError(f"patches in {dtype} must come as an array of {dtype.storage}, got {values.dtype}")
    if min(grid) < 1:
        raise ValueError(f"every side of grid {tuple(grid)} must be at least 1")
    if values.ndim != 2 or len(values) != grid.patches or not values.shape[1]:
        raise ValueError(f"grid {tuple(grid)} needs patches of shape ({grid.patches}, values), got {values.shape}")
    if single_slice and grid.t != 1:
        raise ValueError(f"only an image (t = 1) has equal temporal slices to send one of, got grid {tuple(grid)}")
    scale = encoder_pb2.Patches.PIXELS if dtype is DType.UINT8 else encoder_pb2.Patches.NORMALISED
    patches = encoder_pb2.Patches(
        grid=encoder_pb2.Grid(t=grid.t, h=grid.h, w=grid.w),
        dtype=WIRE_DTYPES[dtype],
        data=values.tobytes(),
        scale=scale,
        single_slice=single_slice,
    )
    return Item(key=key, patches=patches)


def _rgb_size(what: str, pixels: npt.NDArray[Any], axes: tuple[str, ...]) -> tuple[int, ...]:
    if pixels.dtype != np.uint8 or pixels.ndim != len(axes) + 1 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ValueError(
            f"{what} must be uint8 of shape ({', '.join(axes)}, 3) with no side 0, got {pixels.dtype} {pixels.shape}"
        )
    return pixels.shape[:-1]


def _bounds(min_pixels: int | None, max_pixels: int | None) -> dict[str, Any]:
    for name, bound in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if bound is not None and bound < 1:
            raise ValueError(f"{name} must be at least 1, got {bound}")
    return {"min_pixels": min_pixels or 0, "max_pixels": max_pixels or 0}
