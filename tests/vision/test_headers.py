"""Pictures whose header or decoder could be made to take seconds or gigabytes are refused before that; honest ones are taken."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from sidecar.vision.images import decode_image, image_header, image_size
from sidecar.vision.pixels import PixelError

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def tags(entries: list[tuple[int, int, list[int]]], behind: bytes = b"") -> bytes:
    """A TIFF of one directory: (tag, type, values), types 3 (SHORT) and 4 (LONG)."""
    position = 8 + 2 + 12 * len(entries) + 4
    directory, values = struct.pack("<H", len(entries)), b""
    for tag, kind, numbers in entries:
        packed = struct.pack(f"<{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        place = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", position + len(values))
        values += packed if len(packed) > 4 else b""
        directory += struct.pack("<HHI", tag, kind, len(numbers)) + place
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + values + behind


def grey_tiff(width: int, height: int, *pieces: tuple[int, int, list[int]]) -> bytes:
    plain = [(256, 4, [width]), (257, 4, [height]), (258, 3, [8]), (259, 3, [1]), (262, 3, [1]), (277, 3, [1])]
    return tags([*plain, *pieces], bytes(4096))


def shared_tags(count: int, size: int) -> bytes:
    """A directory of tags that all name the same bytes, each of which a reader copies."""
    entries = b"".join(struct.pack("<HHII", 0x9000 + index, 7, size, 8) for index in range(count))
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", count) + entries + bytes(size)


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0))
    pixels = (b"IDAT", zlib.compress(bytes(20)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in (header, *chunks, pixels, (b"IEND", b"")))


def run_lengths(side: int, body: bytes) -> bytes:
    """A BMP compressed by run lengths."""
    start = 14 + 40 + 1024
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + header + bytes(1024) + body


def jpeg(*segments: bytes) -> bytes:
    whole = encoded(Image.new("RGB", (8, 8)), "JPEG")
    return JPEG_START + b"".join(segments) + whole[2:]


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


TINY = 300_000
HOSTILE = {
    "TIFF of tiles of one pixel": grey_tiff(
        600, 500, (322, 3, [1]), (323, 3, [1]), (324, 4, [8] * TINY), (325, 4, [1] * TINY)
    ),
    "TIFF of strips of one row": grey_tiff(40, TINY, (278, 3, [1]), (273, 4, [8] * TINY), (279, 4, [40] * TINY)),
    "TIFF with a tag of a million numbers": grey_tiff(
        8, 8, (278, 3, [8]), (273, 4, [8]), (279, 4, [64]), (700, 3, [1] * 1_000_000)
    ),
    "TIFF of tags that share their bytes": shared_tags(1000, 1_000_000),
    "PNG with EXIF tags that share their bytes": png((b"eXIf", shared_tags(1000, 1_000_000))),
    "JPEG with EXIF tags that share their bytes": jpeg(segment(0xE1, b"Exif\0\0" + shared_tags(1500, 40_000))),
    "JPEG with an index of such tags": jpeg(segment(0xE2, b"MPF\0" + shared_tags(1500, 40_000))),
    "JPEG of a hundred thousand segments": jpeg(segment(0xFE, b"") * 100_000),
    "JPEG with a megabyte of junk in its header": jpeg(segment(0xFE, b"") + bytes(1 << 20)),
    "GIF of a hundred thousand blocks": b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + b"!\xfe\x01a\x00" * 100_000,
    "GIF with a comment of pieces": b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + b"!\xfe" + b"\x01a" * 100_000,
    "BMP that ends its lines one by one": run_lengths(7900, b"\x01\x01\x00\x00" * 7900 + b"\x00\x01"),
    "BMP of a run a pixel": run_lengths(2000, b"\x01\x01" * 4_000_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_picture_that_would_take_far_too_long_to_read_is_refused(name: str) -> None:
    with pytest.raises(PixelError, match="too long|good time|needless|thousands|run lengths"):
        image_size(HOSTILE[name])
    with pytest.raises(PixelError):
        decode_image(HOSTILE[name])


def test_exif_tags_that_share_their_bytes_are_refused_in_a_webp() -> None:
    data = encoded(Image.new("RGB", (8, 8)), "WEBP", exif=b"Exif\0\0" + shared_tags(1000, 1_000_000))
    with pytest.raises(PixelError, match="tags"):
        decode_image(data)


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.new("RGB", (2500, 2500)), "TIFF", compression="jpeg"),  # hundreds of strips, each with its scan
        encoded(Image.new("RGB", (100, 3000)), "TIFF", strip_size=300),  # one row each
        grey_tiff(2000, 2000, (322, 3, [16]), (323, 3, [16]), (324, 4, [8] * 15_625), (325, 4, [256] * 15_625)),
        run_lengths(100, b"\x64\x01\x00\x00" * 100 + b"\x00\x01"),
        jpeg(*[segment(0xE1, b"Exif\0\0" + bytes(60_000))] * 3, *[segment(0xE2, bytes(60_000))] * 40),
        encoded(Image.new("RGB", (8, 8)), "GIF", comment=b"a" * 60_000),
    ],
    ids=[
        "TIFF of JPEG strips",
        "TIFF of rows",
        "TIFF of small tiles",
        "small RLE BMP",
        "JPEG with profiles",
        "GIF comment",
    ],
)
def test_an_honest_picture_with_much_in_its_header_is_taken(data: bytes) -> None:
    height, width = image_size(data)
    assert decode_image(data).shape == (height, width, 3)


def test_what_decoding_holds_is_known_from_the_header() -> None:
    """The figures are of measured peaks: 4 to 5 bytes a pixel for RGB, 12 for RGBA that is turned, 16 for WEBP."""
    image = Image.new("RGB", (100, 100))
    plain = image_header(encoded(image, "JPEG")).decode_bytes
    assert image_header(encoded(image, "JPEG", progressive=True)).decode_bytes > plain >= 4 * 10_000
    assert image_header(encoded(image.convert("RGBA"), "PNG")).decode_bytes >= 12 * 10_000
    assert image_header(encoded(image, "WEBP")).decode_bytes >= 16 * 10_000


def tiled_tiff(side: int, tile: int, *more: tuple[int, int, list[int]]) -> bytes:
    """An RGB TIFF of one deflated tile."""
    pixels = zlib.compress(bytes(tile * tile * 3), 9)
    plain = [
        (256, 4, [side]),
        (257, 4, [side]),
        (258, 3, [8, 8, 8]),
        (259, 3, [8]),
        (262, 3, [2]),
        (277, 3, [3]),
        (284, 3, [1]),
    ]
    tiling = [(322, 4, [tile]), (323, 4, [tile]), *more, (325, 4, [len(pixels)])]
    start = len(tags([*plain, *tiling, (324, 4, [0])]))
    return tags(sorted([*plain, *tiling, (324, 4, [start])], key=lambda entry: entry[0]), pixels)


@pytest.mark.parametrize(
    "more", [(), ((322, 4, [64]), (323, 4, [64]))], ids=["one tile", "with a second, smaller size"]
)
def test_a_tiff_of_tiles_far_larger_than_its_picture_is_refused(more: tuple[tuple[int, int, list[int]], ...]) -> None:
    """A decoder holds whole tiles: one of 24,000 × 24,000 took 1.7 GB for a picture of 64 × 64."""
    data = tiled_tiff(64, 4096, *more)
    with pytest.raises(PixelError, match="tiles of 4096×4096"):
        image_header(data)
    with pytest.raises(PixelError, match="tiles of 4096×4096"):
        decode_image(data)


def test_a_tiff_of_usual_tiles_around_a_small_picture_is_taken_and_its_tile_counted() -> None:
    small, padded = tiled_tiff(64, 64), tiled_tiff(64, 512)
    assert decode_image(padded).shape == (64, 64, 3)
    assert image_header(padded).decode_bytes > image_header(small).decode_bytes + 3 * 512 * 512
