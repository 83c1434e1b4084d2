"""Frame sizes of the AV1 streams in an AVIF file, read without decoding.

The size that a reader reports comes from the container (`ispe`), and the decoder believes the stream instead: a file that says
64 × 64 may hold a frame of 12,000 × 12,000, which is decoded whole and then scaled down. This module knows the container and
the sequence header alone.

Sources: ISO/IEC 14496-12 (boxes), ISO/IEC 23008-12 (`iloc`, `iinf`), AV1 Bitstream & Decoding Process Specification, sections
5.3 (OBUs) and 5.5 (sequence header).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator

from sidecar.vision.pixels import PixelError

_MOST_STEPS = 1 << 15  # boxes, extents and OBUs together; a picture of a thousand tiles has about ten thousand
_DEEPEST = 8
_MOST_TRACKS = 16
_INSIDE = frozenset((b"meta", b"iinf", b"moov", b"trak", b"mdia", b"minf", b"stbl"))
_SEQUENCE_HEADER = 1  # OBU type
_LONGEST_SEQUENCE_HEADER = 512
_ROUNDING = 8


def check_frames(data: bytes, width: int, height: int) -> None:
    """Judge the frames of every AV1 image in an AVIF file by the picture's size as the container states it.

    Tiles of a grid may be smaller than the picture.

    Raises:
        PixelError: if a frame may be larger than width × height, or its size cannot be found.
    """
    try:
        container = _Container(data)
        sizes = [size for stream in container.streams() for size in _frame_sizes(stream, container.step)]
    except PixelError:
        raise
    except (struct.error, IndexError, ValueError) as error:
        raise PixelError("the AVIF image is cut short or damaged: the size of its AV1 frames cannot be read") from error
    widest, highest = (-(-side // _ROUNDING) * _ROUNDING for side in (width, height))
    for frame_width, frame_height in sizes:
        if frame_width > widest or frame_height > highest:
            raise PixelError(
                f"the AVIF image says that it has {width}×{height} pixels, and its AV1 frames may have "
                f"{frame_width}×{frame_height}; save it again as a still picture"
            )


class _Container:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._steps = self._copied = 0
        self._boxes: list[tuple[bytes, int, int]] = []  # type, and where its content lies

    def streams(self) -> Iterator[memoryview]:
        """The AV1 data of each coded image: of all items, and of the first sample of each track.

        Raises:
            ValueError, IndexError, struct.error: if the boxes cannot be read, or there are no AV1 data.
        """
        data = self._data
        self._walk(0, len(data))
        kinds = Counter(kind for kind, _, _ in self._boxes)
        if kinds[b"idat"] > 1 or kinds[b"stbl"] > _MOST_TRACKS:
            raise ValueError("more boxes of a kind than a reader takes")
        coded = {item for kind, start, end in self._boxes if kind == b"infe" for item in self._coded(start, end)}
        inner = [(start, end) for kind, start, end in self._boxes if kind == b"idat"]
        found = False
        for kind, start, end in self._boxes:
            if kind == b"iloc":
                for item, method, extents in self._located(start):
                    if item in coded:
                        base, limit = ((0, len(data)), *inner[:1])[method]
                        found = True
                        yield self._joined([(base + at, length) for at, length in extents], limit)
            elif kind == b"stbl" and data.find(b"av01", start, end) >= 0:
                found = True
                yield self._first_sample(start, end)
        if not found:
            raise ValueError("no AV1 image")

    def step(self) -> None:
        """Count one step of the whole check."""
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise PixelError("the AVIF image has thousands of needless boxes, tiles or OBUs; save it again as usual")

    def _walk(self, position: int, end: int, depth: int = 0) -> None:
        """List the boxes between two positions. One that is cut short, or damaged, is the last: readers go no further."""
        if depth > _DEEPEST:
            raise ValueError("boxes too deep inside each other")
        while position + 8 <= end:
            self.step()
            size, kind = struct.unpack_from(">I4s", self._data, position)
            start = position + 8
            if size == 1:
                (size,) = struct.unpack_from(">Q", self._data, start)
                start += 8
            stop = min(position + size, end) if size else end
            if stop < start:
                return
            self._boxes.append((kind, start, stop))
            if kind in _INSIDE:
                head = {b"meta": 4, b"iinf": 6 if self._data[start] == 0 else 8}.get(kind, 0)
                self._walk(start + head, stop, depth + 1)
            position = stop

    def _coded(self, start: int, end: int) -> list[int]:
        version = self._data[start]
        item, _, kind = struct.unpack_from(">HH4s" if version == 2 else ">IH4s", self._data, start + 4)
        return [item] if kind == b"av01" and version in (2, 3) and end > start else []

    def _located(self, start: int) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """Item, construction method, and (offset, length) of its extents."""
        version = self._data[start]
        position = start + 4

        def number(size: int) -> int:
            nonlocal position
            position += size
            if position > len(self._data):
                raise IndexError
            return int.from_bytes(self._data[position - size : position], "big")

        sizes = number(2)
        offset_size, length_size, base_size = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
        index_size = sizes & 15 if version else 0
        for _ in range(number(2 if version < 2 else 4)):
            self.step()
            item = number(2 if version < 2 else 4)
            method = number(2) & 15 if version else 0
            number(2)
            base = number(base_size)
            extents = []
            for _ in range(number(2)):
                self.step()
                number(index_size)
                extents.append((base + number(offset_size), number(length_size)))
            yield item, method, extents

    def _joined(self, extents: list[tuple[int, int]], limit: int) -> memoryview:
        whole = memoryview(self._data)
        parts = [whole[at : min(at + length, limit) if length else limit] for at, length in extents]
        if len(parts) == 1:
            return parts[0]
        self._copied += sum(map(len, parts))
        if self._copied > 2 * len(self._data):
            raise ValueError("extents that share their bytes")
        return memoryview(b"".join(parts))

    def _first_sample(self, start: int, end: int) -> memoryview:
        inside = [(kind, at) for kind, at, stop in self._boxes if start <= at and stop <= end]
        chunks = [(kind, at) for kind, at in inside if kind in (b"stco", b"co64")]
        ((kind, at),) = chunks
        (offset,) = struct.unpack_from(">I" if kind == b"stco" else ">Q", self._data, at + 8)
        (at,) = (at for kind, at in inside if kind == b"stsz")
        (size,) = struct.unpack_from(">I", self._data, at + 4)
        if size == 0:  # each sample has its own
            (size,) = struct.unpack_from(">I", self._data, at + 12)
        return self._joined([(offset, size)], len(self._data))


def _frame_sizes(stream: memoryview, step: Callable[[], None]) -> list[tuple[int, int]]:
    """Of each sequence header of a stream, the largest frame that may follow it."""
    sizes: list[tuple[int, int]] = []
    position = 0
    while position < len(stream):
        step()
        head = stream[position]
        kind = head >> 3 & 15
        position += 1 + (head >> 2 & 1)
        length = len(stream) - position
        if head & 2:
            length = 0
            for index in range(8):
                if position >= len(stream):
                    break
                byte = stream[position]
                position += 1
                length |= (byte & 127) << 7 * index
                if not byte & 128:
                    break
        if position + length > len(stream):
            break  # decoders stop here too
        if kind == _SEQUENCE_HEADER:
            sizes.append(_largest_frame(bytes(stream[position : position + min(length, _LONGEST_SEQUENCE_HEADER)])))
        position += length
    if not sizes:
        raise ValueError("no sequence header")
    return sizes


def _largest_frame(header: bytes) -> tuple[int, int]:
    left = len(header) * 8
    bits = int.from_bytes(header, "big")

    def read(count: int) -> int:
        nonlocal left
        left -= count
        if left < 0:
            raise IndexError
        return bits >> left & (1 << count) - 1

    read(3 + 1)  # profile, still_picture
    reduced = read(1)
    if reduced:
        read(5)
    else:
        delay_bits = 0
        if read(1):  # timing_info_present
            read(32 + 32)
            if read(1):  # equal_picture_interval: a variable-length number
                zeros = 0
                while not read(1):
                    zeros += 1
                    if zeros == 32:
                        raise ValueError("number too long")
                read(zeros)
            if read(1):  # decoder_model_info_present
                delay_bits = read(5) + 1
                read(32 + 5 + 5)
        display_delay = read(1)
        for _ in range(read(5) + 1):
            read(12)
            if read(5) > 7:
                read(1)
            if delay_bits and read(1):
                read(2 * delay_bits + 1)
            if display_delay and read(1):
                read(4)
    width_bits, height_bits = read(4) + 1, read(4) + 1
    width, height = read(width_bits) + 1, read(height_bits) + 1
    if reduced:
        return width, height
    # A frame may state a size of its own in so many bits, and decoders do not hold it against the maximum. Encoders use as few
    # bits as the size needs, some of them one more: what that leaves is at most twice the size.
    return max(width, 1 << width_bits - 1), max(height, 1 << height_bits - 1)
