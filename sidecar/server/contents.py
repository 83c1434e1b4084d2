"""From an `Item` of the contract to its size, and from there to patches.

Opening an item reads a picture's header at most; preparing it decodes, resizes and cuts.

What a field means is what the message says; nothing is guessed from lengths or values.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from sidecar.engine.order import Opened, Prepared
from sidecar.errors import InvalidItem, TooLarge
from sidecar.pb import encoder_pb2
from sidecar.vision.dtypes import Array, DType
from sidecar.vision.grid import Grid
from sidecar.vision.images import image_header, load_image
from sidecar.vision.pixels import (
    MAX_IMAGE_PIXELS,
    Patches,
    given_patches,
    image_grid,
    image_patches,
    video_grid,
    video_patches,
)
from sidecar.vision.spec import PixelSpec, TowerSpec

_DTYPES = {
    encoder_pb2.UINT8: DType.UINT8,
    encoder_pb2.FLOAT32: DType.FLOAT32,
    encoder_pb2.FLOAT16: DType.FLOAT16,
    encoder_pb2.BFLOAT16: DType.BFLOAT16,
}
_CONTENTS = "image, url, rgb_image, rgb_video or patches"
_SCALES = (encoder_pb2.Patches.PIXELS, encoder_pb2.Patches.NORMALISED)

_PILLOW_BYTES = 4  # a pixel

_Decoded = TypeVar("_Decoded")
_Model = tuple[TowerSpec, PixelSpec, int | None, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessor:
    """Turns items into patches within a server's limits."""

    tower: TowerSpec
    pixels: PixelSpec
    max_image_pixels: int
    max_frames: int
    max_item_patches: int

    def open(self, item: encoder_pb2.Item) -> Opened:
        """An item's size, and how to prepare it. For an encoded picture this reads the header, which takes time; for any other
        content it is arithmetic.

        Raises:
            InvalidItem: if the message contradicts itself or is over a limit.
            PixelError, GridError: if its content cannot be encoded.
        """
        kind = item.WhichOneof("content")
        if kind is None:
            raise InvalidItem(f"the item has no content: set one of {_CONTENTS}")
        if kind == "patches":
            if item.min_pixels or item.max_pixels:
                raise InvalidItem("min_pixels and max_pixels do not apply to patches, which are resized already")
            return self._open_patches(item.patches)
        if item.min_pixels > (bound := max(self.pixels.max_pixels, self.pixels.video_max_pixels)):
            raise InvalidItem(
                f"min_pixels is {item.min_pixels}; it may not be over the model's own max_pixels, {bound}"
            )
        model = (self.tower, self.pixels, item.min_pixels or None, item.max_pixels or None)
        if kind == "rgb_video":
            return self._open_video(item.rgb_video, model)
        if kind == "rgb_image":
            picture = item.rgb_image
            self._check_size(picture.height, picture.width)
            grid = self._checked(image_grid(picture.height, picture.width, *model))
            _check_length(picture.data, (picture.height, picture.width))

            def rgb() -> npt.NDArray[np.uint8]:
                return _pixels(picture.data, (picture.height, picture.width))

            memory = self._memory(grid, len(picture.data), picture.height * picture.width)
            return Opened(grid, _timed(rgb, lambda pixels: image_patches(pixels, *model)), memory_bytes=memory)
        most = min(self.max_image_pixels, MAX_IMAGE_PIXELS)
        # The grid is judged by the header: a picture that is refused is not worth decoding.
        header = image_header(item.image, max_image_pixels=most)
        height, width = header.height, header.width
        grid = self._checked(image_grid(height, width, *model))
        return Opened(
            grid,
            _timed(lambda: load_image(item.image, max_image_pixels=most), lambda pixels: image_patches(pixels, *model)),
            decoded_pixels=height * width,
            memory_bytes=header.decode_bytes + self._memory(grid, len(item.image), 0),
        )

    def _open_video(self, video: encoder_pb2.RgbVideo, model: _Model) -> Opened:
        if video.frames > self.max_frames:
            raise TooLarge(f"the video has {video.frames} frames, this server takes {self.max_frames}")
        self._check_size(video.height, video.width, video.frames)
        grid = self._checked(video_grid(video.frames, video.height, video.width, *model))
        shape = (video.frames, video.height, video.width)
        _check_length(video.data, shape)
        return Opened(
            grid,
            _timed(lambda: _pixels(video.data, shape), lambda frames: video_patches(frames, *model)),
            memory_bytes=self._memory(grid, len(video.data), video.height * video.width),
        )

    def _open_patches(self, patches: encoder_pb2.Patches) -> Opened:
        grid = self._checked(Grid(patches.grid.t, patches.grid.h, patches.grid.w).check(self.tower))
        if patches.scale not in _SCALES:
            raise InvalidItem("patches.scale must say PIXELS (0…255) or NORMALISED; it is never guessed")
        dtype = _DTYPES.get(patches.dtype)
        if dtype is None:
            raise InvalidItem("patches.dtype must be one of UINT8, FLOAT32, FLOAT16, BFLOAT16")
        normalised = patches.scale == encoder_pb2.Patches.NORMALISED
        if normalised == (dtype is DType.UINT8):
            wanted = "FLOAT32, FLOAT16 or BFLOAT16" if normalised else "UINT8"
            raise InvalidItem(f"patches of this scale must have dtype {wanted}, got {dtype.name}")
        if patches.single_slice and grid.t != 1:
            raise InvalidItem(f"single_slice is for images, whose grid has t = 1; this grid is {tuple(grid)}")
        width = self.tower.image_patch_width if patches.single_slice else self.tower.patch_width
        expected = grid.patches * width * dtype.storage.itemsize
        if len(patches.data) != expected:
            raise InvalidItem(
                f"patches.data must be {expected} bytes, {grid.patches} patches of {width} {dtype.name} values for the grid "
                f"{tuple(grid)}, got {len(patches.data)}"
            )

        def given() -> Array:
            return np.frombuffer(patches.data, dtype.storage).reshape(grid.patches, width)

        return Opened(
            grid,
            _timed(given, lambda values: given_patches(values, grid, self.tower, self.pixels, normalised=normalised)),
            # Normalised ones are brought back both to float32 and to uint8.
            memory_bytes=self._memory(grid, expected, 0) * (5 if normalised else 1),
        )

    def _memory(self, grid: Grid, sent_bytes: int, pixels: int) -> int:
        """What preparing holds: the bytes sent, one picture of so many pixels as Pillow lays it out, and the patches."""
        return sent_bytes + pixels * _PILLOW_BYTES + grid.patches * self.tower.patch_width

    def _check_size(self, height: int, width: int, frames: int = 1) -> None:
        if height * width > self.max_image_pixels:
            raise TooLarge(
                f"a picture of {width}×{height} pixels is over this server's limit of {self.max_image_pixels}"
            )
        if frames * height * width == 0:
            raise InvalidItem(f"a picture must have an area, got {frames} frames of {width}×{height} pixels")

    def _checked(self, grid: Grid) -> Grid:
        if grid.patches > self.max_item_patches:
            raise TooLarge(
                f"the item has {grid.patches} patches, this server takes {self.max_item_patches}; ask for fewer with max_pixels"
            )
        return grid


def _check_length(data: bytes, shape: tuple[int, ...]) -> None:
    expected = math.prod(shape) * 3
    if len(data) != expected:
        raise InvalidItem(f"RGB data must be {expected} bytes for {'×'.join(map(str, shape))}×3, got {len(data)}")


def _pixels(data: bytes, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).reshape(*shape, 3)


def _timed(decode: Callable[[], _Decoded], preprocess: Callable[[_Decoded], Patches]) -> Callable[[], Prepared]:
    def prepare() -> Prepared:
        begun = time.perf_counter()
        decoded = decode()
        halfway = time.perf_counter()
        patches = preprocess(decoded)
        return Prepared(patches, (halfway - begun) * 1e3, (time.perf_counter() - halfway) * 1e3)

    return prepare
