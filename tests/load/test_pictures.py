"""Generated pictures as a server sees them."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from sidecar.items import Item
from sidecar.load.pictures import FORMATS, PatchRules, Size, photo_like, plate, with_bar_code
from sidecar.vision.pixels import image_patches
from sidecar.vision.spec import PixelSpec, TowerSpec

TOWER = TowerSpec(
    depth=1, hidden_size=64, num_heads=4, intermediate_size=100, out_hidden_size=128, fullatt_block_indexes=()
)
PIXELS = PixelSpec()
RULES = PatchRules(TOWER.patch_size, TOWER.spatial_merge_size, PIXELS.min_pixels, PIXELS.max_pixels)
# One row of blocks, a row of one pixel under others, sides that are multiples of nothing, and everyday ones.
SIZES = [Size(28, 28), Size(200, 30), Size(64, 49), Size(333, 201), Size(448, 448)]


def rgb(item: Item) -> np.ndarray:
    if item.HasField("rgb_image"):
        picture = item.rgb_image
        return np.frombuffer(picture.data, np.uint8).reshape(picture.height, picture.width, 3)
    return np.asarray(Image.open(BytesIO(item.image)).convert("RGB"))


def seen(item: Item) -> bytes:
    """What decides over a server's key: the patches, after all resizing."""
    return item.patches.data if item.HasField("patches") else image_patches(rgb(item), TOWER, PIXELS).values.tobytes()


def expected(size: Size, number: int, edge_rows: int) -> np.ndarray:
    picture = photo_like(size, 3).copy()
    picture[-edge_rows:] = with_bar_code(picture[-edge_rows:], number)
    return picture


@pytest.mark.parametrize("picture_format", FORMATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_number_is_another_picture_to_the_server(size: Size, picture_format: str) -> None:
    made = plate(size, picture_format, RULES, seed=3)
    numbers = [*range(30), *(1 << bit for bit in range(5, 33)), (1 << 33) - 1]
    assert len({seen(made.item(number)) for number in numbers}) == len(numbers)
    assert made.item(7) == plate(size, picture_format, RULES, seed=3).item(7)
    assert seen(made.item(7)) != seen(plate(size, picture_format, RULES, seed=4).item(7))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_put_together_are_those_encoded_whole(size: Size) -> None:
    whole = expected(size, 12345, edge_rows=(size.height - 1) % 16 + 1)
    assert (rgb(plate(size, "rgb", RULES, 3).item(12345)) == whole).all()
    assert (rgb(plate(size, "png", RULES, 3).item(12345)) == whole).all()
    buffer = BytesIO()
    Image.fromarray(whole).save(buffer, "JPEG", quality=90, subsampling="4:2:0", restart_marker_rows=1)
    assert plate(size, "jpeg", RULES, 3).item(12345).image == buffer.getvalue()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches_are_cut_as_the_server_cuts_them(size: Size) -> None:
    patches = plate(size, "patches", RULES, 3).item(12345).patches
    resized = RULES.resized(size)
    reference = image_patches(expected(resized, 12345, edge_rows=RULES.token_side), TOWER, PIXELS)
    assert (patches.grid.t, patches.grid.h, patches.grid.w) == reference.grid
    slices = reference.values.reshape(reference.grid.patches, 3, 2, -1)
    assert patches.single_slice
    assert patches.data == slices[:, :, 0].tobytes()


def test_pictures_weigh_what_photos_weigh() -> None:
    bits_a_pixel = len(plate(Size(512, 512), "jpeg", RULES, 0).item(0).image) * 8 / 512**2
    assert 1 < bits_a_pixel < 4  # the astronaut's photo: 2.1
