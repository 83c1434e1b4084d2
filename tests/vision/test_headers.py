"""Pictures whose header or decoder could be made to take seconds or gigabytes are refused before that; honest ones are taken."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from sidecar.vision.avif import check_frames
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


def renamed_size(data: bytes, width: int, height: int) -> bytes:
    """An AVIF whose container tells another size than its stream."""
    out = bytearray(data)
    at = out.find(b"ispe")
    while at >= 0:
        out[at + 8 : at + 16] = struct.pack(">II", width, height)
        at = out.find(b"ispe", at + 4)
    return bytes(out)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_an_avif_whose_frames_are_larger_than_its_container_says_is_refused(mode: str) -> None:
    """The decoder believes the stream: 1.9 kB of 12,000 × 12,000 pixels took 520 MB as a picture of 64 × 64."""
    data = renamed_size(encoded(Image.new(mode, (1024, 1024)), "AVIF", speed=10), 64, 64)
    for read in (image_header, decode_image):
        with pytest.raises(PixelError, match="says that it has 64×64 pixels, and its AV1 frames may have 1024×1024"):
            read(data)


def animated(side: int) -> bytes:
    frames = [Image.new("RGB", (side, side), (index, 0, 0)) for index in range(3)]
    return encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:], speed=10)


def test_an_animated_avif_is_judged_by_its_track() -> None:
    data = animated(1000)
    assert decode_image(data).shape == (1000, 1000, 3)
    small = bytearray(renamed_size(data, 64, 64))
    for box, before in ((b"tkhd", 92), (b"av01\0\0\0\0", 28)):
        at = small.find(box, small.find(b"moov")) + 4
        size = struct.pack(">II", 64 << 16, 64 << 16) if box == b"tkhd" else struct.pack(">HH", 64, 64)
        small[at + before - 4 : at + before - 4 + len(size)] = size
    with pytest.raises(PixelError, match="AV1 frames may have 1000×1000"):
        decode_image(bytes(small))


def test_an_avif_in_which_no_sequence_header_is_found_is_refused() -> None:
    data = encoded(Image.new("RGB", (64, 64)), "AVIF", speed=10)
    header = data.find(b"mdat") + 4 + 2
    assert data[header] == 0x0A
    for hidden in (data[:header] + b"\x7a" + data[header + 1 :], data.replace(b"av01", b"av02")):
        with pytest.raises(PixelError, match="cannot be read"):
            image_header(hidden)


def test_an_avif_that_would_take_long_to_check_is_refused() -> None:
    data = encoded(Image.new("RGB", (64, 64)), "AVIF", speed=10)
    box = struct.pack(">I4s", 8, b"free")
    with pytest.raises(PixelError, match="needless"):
        image_header(data + box * 100_000)
    deep = b""
    for _ in range(2000):
        deep = struct.pack(">I4s", 8 + len(deep), b"moov") + deep
    with pytest.raises(PixelError, match="cannot be read"):
        check_frames(data + deep, 64, 64)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (64, 64), (65, 33), (300, 200), (2049, 17)])
def test_avifs_of_every_size_are_taken(mode: str, size: tuple[int, int]) -> None:
    data = encoded(Image.new(mode, size), "AVIF", speed=10)
    assert decode_image(data + b"more than there should be").shape == (size[1], size[0], 3)
    assert image_size(data) == size[::-1]


def box(kind: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def grid_avif(side: int) -> bytes:
    """Two tiles side by side, in a grid of 2 × 1 (ISO/IEC 23008-12, section 6.6.2.3)."""
    one = encoded(Image.new("RGB", (side, side), (200, 30, 30)), "AVIF", speed=10)
    stream = one[one.find(b"mdat") + 4 :]
    at = one.find(b"av1C") - 4
    codec = one[at : at + struct.unpack_from(">I", one, at)[0]]
    grid = struct.pack(">BBBBHH", 0, 0, 0, 1, 2 * side, side)
    full = bytes(4)
    infos = [
        box(b"infe", b"\2\0\0\0", struct.pack(">HH4s", item, 0, b"grid" if item == 1 else b"av01"), b"\0")
        for item in (1, 2, 3)
    ]
    properties = box(
        b"ipco",
        box(b"ispe", full, struct.pack(">II", 2 * side, side)),
        box(b"ispe", full, struct.pack(">II", side, side)),
        box(b"pixi", full, b"\3\x08\x08\x08"),
        codec,
    )
    uses = full + struct.pack(">I", 3)
    for item, held in ((1, b"\1\3"), (2, b"\2\3\x84"), (3, b"\2\3\x84")):
        uses += struct.pack(">HB", item, len(held)) + held

    def meta(start: int) -> bytes:
        places = full + b"\x44\0" + struct.pack(">H", 3)
        for item, offset, length in (
            (1, start + len(stream), len(grid)),
            (2, start, len(stream)),
            (3, start, len(stream)),
        ):
            places += struct.pack(">HHHII", item, 0, 1, offset, length)
        return box(
            b"meta",
            full,
            box(b"hdlr", full, bytes(4), b"pict", bytes(13)),
            box(b"pitm", full, struct.pack(">H", 1)),
            box(b"iloc", places),
            box(b"iinf", full, struct.pack(">H", 3), *infos),
            box(b"iref", full, box(b"dimg", struct.pack(">HHHH", 1, 2, 2, 3))),
            box(b"iprp", properties, box(b"ipma", uses)),
        )

    kind = box(b"ftyp", b"avif", bytes(4), b"avifmif1miaf")
    return kind + meta(len(kind) + len(meta(0)) + 8) + box(b"mdat", stream, grid)


def test_an_avif_of_tiles_is_taken() -> None:
    data = grid_avif(64)
    assert image_size(data) == (64, 128)
    assert decode_image(data).shape == (64, 128, 3)
