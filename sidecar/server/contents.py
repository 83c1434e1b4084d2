"""From an `Item` of the contract to patches. Runs on the preprocessing threads, never on the event loop.

What a field means is what the message says; nothing is guessed from lengths or values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sidecar.errors import InvalidItem, TooLarge
from sidecar.pb import encoder_pb2
from sidecar.vision.dtypes import DType
from sidecar.vision.grid import Grid
from sidecar.vision.images import decode_image, image_size
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
_CONTENTS = "image, rgb_image, rgb_video or patches"
_SCALES = (encoder_pb2.Patches.PIXELS, encoder_pb2.Patches.NORMALISED)

# The key comes back beside the embedding, in one message that must stay under gRPC's default limit of 4 MB.
MAX_KEY_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Preprocessor:
    """Turns items into patches within a server's limits."""

    tower: TowerSpec
    pixels: PixelSpec
    max_image_pixels: int
    max_item_patches: int

    def patches(self, item: encoder_pb2.Item) -> Patches:
        """Decode, resize and cut an item.

        Raises:
            InvalidItem: if the message contradicts itself or is over a limit.
            PixelError, GridError: if its content cannot be encoded.
        """
        if (length := len(item.key.encode())) > MAX_KEY_BYTES:
            raise InvalidItem(f"the key has {length} bytes; at most {MAX_KEY_BYTES} are taken, send a hash instead")
        kind = item.WhichOneof("content")
        if kind is None:
            raise InvalidItem(f"the item has no content: set one of {_CONTENTS}")
        if kind == "patches":
            if item.min_pixels or item.max_pixels:
                raise InvalidItem("min_pixels and max_pixels do not apply to patches, which are resized already")
            return self._given(item.patches)
        if item.min_pixels > (bound := max(self.pixels.max_pixels, self.pixels.video_max_pixels)):
            raise InvalidItem(
                f"min_pixels is {item.min_pixels}; it may not be over the model's own max_pixels, {bound}"
            )
        model = (self.tower, self.pixels, item.min_pixels or None, item.max_pixels or None)
        if kind == "rgb_video":
            video = item.rgb_video
            self._check_size(video.frames, video.height, video.width)
            frames = _pixels(video.data, (video.frames, video.height, video.width))
            self._check_grid(video_grid(video.frames, video.height, video.width, *model))
            return video_patches(frames, *model)
        if kind == "image":
            most = min(self.max_image_pixels, MAX_IMAGE_PIXELS)
            # The grid is judged by the header first: a picture that is refused is not worth decoding.
            height, width = image_size(item.image, max_image_pixels=most)
            self._check_grid(image_grid(height, width, *model))
            rgb = decode_image(item.image, max_image_pixels=most)
        else:
            self._check_size(1, item.rgb_image.height, item.rgb_image.width)
            rgb = _pixels(item.rgb_image.data, (item.rgb_image.height, item.rgb_image.width))
        height, width, _ = rgb.shape
        self._check_grid(image_grid(height, width, *model))
        return image_patches(rgb, *model)

    def _given(self, patches: encoder_pb2.Patches) -> Patches:
        grid = Grid(patches.grid.t, patches.grid.h, patches.grid.w).check(self.tower)
        self._check_grid(grid)
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
        values = np.frombuffer(patches.data, dtype.storage).reshape(grid.patches, width)
        return given_patches(values, grid, self.tower, self.pixels, normalised=normalised)

    def _check_size(self, frames: int, height: int, width: int) -> None:
        if height * width > self.max_image_pixels:
            raise TooLarge(
                f"a picture of {width}×{height} pixels is over this server's limit of {self.max_image_pixels}"
            )
        if frames * height * width == 0:
            raise InvalidItem(f"a picture must have an area, got {frames} frames of {width}×{height} pixels")

    def _check_grid(self, grid: Grid) -> None:
        if grid.patches > self.max_item_patches:
            raise TooLarge(
                f"the item has {grid.patches} patches, this server takes {self.max_item_patches}; ask for fewer with max_pixels"
            )


def _pixels(data: bytes, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    expected = math.prod(shape) * 3
    if len(data) != expected:
        raise InvalidItem(f"RGB data must be {expected} bytes for {'×'.join(map(str, shape))}×3, got {len(data)}")
    return np.frombuffer(data, np.uint8).reshape(*shape, 3)
