"""What a picture's header may make its reader do: judged before any reader sees it.

Pillow reads headers in Python, block by block, and some of them can be made to take seconds or gigabytes for a few kilobytes: a
thousand tags that all name the same megabyte, an image cut into a
million tiles of one pixel. Each walk here skips over contents by their length and counts.

Sources: PNG third edition, section 5.3; ITU T.81, annex B (JPEG); GIF89a, sections 15 to 26; TIFF 6.0, section 2.
"""

from __future__ import annotations

import struct

from PIL import JpegImagePlugin

from sidecar.vision.pixels import PixelError

# Far beyond what cameras and editors write, and milliseconds to read.
_MOST_BLOCKS = 16_384
_MOST_TABLE_BYTES = 1 << 18
_MOST_EXIF_BYTES = 1 << 22
_MOST_GIF_BLOCKS = 1 << 16

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNK_BYTES = 12  # length, type and checksum around the data
_PNG_MOST_CHUNKS = 1024  # beside those with pixels, of which large pictures have many
_PNG_MOST_PIXEL_CHUNKS = 1 << 16

_MOST_TAGS = 4096
_MOST_NUMBERS = 1 << 17
_MOST_PIECES = 1 << 15  # strips or tiles: one row each of a picture of 32,768 rows
_PIECES = frozenset((273, 279, 324, 325))
_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 322, 323
_SIDES = frozenset((_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT))
# A decoder holds a whole tile and decodes all of it, however small the part of the picture in it.
_MOST_PADDING = 4
_MOST_PADDED_PIXELS = 1 << 22
_SUB_DIRECTORIES = frozenset((0x8769, 0x8825, 0xA005))
_MOST_DIRECTORIES = 8
_TAG_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)
_OPAQUE_TYPES = frozenset((1, 2, 6, 7))  # bytes and text, which stay as they are


def check_header(data: bytes) -> None:
    """Raises:
    PixelError: if reading the header would take far more than any honest picture's.
    """
    if data.startswith(_PNG_SIGNATURE):
        _check_png(data)
    elif data.startswith(b"\xff\xd8\xff"):
        _check_jpeg(data)
    elif data.startswith(b"GIF8"):
        _check_gif(data)
    elif data[:2] in (b"II", b"MM"):
        check_tags(data, "the TIFF image")


def check_tags(block: bytes, what: str) -> None:
    """Judge a TIFF's or an EXIF block's directories of tags. What is damaged is left to the reader.

    Raises:
        PixelError: if they have far more tags than cameras write, or tags that share their bytes: each would be copied.
    """
    block = block.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return
    try:
        big = struct.unpack_from(order + "H", block, 2)[0] == 43  # BigTIFF
        start = struct.unpack_from(order + "Q", block, 8)[0] if big else struct.unpack_from(order + "I", block, 4)[0]
        _check_directories(block, start, order, big, what)
    except struct.error:
        return


def _check_directories(block: bytes, start: int, order: str, big: bool, what: str) -> None:
    count_of, entry = (("Q", "HHQQ"), ("H", "HHII"))[not big]
    width = struct.calcsize("=" + entry)
    held = numbers = tags = 0
    sides: dict[int, set[int]] = {tag: set() for tag in _SIDES}
    directories = [start]
    for directory in directories:
        (count,) = struct.unpack_from(order + count_of, block, directory)
        tags += count
        if tags > _MOST_TAGS:
            raise PixelError(f"{what} has thousands of tags, which take too long to read; save it again as usual")
        for index in range(count):
            at = directory + struct.calcsize("=" + count_of) + index * width
            tag, kind, length, value = struct.unpack_from(order + entry, block, at)
            held += length * (_TAG_BYTES[kind] if kind < len(_TAG_BYTES) else 0)
            numbers += 0 if kind in _OPAQUE_TYPES else length
            pieces = length if tag in _PIECES else 0
            if held > len(block) + _MOST_TABLE_BYTES or numbers > _MOST_NUMBERS or pieces > _MOST_PIECES:
                raise PixelError(
                    f"{what} has more tags or more strips or tiles than can be read in good time; save it again, in strips of "
                    "many rows or tiles of 256×256"
                )
            if tag in _SIDES and length == 1:
                sides[tag].add(_number(block, at, order, kind, value, big))
            if tag in _SUB_DIRECTORIES and len(directories) < _MOST_DIRECTORIES:
                directories.append(value)
    _check_tiles(sides, what)


def _number(block: bytes, at: int, order: str, kind: int, value: int, big: bool) -> int:
    """The single integer of the entry at `at`: in the entry itself if it fits there, else where `value` points."""
    size = _TAG_BYTES[kind] if kind < len(_TAG_BYTES) else 0
    inside = at + (12 if big else 8)
    room = 8 if big else 4
    number = {1: "B", 2: "H", 4: "I", 8: "Q"}.get(size)
    return struct.unpack_from(order + number, block, inside if size <= room else value)[0] if number else 0


def _check_tiles(sides: dict[int, set[int]], what: str) -> None:
    """Readers disagree about which of two equal tags counts, so the largest tile is judged against the smallest picture."""
    if not all(sides.values()):
        return
    width, height = min(sides[_WIDTH]), min(sides[_HEIGHT])
    tile_width, tile_height = max(sides[_TILE_WIDTH]), max(sides[_TILE_HEIGHT])
    if tile_width == 0 or tile_height == 0:
        return
    padded = -(-width // tile_width) * tile_width * -(-height // tile_height) * tile_height
    if padded > max(_MOST_PADDING * width * height, _MOST_PADDED_PIXELS):
        raise PixelError(
            f"{what} has tiles of {tile_width}×{tile_height} pixels for a picture of {width}×{height}, which would take far "
            "more memory than the picture; save it again, in tiles of 256×256"
        )


def _check_png(data: bytes) -> None:
    """A PNG's header is read chunk by chunk, and an empty text chunk takes twelve bytes. A photo has a dozen, and its pixels in
    chunks that may be as small as a row."""
    position, chunks, pixels = len(_PNG_SIGNATURE), 0, 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        if kind == b"IDAT":
            pixels += 1
        else:
            chunks += 1
        if chunks > _PNG_MOST_CHUNKS or pixels > _PNG_MOST_PIXEL_CHUNKS:
            raise PixelError(
                "the PNG image has thousands of needless chunks, which take too long to read; save it again as usual"
            )
        if kind == b"eXIf":
            check_tags(data[position + 8 : position + 8 + length], "the PNG image's EXIF block")
        position += _PNG_CHUNK_BYTES + length


def _check_jpeg(data: bytes) -> None:
    """Segments up to the first scan. Between them the reader skips junk byte by byte."""
    position, tables = 2, 0
    exif = bytearray()
    for _ in range(_MOST_BLOCKS):
        marker = data[position : position + 2]
        if len(marker) < 2 or marker == b"\xff\xda":
            check_tags(bytes(exif), "the JPEG image's EXIF block")
            return
        if marker[0] != 0xFF or marker[1] in (0, 0xFF):
            position += 1
            continue
        name, _, handler = JpegImagePlugin.MARKER.get(int.from_bytes(marker, "big"), ("", "", None))
        position += 2
        if handler is None:  # no length follows
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        content = data[position + 2 : position + 10]
        if name == "APP1" and content.startswith(b"Exif\0\0"):
            exif += data[position + (8 if exif else 2) : position + length]
        elif name == "APP2" and content.startswith(b"MPF\0"):
            check_tags(data[position + 6 : position + length], "the JPEG image's index")
        elif not name.startswith("APP") and name != "COM":
            tables += length
        if len(exif) > _MOST_EXIF_BYTES or tables > _MOST_TABLE_BYTES:
            break
        position += max(2, length)
    raise PixelError(
        "the JPEG image has thousands of needless segments, which take too long to read; save it again as usual"
    )


def _check_gif(data: bytes) -> None:
    """Blocks, and the pieces of each, up to the first picture."""
    position = 13 + _colours(data[10:11])
    inside = False
    for _ in range(_MOST_GIF_BLOCKS):
        kind = data[position : position + 1]
        if not kind or (not inside and kind in (b",", b";")):
            return
        if inside:
            position += 1 + kind[0]
            inside = kind != b"\0"
        else:
            inside = kind == b"!"
            position += 1 + inside
    raise PixelError("the GIF image has thousands of blocks before its picture; save it again as usual")


def _colours(flags: bytes) -> int:
    """Bytes of the colour table that a GIF's packed field announces."""
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0
