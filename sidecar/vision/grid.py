"""An item's size in patches, and the rule that turns a picture's size into it. Pure geometry."""

from __future__ import annotations

import math
from typing import NamedTuple

from sidecar.vision.digits import apart
from sidecar.vision.spec import TowerSpec

# Qwen2-VL's limit on a picture's long side over its short side (`smart_resize` in transformers).
MAX_ASPECT_RATIO = 200


class GridError(ValueError):
    """A grid or a picture's size that the model cannot take."""


class Grid(NamedTuple):
    """(t, h, w) in patches: `t` counts pairs of frames (1 for an image), `h` and `w` patches of 14 pixels."""

    t: int
    h: int
    w: int

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w

    def tokens(self, spec: TowerSpec) -> int:
        """Rows of this item's embedding."""
        return self.patches // spec.merge_unit

    def check(self, spec: TowerSpec) -> Grid:
        """Return the grid itself if the tower can take it.

        Raises:
            GridError: if a side is below one merge unit or not a multiple of `spatial_merge_size`.
        """
        merge = spec.spatial_merge_size
        if self.t < 1 or self.h < merge or self.w < merge:
            raise GridError(f"grid {tuple(self)} is too small: t must be at least 1, h and w at least {merge}")
        if self.h % merge or self.w % merge:
            raise GridError(f"grid {tuple(self)} is odd: h and w must be multiples of spatial_merge_size {merge}")
        return self


def resized_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width in pixels after Qwen2-VL's resize: multiples of `factor`, area within the bounds, aspect ratio kept
    as nearly as that allows (`smart_resize` in transformers' image_processing_qwen2_vl).

    Raises:
        GridError: if a side is 0 or the aspect ratio is over 200.
    """
    if min(height, width) < 1:
        raise GridError(f"a picture of {width}×{height} pixels has no area")
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        shown, _ = apart(ratio, MAX_ASPECT_RATIO)
        raise GridError(
            f"a picture of {width}×{height} pixels has an aspect ratio of {shown}; the model takes at most {MAX_ASPECT_RATIO}"
        )
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width
