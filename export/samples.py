"""The pictures that accuracy is measured on: crops of three photos, cut so that every kind of grid occurs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from sidecar.vision.grid import Grid
from sidecar.vision.pixels import Patches, image_patches, video_patches
from sidecar.vision.spec import PixelSpec, TowerSpec

PHOTOS = Path(__file__).parent / "photos"
PHOTO_NAMES = ("astronaut-512x512.jpg", "cat-451x300.png", "coffee-600x400.webp")

# name, photo, height and width in tokens (28 pixels each where patches are 14), frames
_CUTS = (
    ("photo: portrait", 0, 10, 10, 1),
    ("photo: cat", 1, 8, 12, 1),
    ("photo: coffee", 2, 8, 12, 1),
    ("square, whole windows", 0, 8, 8, 1),
    ("wide", 2, 4, 14, 1),
    ("tall", 0, 14, 4, 1),
    ("very wide", 2, 2, 20, 1),
    ("ragged on both edges", 1, 7, 9, 1),
    ("one window", 0, 4, 4, 1),
    ("less than a window", 1, 2, 3, 1),
    ("small and ragged", 0, 5, 6, 1),
    ("video of four frames", 2, 6, 5, 4),
    ("small video", 2, 2, 3, 4),
)


# Those that are sealed as references: small, since every lane encodes them at each start; both kinds of window, and a video.
REFERENCES = ("small and ragged", "one window", "small video")


@dataclass(frozen=True, slots=True)
class Sample:
    name: str
    patches: Patches

    @property
    def grid(self) -> Grid:
        return self.patches.grid


def samples(tower: TowerSpec, pixels: PixelSpec) -> Iterator[Sample]:
    """Yield the samples, preprocessed as the sidecar would."""
    side = tower.patch_size * tower.spatial_merge_size
    photos = [np.asarray(Image.open(PHOTOS / name).convert("RGB")) for name in PHOTO_NAMES]
    for name, photo, token_h, token_w, frames in _CUTS:
        height, width = token_h * side, token_w * side
        if frames == 1:
            area = {"min_pixels": height * width, "max_pixels": height * width}
            picture = _fitted(photos[photo], height, width)
            yield Sample(name, image_patches(picture, tower, pixels, **area))
        else:
            area = {"min_pixels": height * width, "max_pixels": height * width}
            wide = _fitted(photos[photo], height, width + 8 * frames)
            moving = np.stack([wide[:, 8 * frame : 8 * frame + width] for frame in range(frames)])
            yield Sample(name, video_patches(moving, tower, pixels, **area))


def _fitted(photo: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """The photo's middle in the wanted shape, scaled to the wanted size."""
    scale = min(photo.shape[0] / height, photo.shape[1] / width)
    crop_h, crop_w = int(height * scale), int(width * scale)
    top, left = (photo.shape[0] - crop_h) // 2, (photo.shape[1] - crop_w) // 2
    crop = Image.fromarray(photo[top : top + crop_h, left : left + crop_w])
    return np.asarray(crop.resize((width, height), Image.Resampling.BICUBIC))
