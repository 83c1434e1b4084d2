"""Bytes → RGB: what vLLM would load, and nothing but PixelError for what it should not."""

from __future__ import annotations

import contextlib
import warnings
import zlib
from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile, ImageOps

from sidecar.vision.images import FORMATS, _say_once_that_grey_is_clipped, decode_image
from sidecar.vision.pixels import MAX_IMAGE_PIXELS, PixelError

PHOTOS = Path(__file__).parents[2] / "export" / "photos"
HEIGHT, WIDTH = 20, 30


def photo(mode: str = "RGB", height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """A picture without symmetry, in any of Pillow's modes; alpha falls from left to right."""
    noise = np.random.default_rng(7).integers(0, 40, (height, width, 3))
    ramp = np.linspace(0, 200, height * width).reshape(height, width, 1) * [1.0, 0.6, 0.3]
    image = Image.fromarray((noise + ramp).astype(np.uint8))
    if "A" in mode:
        alpha = np.tile(np.linspace(255, 0, width).astype(np.uint8), (height, 1))
        image.putalpha(Image.fromarray(alpha))
    if mode == "I;16":
        return Image.fromarray((np.asarray(image)[..., 0].astype(np.uint16) * 3) - 30)
    return image.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def loaded_by_vllm(data: bytes) -> np.ndarray[Any, Any]:
    """What vLLM 0.32 makes of the bytes of an image (vllm/multimodal/image.py), said once more."""
    image: Image.Image = Image.open(BytesIO(data))
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    image.load()
    if image.mode == "RGB":
        return np.asarray(image)
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return np.asarray(image.convert("RGB"))
    image = image.convert("RGBA")
    background = Image.new("RGB", image.size, (255, 255, 255))
    background.paste(image, mask=image.split()[3])
    return np.asarray(background)


def with_palette(transparency: int | bytes | None) -> bytes:
    options = {} if transparency is None else {"transparency": transparency}
    return encoded(photo().quantize(16), **options)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


SOUND = {
    **{f"PNG {mode}": encoded(photo(mode)) for mode in ("RGB", "RGBA", "L", "LA", "1", "P", "I;16")},
    "PNG palette, one colour transparent": with_palette(3),
    "PNG palette, alpha per colour": with_palette(bytes(range(0, 256, 16))),
    "PNG grey, one level transparent": encoded(photo("L"), transparency=60),
    "PNG RGB, one colour transparent": encoded(photo(), transparency=tuple(np.asarray(photo())[3, 4].tolist())),
    "PNG 16-bit grey, one level transparent": encoded(photo("I;16"), transparency=100),
    **{f"JPEG {mode}": encoded(photo(mode), "JPEG") for mode in ("RGB", "L", "CMYK")},
    "JPEG progressive": encoded(photo(), "JPEG", progressive=True),
    "WEBP": encoded(photo(), "WEBP"),
    "WEBP RGBA": encoded(photo("RGBA"), "WEBP"),
    "WEBP lossless": encoded(photo(), "WEBP", lossless=True),
    "GIF": encoded(photo(), "GIF"),
    "GIF transparent": encoded(photo("P"), "GIF", transparency=5),
    "BMP": encoded(photo(), "BMP"),
    "BMP RGBA": encoded(photo("RGBA"), "BMP"),
    **{f"TIFF {mode}": encoded(photo(mode), "TIFF") for mode in ("RGB", "RGBA", "CMYK", "I;16", "F", "1")},
    **{f"TIFF {how}": encoded(photo(), "TIFF", compression=how) for how in ("tiff_lzw", "tiff_deflate", "jpeg")},
    "AVIF": encoded(photo(), "AVIF"),
    "AVIF RGBA": encoded(photo("RGBA"), "AVIF"),
}


@pytest.mark.parametrize("name", SOUND)
def test_an_image_of_any_kind_is_what_vllm_loads(name: str) -> None:
    rgb = decode_image(SOUND[name])
    assert rgb.dtype == np.uint8
    assert rgb.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(rgb, loaded_by_vllm(SOUND[name]))


@pytest.mark.parametrize("path", sorted(PHOTOS.glob("*-*")), ids=lambda path: path.name)
def test_real_photos_are_what_vllm_loads(path: Path) -> None:
    np.testing.assert_array_equal(decode_image(path.read_bytes()), loaded_by_vllm(path.read_bytes()))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_taken_sideways_stands_upright(kind: str, orientation: int) -> None:
    flat = np.asarray(photo())
    upright = {
        1: flat,
        2: flat[:, ::-1],
        3: flat[::-1, ::-1],
        4: flat[::-1],
        5: flat.transpose(1, 0, 2),
        6: np.rot90(flat, -1),
        7: flat[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(flat),
    }[orientation]
    data = encoded(photo(), kind, exif=turned(orientation))
    rgb = decode_image(data)
    np.testing.assert_array_equal(rgb, loaded_by_vllm(data))
    assert rgb.shape == upright.shape
    if kind in ("PNG", "TIFF"):  # lossless
        np.testing.assert_array_equal(rgb, upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_photo_with_a_broken_exif_block_is_taken_as_it_lies() -> None:
    exif = turned(6).tobytes()
    orientation = exif.index(b"\x01\x12")
    wrong_type = exif[: orientation + 2] + b"\x00\x99" + exif[orientation + 4 :]
    for damaged in (exif[: orientation + 3], b"Exif\x00\x00" + b"\xff" * 40, wrong_type):
        data = encoded(photo(), exif=damaged)
        np.testing.assert_array_equal(decode_image(data), loaded_by_vllm(data))
        np.testing.assert_array_equal(decode_image(data), np.asarray(photo()))


def test_transparency_shows_white_beneath() -> None:
    half_red = Image.new("RGBA", (3, 2), (255, 0, 0, 128))
    assert np.unique(decode_image(encoded(half_red)).reshape(-1, 3), axis=0).tolist() == [[255, 127, 127]]
    clear_black = Image.new("LA", (3, 2), (0, 0))
    assert decode_image(encoded(clear_black)).min() == 255


def test_sixteen_bit_grey_is_clipped_as_pillow_does() -> None:
    data = encoded(Image.fromarray(np.array([[0, 7, 255, 256, 65535]], np.uint16)))
    assert decode_image(data)[0, :, 0].tolist() == [0, 7, 255, 255, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    rgb = decode_image(encoded(red, kind, save_all=True, append_images=[blue, blue]))
    assert abs(rgb.astype(int) - [255, 0, 0]).max() <= 8


@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_over_the_limit_is_refused_before_it_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo(), kind)
    assert decode_image(data, max_image_pixels=HEIGHT * WIDTH).shape == (HEIGHT, WIDTH, 3)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(PixelError, match=rf"{kind} image of 30×20 has 600 pixels; the limit is 599"):
        decode_image(data, max_image_pixels=HEIGHT * WIDTH - 1)


@pytest.mark.filterwarnings("error")
def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    png = bytearray(encoded(photo()))
    png[16:24] = (50_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    with pytest.raises(PixelError, match="50000×50000 has 2500000000 pixels; the limit is 178956970"):
        decode_image(bytes(png))
    webp = bytearray(encoded(photo(), "WEBP", save_all=True, append_images=[photo("L")]))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = (16_000 - 1).to_bytes(3, "little") * 2
    # Pillow 13 refuses this one itself; older ones let us see the size.
    with pytest.raises(PixelError, match=r"(over 178956970|has 256000000) pixels; the limit is 1000 "):
        decode_image(bytes(webp), max_image_pixels=1000)


@pytest.mark.parametrize("kind", FORMATS)
def test_pillows_own_limit_does_not_get_in_the_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo(), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 2)  # Image.open would warn now
    with warnings.catch_warnings():
        # TIFF's reader warns by itself where it decodes.
        warnings.simplefilter("ignore" if kind == "TIFF" else "error")
        assert decode_image(data).shape == (HEIGHT, WIDTH, 3)
    assert HEIGHT * WIDTH // 2 == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("limit", [0, -1, MAX_IMAGE_PIXELS + 1])
def test_a_limit_that_could_not_be_held_is_refused(limit: int) -> None:
    with pytest.raises(PixelError, match=f"max_image_pixels must be from 1 to {MAX_IMAGE_PIXELS}, got {limit}"):
        decode_image(encoded(photo()), max_image_pixels=limit)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", ["PNG RGB", "JPEG RGB", "WEBP", "BMP", "TIFF RGB", "TIFF tiff_lzw", "AVIF"])
def test_an_image_cut_short_is_called_so(name: str) -> None:
    data = SOUND[name]
    for length in (len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(PixelError, match=rf"the {name.split()[0]} image .*cut short or damaged"):
            decode_image(data[:length])


def test_a_damaged_tiff_is_refused_where_vllm_would_take_the_rest_for_black() -> None:
    data = bytearray(encoded(photo(height=100, width=100), "TIFF", compression="tiff_lzw", exif=turned(3)))
    middle = len(data) // 2
    data[middle : middle + 200] = b"\xff" * 200
    assert loaded_by_vllm(bytes(data)).shape == (100, 100, 3)
    with pytest.raises(PixelError, match="TIFF image of 100×100 pixels is cut short or damaged"):
        decode_image(bytes(data))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty: 0 bytes"),
        (b"these are words", "15 bytes are not an image in a format taken here: JPEG, PNG, WEBP"),
        (b"<html>404</html>", "16 bytes are an HTML page"),
        (b"  <!DOCTYPE html>\n<html>", "an HTML page"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript document; render it"),
        (b"%PDF-1.7\n", "a PDF document; render its pages"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing; render it"),
        (b'\xef\xbb\xbf{"error": "not found"}', "JSON"),
        (b"8BPS\x00\x01" + bytes(40), "a Photoshop document, which is not read here; send JPEG, PNG or WEBP"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "a HEIC photo.*convert it"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(40), "a HEIC photo.*convert it"),
        (b"\0\0\0\x18ftypisom\0\0\2\0isommp41" + bytes(40), "an MP4.*send a video's frames as rgb_video"),
        (b"RIFF\0\0\0\0AVI LIST", "an AVI video"),
        (encoded(photo(), "ICO"), "an ICO icon"),
        (encoded(photo(), "JPEG2000"), "a JPEG 2000 image"),
        (encoded(photo(), "PPM"), "a PPM, PGM or PBM image"),
        (encoded(photo(), "QOI"), "a QOI image"),
        (b64encode(encoded(photo(), "JPEG")), "base64 text; decode it"),
        (b64encode(encoded(photo())), "base64 text; decode it"),
        (b"\x89PNG\r\n\x1a\n", "PNG image is cut short or damaged: its header"),
        (encoded(photo())[:16] + bytes(8) + encoded(photo())[24:], "PNG image is cut short or damaged: its header"),
        (b"GIF89a" + bytes(7) + b",", "GIF image is cut short or damaged: its header"),
    ],
)
def test_what_is_no_image_is_called_so(data: bytes, why: str) -> None:
    with pytest.raises(PixelError, match=why):
        decode_image(data)


def test_16_bit_grey_is_clipped_and_said_so_once(caplog: pytest.LogCaptureFixture) -> None:
    _say_once_that_grey_is_clipped.cache_clear()
    for _ in range(3):
        decode_image(encoded(photo("I;16")))
    assert [record.message for record in caplog.records if "16-bit grey" in record.message] == [
        caplog.records[0].message
    ]


def test_running_out_of_memory_is_an_error_of_this_image_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: ImageFile.ImageFile) -> None:
        raise MemoryError

    data = encoded(photo())
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(PixelError, match="not enough memory to decode the PNG image of 30×20"):
        decode_image(data)


SEEDS = [*SOUND.values(), encoded(photo(), exif=turned(6)), encoded(photo(), "JPEG", exif=turned(5))]
EDIT = st.tuples(
    st.sampled_from(["set", "insert", "remove", "cut"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=6),
)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(SEEDS), st.lists(EDIT, min_size=1, max_size=4))
def test_damaged_bytes_give_what_vllm_loads_or_a_pixel_error(
    seed: bytes, edits: list[tuple[str, float, bytes]]
) -> None:
    data = bytearray(seed)
    for how, where, piece in edits:
        # Half of the edits go to the first 64 bytes, where the headers are.
        position = int(where * 2 * min(64, len(data))) if where < 0.5 else int((2 * where - 1) * len(data))
        if how == "set":
            data[position : position + len(piece)] = piece
        elif how == "insert":
            data[position:position] = piece
        elif how == "remove":
            del data[position : position + len(piece)]
        else:
            del data[position:]
    try:
        rgb = decode_image(bytes(data), max_image_pixels=200_000)
    except PixelError:
        return
    assert rgb.dtype == np.uint8
    assert rgb.shape[2] == 3
    assert 0 < rgb.shape[0] * rgb.shape[1] <= 200_000
    np.testing.assert_array_equal(rgb, loaded_by_vllm(bytes(data)))


def test_a_jpeg_of_thousands_of_empty_scans_is_refused_before_it_is_decoded() -> None:
    """libjpeg goes over the whole picture for each of them."""
    buffer = BytesIO()
    Image.new("L", (4000, 3000)).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    scan = whole[whole.index(b"\xff\xda") : whole.index(b"\xff\xda") + 10]
    with pytest.raises(PixelError, match="scans, which would take too long"):
        decode_image(whole[:-2] + scan * 1000 + whole[-2:])
    assert decode_image(whole).shape == (3000, 4000, 3)


@pytest.mark.parametrize("kind", [b"tEXt", b"IDAT"])
def test_a_png_of_needless_chunks_is_refused_before_they_are_read(kind: bytes) -> None:
    """Each costs its reader as much as a large one."""
    whole = encoded(photo())
    empty = bytes(4) + kind + zlib.crc32(kind).to_bytes(4, "big")
    end = whole.index(b"IDAT") - 4
    with pytest.raises(PixelError, match="thousands of needless chunks"):
        decode_image(whole[:end] + empty * 200_000 + whole[end:])
    np.testing.assert_array_equal(decode_image(whole[:end] + empty * 20 + whole[end:]), decode_image(whole))
