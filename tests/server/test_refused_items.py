"""What cannot be encoded is refused with a word on what would do, and costs its neighbours nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
from google.rpc import error_details_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import (
    ASTRONAUT,
    CAT,
    COFFEE,
    PATCH_WIDTH,
    encoded,
    normalised,
    normalised_item,
    patches_of,
    picture,
    png_header,
    webp_header,
)
from servers import Server

from sidecar.client import Embedding, EncoderClient, ItemError
from sidecar.items import image_item, patches_item
from sidecar.pb import encoder_pb2 as pb
from sidecar.vision.dtypes import DType
from sidecar.vision.grid import Grid

PIXELS, NORMALISED = pb.Patches.PIXELS, pb.Patches.NORMALISED
GOOD = image_item(encoded(picture(56, 56)))
VALUES, GRID = patches_of(picture(56, 84))
ROWS, HUGE = len(VALUES), 2**31


def patches(
    grid: tuple[int, int, int] = GRID,
    data: bytes = VALUES.tobytes(),
    dtype: int = pb.UINT8,
    scale: int = PIXELS,
    single_slice: bool = False,
) -> pb.Item:
    """By default the faultless patches of a picture."""
    t, h, w = grid
    content = pb.Patches(grid=pb.Grid(t=t, h=h, w=w), data=data, single_slice=single_slice)
    content.dtype, content.scale = dtype, scale  # type: ignore[assignment]  # numbers that no enum has are sent too
    return pb.Item(patches=content)


def zeros(width: int, itemsize: int = 1) -> bytes:
    return bytes(ROWS * width * itemsize)


def rgb(height: int, width: int, size: int) -> pb.Item:
    return pb.Item(rgb_image=pb.RgbImage(height=height, width=width, data=bytes(size)))


def video(frames: int, height: int, width: int, size: int) -> pb.Item:
    return pb.Item(rgb_video=pb.RgbVideo(frames=frames, height=height, width=width, data=bytes(size)))


def spoilt(value: float, dtype: DType) -> pb.Item:
    """Normalised patches with one value that is no number."""
    values = normalised(VALUES)
    values[ROWS // 2, 7] = value
    return normalised_item(values, GRID, dtype)


FORMATS = "JPEG, PNG, WEBP"
LIMIT = "this server takes 16384"
CASES: dict[str, tuple[pb.Item, tuple[str, ...]]] = {
    "no content": (pb.Item(key="k"), ("no content", "image, url, rgb_image, rgb_video or patches")),
    "words instead of an image": (image_item(b"these are words"), ("15 bytes are not an image", FORMATS)),
    "an image of no bytes": (pb.Item(image=b""), ("empty",)),
    "half a JPEG": (image_item(ASTRONAUT.read_bytes()[:30_000]), ("JPEG image of 512×512", "cut short")),
    "half a PNG": (image_item(CAT.read_bytes()[:90_000]), ("PNG image of 451×300", "cut short")),
    "half a WEBP": (image_item(COFFEE.read_bytes()[:20_000]), ("WEBP", "cut short")),
    "the first bytes of a PNG": (image_item(CAT.read_bytes()[:20]), ("PNG", "cut short")),
    "a PNG bomb": (image_item(png_header(60_000, 60_000)), ("60000×60000", "3600000000 pixels", "4000000")),
    "a WEBP bomb": (image_item(webp_header(60_000, 60_000)), ("WEBP", "pixels; the limit is 4000000")),
    "a PNG over this server's limit": (image_item(png_header(2001, 2000)), ("4002000 pixels", "4000000")),
    "a PNG of 0×0": (image_item(png_header(0, 0)), ("PNG", "damaged")),
    "a line of 5000 pixels": (image_item(encoded(picture(1, 5000))), ("aspect ratio of 5000", "at most 200")),
    "a decoded line of 5000 pixels": (rgb(5000, 1, 15_000), ("aspect ratio of 5000", "at most 200")),
    "a decoded picture of 0×0": (rgb(0, 0, 0), ("must have an area", "0×0")),
    "a decoded picture that claims too much": (rgb(60_000, 60_000, 3), ("60000×60000", "limit of 4000000")),
    "a decoded picture one byte short": (rgb(28, 28, 28 * 28 * 3 - 1), ("must be 2352 bytes", "28×28×3", "2351")),
    "a grey picture": (rgb(28, 28, 28 * 28), ("must be 2352 bytes", "784")),
    "a video of no frames": (video(0, 28, 28, 0), ("must have an area", "0 frames")),
    "a video one frame short": (video(4, 28, 28, 3 * 2352), ("must be 9408 bytes", "4×28×28×3", "7056")),
    "a video that claims too much": (video(4000, 2000, 2000, 3), ("40328000 patches", LIMIT)),
    "a video of too many frames": (video(2**32 - 1, 28, 28, 3), ("4294967295 frames", "takes 4096")),
    "a video that grows too much": (
        pb.Item(rgb_video=video(400, 28, 28, 400 * 2352).rgb_video, min_pixels=28 * 28 * 100),
        ("80000 patches", LIMIT, "max_pixels"),
    ),
    "bounds that make it too large": (
        pb.Item(image=GOOD.image, min_pixels=12_000_000),
        ("patches", LIMIT, "max_pixels"),
    ),
    "bounds beyond all memory": (pb.Item(image=GOOD.image, min_pixels=2**64 - 1), ("min_pixels", "may not be over")),
    "bounds on patches": (
        pb.Item(patches=patches().patches, max_pixels=999),
        ("min_pixels and max_pixels do not apply to patches",),
    ),
    "a grid of other patches": (patches((1, 4, 4)), ("must be 18816 bytes", "16 patches", "(1, 4, 4)", "28224")),
    "an odd grid": (patches((1, 3, 8)), ("(1, 3, 8) is odd", "multiples of spatial_merge_size 2")),
    "no grid": (patches((0, 0, 0)), ("(0, 0, 0) is too small", "t must be at least 1")),
    "an absurd grid": (patches((HUGE, HUGE, HUGE)), (f"{HUGE**3} patches", LIMIT)),
    "patches too narrow": (patches(data=zeros(1000)), ("must be 28224 bytes", "24 patches of 1176 UINT8", "24000")),
    "bytes sent as floats": (patches(dtype=pb.FLOAT32, scale=NORMALISED), ("1176 FLOAT32", "112896", "got 28224")),
    "no scale": (patches(scale=0), ("PIXELS (0…255) or NORMALISED", "never guessed")),
    "an unknown scale": (patches(scale=7), ("PIXELS (0…255) or NORMALISED", "never guessed")),
    "no dtype": (patches(dtype=0), ("must be one of UINT8, FLOAT32, FLOAT16, BFLOAT16",)),
    "an unknown dtype": (patches(dtype=99), ("must be one of UINT8, FLOAT32, FLOAT16, BFLOAT16",)),
    "normalised bytes": (patches(scale=NORMALISED), ("must have dtype FLOAT32, FLOAT16 or BFLOAT16", "UINT8")),
    "pixels in floats": (patches(data=zeros(PATCH_WIDTH, 4), dtype=pb.FLOAT32), ("must have dtype UINT8", "FLOAT32")),
    "floats that were never normalised": (
        patches(data=VALUES.astype("<f4").tobytes(), dtype=pb.FLOAT32, scale=NORMALISED),
        ("about 0…255", "were they normalised", "image_mean"),
    ),
    "one slice of a video": (
        patches((2, 4, 6), data=bytes(2 * ROWS * 588), single_slice=True),
        ("single_slice is for images", "t = 1", "(2, 4, 6)"),
    ),
    "a whole patch sent as one slice": (patches(single_slice=True), ("24 patches of 588", "28224")),
    "a key of 70 kB": (
        pb.Item(key="k" * 70_000, image=GOOD.image),
        ("over 65536 bytes", "send a hash instead", "hash"),
    ),
} | {
    f"{value} in {dtype}": (spoilt(value, dtype), ("must be finite", "0…255"))
    for value in (np.nan, np.inf, -np.inf)
    for dtype in (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)
}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[EncoderClient]:
    with server.client() as connected:
        yield connected


def assert_for_a_client(message: str) -> None:
    """It says nothing of the inside: no path, no code, no address."""
    assert not re.search(r"(/\w+){2}|Traceback|\.py\b|0x[0-9a-f]{6}|<\w+", message), message
    assert 0 < len(message) < 400


@pytest.mark.parametrize("name", CASES)
def test_a_bad_item_is_told_why_and_its_neighbours_are_served(client: EncoderClient, name: str) -> None:
    item, expected = CASES[name]
    before, refused, after = client.encode([GOOD, item, GOOD], timeout_s=30)
    assert isinstance(refused, ItemError)
    assert refused.code == "INVALID_ARGUMENT", refused
    assert_for_a_client(refused.message)
    for words in expected:
        assert words in refused.message
    (info,) = [detail for detail in refused.details if isinstance(detail, error_details_pb2.ErrorInfo)]
    assert info.domain == "epd.encoder.v1"
    assert info.reason == ("ITEM_TOO_LARGE" if "this server" in refused.message else "INVALID_ITEM")
    assert refused.retry_delay_s is None  # the same item will never do
    assert isinstance(before, Embedding) and isinstance(after, Embedding)
    assert np.array_equal(before.data, after.data)
    assert before.tokens == 4


def test_the_patches_that_the_cases_spoil_are_good(client: EncoderClient) -> None:
    (result,) = client.encode([patches()])
    assert isinstance(result, Embedding)
    assert result.grid == GRID


def test_what_is_too_large_is_refused_before_it_takes_memory(server: Server, client: EncoderClient) -> None:
    names = ("a PNG bomb", "a WEBP bomb", "bounds that make it too large", "bounds beyond all memory", "an absurd grid")
    grown = pb.Item(rgb_image=rgb(1000, 1000, 3_000_000).rgb_image, min_pixels=10**8, max_pixels=2**64 - 1)
    items = [*(CASES[name][0] for name in names), grown, CASES["a video that claims too much"][0]]
    with server.growing_less_than(30e6):  # 10^8 pixels would take 300 MB, their patches another 600
        results = client.encode(items)
    assert [type(result) for result in results] == [ItemError] * 7


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_an_item_holds_it_gets_an_embedding_or_a_clear_error(
    client: EncoderClient, data: st.DataObject
) -> None:
    number = st.sampled_from([0, 1, 2, 3, 4, 6, 28, 56, 2**31, 2**32 - 1])
    grid = st.builds(pb.Grid, t=number, h=number, w=number)
    raw = st.sampled_from([b"", b"\0", bytes(588), bytes(4704), bytes(9408), VALUES.tobytes(), bytes(112_896)])
    photo = st.sampled_from([encoded(picture(56, 56), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")])

    def damaged(image: bytes) -> st.SearchStrategy[bytes]:
        """Another byte at one place, and an end before the end."""
        place, byte = st.integers(0, len(image) - 1), st.integers(0, 255)
        changed = st.builds(lambda at, value: image[:at] + bytes([value]) + image[at + 1 :], place, byte)
        return st.builds(lambda whole, end: whole[:end], changed, st.integers(1, len(image)) | st.just(len(image)))

    content = st.one_of(
        st.fixed_dictionaries({"image": photo.flatmap(damaged)}),
        st.fixed_dictionaries({"rgb_image": st.builds(pb.RgbImage, height=number, width=number, data=raw)}),
        st.fixed_dictionaries(
            {"rgb_video": st.builds(pb.RgbVideo, frames=number, height=number, width=number, data=raw)}
        ),
        st.fixed_dictionaries(
            {
                "patches": st.builds(
                    pb.Patches,
                    grid=grid,
                    dtype=st.integers(0, 5),
                    data=raw,
                    scale=st.integers(0, 3),
                    single_slice=st.booleans(),
                )
            }
        ),
    )
    bounds: st.SearchStrategy[dict[str, int]] = st.fixed_dictionaries(
        dict.fromkeys(("min_pixels", "max_pixels"), number)
    ) | st.just({})
    item = st.builds(
        lambda fields, limits, key: pb.Item(key=key, **fields, **limits), content, bounds, st.text(max_size=5)
    )
    items = data.draw(st.lists(item, min_size=1, max_size=15))
    *results, neighbour = client.encode([*items, GOOD], timeout_s=60)
    for result in results:
        if isinstance(result, ItemError):
            assert result.code == "INVALID_ARGUMENT", result
            assert_for_a_client(result.message)
        else:
            assert np.isfinite(result.data).all()
    assert isinstance(neighbour, Embedding)


def test_an_item_of_the_largest_size_taken_is_not_refused(client: EncoderClient) -> None:
    """16384 patches exactly, as 64 frame pairs so that it is quickly encoded; one pair more is refused."""
    largest = np.zeros((128 * 128, PATCH_WIDTH), np.uint8)
    beyond = np.zeros((65 * 256, PATCH_WIDTH), np.uint8)
    results = client.encode(
        [patches_item(largest, Grid(64, 16, 16), DType.UINT8), patches_item(beyond, Grid(65, 16, 16), DType.UINT8)]
    )
    assert isinstance(results[0], Embedding) and results[0].tokens == 4096
    assert isinstance(results[1], ItemError) and "16640 patches, this server takes 16384" in results[1].message
