"""Photo-like pictures that differ, by the ten thousand. Knows pixels and formats, and nothing of requests.

A picture is made once for each size, and a number is drawn into its bottom edge as a bar code of saturated colours, which
resizing and JPEG leave apart. All above that edge is encoded once: a `Plate` keeps it as bytes, and printing a number encodes
the edge alone.

    jpeg      a restart marker ends each row of blocks (ITU-T T.81, E.1.4): the last row follows as one of its own
    png       the edge's rows continue the deflate stream from a copy of the compressor's state
    rgb       rows follow rows
    patches   rows of merged patches follow one another in merge order
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from sidecar.client import Item, image_item
from sidecar.pb import encoder_pb2
from sidecar.vision.grid import resized_size

Rgb = npt.NDArray[np.uint8]  # (height, width, 3)

FORMATS = ("jpeg", "png", "rgb", "patches")
MIN_SIDE = 28  # pixels: what becomes one token

_JPEG_QUALITY = 90
_EDGE_ROWS = 16  # a row of JPEG blocks, chroma at half size (4:2:0)
_JPEG_RESTARTS = tuple(bytes((0xFF, 0xD0 + index)) for index in range(8))
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
_BARS = 11  # of eight colours each, so that numbers up to 2³³ differ and a bar is wider than a pixel


class Size(NamedTuple):
    """A picture's size in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}×{self.height}"


@dataclass(frozen=True, slots=True)
class PatchRules:
    """How a server's model cuts pictures, as its Info says: sides and bounds in pixels."""

    patch_size: int
    merge: int
    min_pixels: int
    max_pixels: int

    @classmethod
    def of(cls, info: encoder_pb2.InfoResponse) -> PatchRules:
        tower, pixels = info.tower, info.pixels
        return cls(tower.patch_size, tower.spatial_merge_size, pixels.min_pixels, pixels.max_pixels)

    @property
    def token_side(self) -> int:
        return self.patch_size * self.merge

    def resized(self, size: Size) -> Size:
        """Raises GridError where the model takes no picture of that size."""
        bounds = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        height, width = resized_size(size.height, size.width, factor=self.token_side, **bounds)
        return Size(width, height)


@dataclass(frozen=True, slots=True)
class Plate:
    """A picture without its bottom edge; `item(number)` is the whole, different for every number below 2³³."""

    _edge: Rgb
    _encode: Callable[[Rgb], Item]

    def item(self, number: int) -> Item:
        return self._encode(with_bar_code(self._edge, number))


def plate(size: Size, picture_format: str, rules: PatchRules, seed: int) -> Plate:
    """The picture of a size and a seed, ready for numbers.

    Raises:
        GridError: if the format is `patches` and the model takes no picture of that size.
    """
    if picture_format == "patches":
        picture = photo_like(rules.resized(size), seed)
        return _patches_plate(picture, rules)
    picture = photo_like(size, seed)
    above = (size.height - 1) // _EDGE_ROWS * _EDGE_ROWS
    make = {"jpeg": _jpeg_encoder, "png": _png_encoder, "rgb": _rgb_encoder}[picture_format]
    return Plate(picture[above:], make(picture, above))


def photo_like(size: Size, seed: int) -> Rgb:
    """Soft shapes of every scale with some grain, whose amplitude falls with the frequency so that they compress as photos do."""
    random = np.random.default_rng((seed, size.width, size.height))
    values = np.full((size.height, size.width, 3), 128.0, np.float32)
    cells, amplitude = 2, 60.0
    while cells < max(size):
        rows, columns = (min(cells, side) for side in (size.height, size.width))
        noise = Image.fromarray((random.random((rows, columns, 3)) * 255).astype(np.uint8))
        values += (np.asarray(noise.resize(size, Image.Resampling.BICUBIC), np.float32) - 127.5) * (amplitude / 127.5)
        cells, amplitude = cells * 2, amplitude * 0.8
    return values.clip(0, 255).astype(np.uint8)


def with_bar_code(edge: Rgb, number: int) -> Rgb:
    """The edge of a picture, (rows, width, 3), its lower half behind the number in base 8: lowest digit left, and to each
    digit a colour of red, green and blue fully on or off. The upper half stays, for where the edge is all that there is.
    """
    digits = number >> 3 * np.arange(_BARS)
    colours = (digits[:, None] >> np.arange(3) & 1).astype(np.uint8) * 255
    columns = np.arange(edge.shape[1]) * _BARS // edge.shape[1]
    coded = edge.copy()
    coded[len(edge) // 2 :] = colours[columns]
    return coded


def _jpeg(picture: Rgb) -> bytes:
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling="4:2:0", restart_marker_rows=1)
    return buffer.getvalue()


def _jpeg_encoder(picture: Rgb, above: int) -> Callable[[Rgb], Item]:
    whole = _jpeg(picture)
    # A picture of one row of blocks has no restart marker, and all of it is edge.
    head = whole[: max(whole.rfind(marker) for marker in _JPEG_RESTARTS) + 2] if above else b""

    def encode(edge: Rgb) -> Item:
        alone = _jpeg(edge)
        if not head:
            return image_item(alone)
        scan = alone.index(_JPEG_SCAN) + 2
        data = scan + int.from_bytes(alone[scan : scan + 2], "big")
        return image_item(head + alone[data:])

    return encode


def _png_encoder(picture: Rgb, above: int) -> Callable[[Rgb], Item]:
    height, width, _ = picture.shape
    compressor = zlib.compressobj(level=1)
    begun = compressor.compress(_png_rows(picture[:above])) + compressor.flush(zlib.Z_SYNC_FLUSH)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # eight bits, RGB
    head = b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", begun)

    def encode(edge: Rgb) -> Item:
        rest = compressor.copy()
        data = rest.compress(_png_rows(edge)) + rest.flush()
        return image_item(head + _png_chunk(b"IDAT", data) + _png_chunk(b"IEND", b""))

    return encode


def _png_rows(rows: Rgb) -> bytes:
    """Each behind the number of its filter, 0: none."""
    return np.pad(rows.reshape(len(rows), -1), ((0, 0), (1, 0))).tobytes()


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _rgb_encoder(picture: Rgb, above: int) -> Callable[[Rgb], Item]:
    height, width, _ = picture.shape
    head = picture[:above].tobytes()

    def encode(edge: Rgb) -> Item:
        return Item(rgb_image=encoder_pb2.RgbImage(height=height, width=width, data=head + edge.tobytes()))

    return encode


def _patches_plate(picture: Rgb, rules: PatchRules) -> Plate:
    """Patches as uint8 pixels, one temporal slice of each: a quarter of what normalised bfloat16 patches weigh."""
    above = len(picture) - rules.token_side
    grid = encoder_pb2.Grid(t=1, h=len(picture) // rules.patch_size, w=picture.shape[1] // rules.patch_size)
    head = _cut(picture[:above], rules)

    def encode(edge: Rgb) -> Item:
        data = head + _cut(edge, rules)
        return Item(
            patches=encoder_pb2.Patches(
                grid=grid,
                dtype=encoder_pb2.UINT8,
                data=data,
                scale=encoder_pb2.Patches.PIXELS,
                single_slice=True,
            )
        )

    return Plate(picture[above:], encode)


def _cut(picture: Rgb, rules: PatchRules) -> bytes:
    """Patches in merge order, (h/merge, w/merge, merge, merge), each of channels × patch_size × patch_size."""
    rows, columns = picture.shape[0] // rules.token_side, picture.shape[1] // rules.token_side
    sides = (rules.merge, rules.patch_size)
    return picture.reshape(rows, *sides, columns, *sides, 3).transpose(0, 3, 1, 4, 6, 2, 5).tobytes()
