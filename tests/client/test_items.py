"""An item arrives as it was built, and a mistake shows where it is built."""

import numpy as np
import pytest

from sidecar.client import image_item, patches_item, rgb_image_item, rgb_video_item
from sidecar.pb import encoder_pb2 as pb
from sidecar.vision.dtypes import DType
from sidecar.vision.grid import Grid

RNG = np.random.default_rng(0)


def sent(item: pb.Item) -> pb.Item:
    """The item as the other side of a wire reads it."""
    return pb.Item.FromString(item.SerializeToString())


def test_an_image_travels_with_its_key_and_bounds():
    item = sent(image_item(b"\xff\xd8jpeg", key="cat", min_pixels=3136, max_pixels=10**10))
    assert (item.image, item.key, item.min_pixels, item.max_pixels) == (b"\xff\xd8jpeg", "cat", 3136, 10**10)
    assert sent(image_item(b"x")).min_pixels == 0  # the contract's "the model's own"


def test_pixels_travel_row_by_row_also_from_an_array_that_is_not():
    pixels = RNG.integers(0, 256, (3, 5, 7), np.uint8).transpose(1, 2, 0)
    picture = sent(rgb_image_item(pixels, max_pixels=9)).rgb_image
    assert (picture.height, picture.width) == (5, 7)
    assert np.array_equal(np.frombuffer(picture.data, np.uint8).reshape(5, 7, 3), pixels)


def test_a_video_travels_frame_by_frame():
    frames = RNG.integers(0, 256, (3, 4, 6, 3), np.uint8)
    video = sent(rgb_video_item(frames, key="film")).rgb_video
    assert (video.frames, video.height, video.width) == (3, 4, 6)
    assert video.data == frames.tobytes()


@pytest.mark.parametrize(
    ("dtype", "wire", "scale"),
    [
        (DType.UINT8, pb.UINT8, pb.Patches.PIXELS),
        (DType.FLOAT32, pb.FLOAT32, pb.Patches.NORMALISED),
        (DType.FLOAT16, pb.FLOAT16, pb.Patches.NORMALISED),
        (DType.BFLOAT16, pb.BFLOAT16, pb.Patches.NORMALISED),
    ],
)
def test_patches_say_whether_they_are_pixels_or_normalised(dtype, wire, scale):
    values = RNG.integers(0, 200, (2 * 4 * 6, 12)).astype(dtype.storage)
    patches = sent(patches_item(values, Grid(2, 4, 6), dtype)).patches
    assert (patches.grid.t, patches.grid.h, patches.grid.w) == (2, 4, 6)
    assert (patches.dtype, patches.scale, patches.single_slice) == (wire, scale, False)
    assert patches.data == values.tobytes()


def test_an_images_equal_slices_can_be_sent_once():
    assert sent(
        patches_item(np.zeros((16, 6), np.uint8), Grid(1, 4, 4), DType.UINT8, single_slice=True)
    ).patches.single_slice


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: image_item(b""), "at least one byte"),
        (lambda: image_item(b"x", max_pixels=0), "max_pixels must be at least 1"),
        (lambda: rgb_image_item(np.zeros((4, 4, 4), np.uint8)), "RGB image must be uint8"),
        (lambda: rgb_image_item(np.zeros((4, 4, 3), np.float32)), "got float32"),
        (lambda: rgb_video_item(np.zeros((4, 4, 3), np.uint8)), r"\(frames, height, width, 3\)"),
        (lambda: rgb_video_item(np.zeros((0, 4, 4, 3), np.uint8)), "no side 0"),
        (lambda: patches_item(np.zeros((16, 6), np.uint16), Grid(1, 4, 4), DType.FLOAT16), "float16 must come as"),
        (lambda: patches_item(np.zeros((15, 6), np.uint8), Grid(1, 4, 4), DType.UINT8), r"\(16, values\)"),
        (lambda: patches_item(np.zeros((0, 6), np.uint8), Grid(0, 4, 4), DType.UINT8), "every side"),
        (
            lambda: patches_item(np.zeros((32, 6), np.uint8), Grid(2, 4, 4), DType.UINT8, single_slice=True),
            "only an image",
        ),
    ],
)
def test_a_mistake_is_reported_before_anything_is_sent(build, reason):
    with pytest.raises(ValueError, match=reason):
        build()
