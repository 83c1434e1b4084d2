"""A small picture in every form in which it may be sent."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from sidecar.items import patches_item
from sidecar.pb import encoder_pb2 as pb
from sidecar.vision.dtypes import DType, from_float32
from sidecar.vision.grid import Grid
from sidecar.vision.pixels import image_patches
from sidecar.vision.spec import PixelSpec, TowerSpec

PHOTOS = Path(__file__).parents[2] / "export" / "photos"
ASTRONAUT, CAT, COFFEE = (PHOTOS / name for name in ("astronaut-512x512.jpg", "cat-451x300.png", "coffee-600x400.webp"))

# The toy's numbers that pixels depend on; test_info holds them against what the server says.
TOWER = TowerSpec(
    depth=4,
    hidden_size=64,
    num_heads=4,
    intermediate_size=100,
    out_hidden_size=128,
    fullatt_block_indexes=(1, 3),
)
PIXELS = PixelSpec()
PATCH_WIDTH = TOWER.patch_width

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Number = TypeVar("Number", np.uint8, np.float32)


def picture(height: int = 84, width: int = 112, seed: int = 0) -> Bytes:
    """Noise whose sides are multiples of 28, so that nothing resizes it."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(rgb: Bytes, image_format: str = "PNG") -> bytes:
    buffer = BytesIO()
    Image.fromarray(rgb).save(buffer, image_format)
    return buffer.getvalue()


def patches_of(rgb: Bytes) -> tuple[Bytes, Grid]:
    """uint8 patches (N, 1176) as a caller's own processor makes them."""
    patches = image_patches(rgb, TOWER, PIXELS)
    return patches.values.astype(np.uint8), patches.grid


def one_slice(values: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """Patches (N, 1176) without the second of their equal temporal slices."""
    slices = values.reshape(len(values), TOWER.in_channels, TOWER.temporal_patch_size, -1)
    return slices[:, :, 0].reshape(len(values), -1)


def normalised(values: Bytes) -> Floats:
    """As Qwen2-VL's processor does: ÷ 255, less the mean, over the deviation."""
    channels = values.reshape(len(values), TOWER.in_channels, -1).astype(np.float32)
    mean, deviation = (np.array(numbers, np.float32)[:, None] for numbers in (PIXELS.image_mean, PIXELS.image_std))
    return ((channels / np.float32(255) - mean) / deviation).reshape(values.shape)


def normalised_item(values: Floats, grid: Grid, dtype: DType, *, single_slice: bool = False) -> pb.Item:
    return patches_item(from_float32(values, dtype), grid, dtype, single_slice=single_slice)


def png_header(width: int, height: int) -> bytes:
    """A PNG of this size with next to nothing behind its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def webp_header(width: int, height: int) -> bytes:
    """An extended WEBP of this size with a picture of 1×1 in it."""
    inside = encoded(np.zeros((1, 1, 3), np.uint8), "WEBP")[12:]
    canvas = b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(canvas)) + canvas + inside
    return b"RIFF" + struct.pack("<I", len(body)) + body
