"""Encoded image bytes → RGB pixels, the way vLLM loads an image. Knows nothing of patches.

Orientation from EXIF first, then transparency over white, then RGB (`ImageMediaIO.load_bytes` in vLLM's
vllm/multimodal/media/image.py), with the same Pillow calls, so that an image encoded here and one that a vLLM worker
loads by itself are the same pixels.

The bytes come from strangers. Only a few formats are tried, the size in the header is judged before any pixel is
decoded, and whatever Pillow raises leaves here as a `PixelError`.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from sidecar.vision.avif import check_frames
from sidecar.vision.headers import check_header, check_tags
from sidecar.vision.kinds import heif_brand, what_it_is
from sidecar.vision.pixels import MAX_IMAGE_PIXELS, Bytes, PixelError

# Still images that people send, each read in this process by a maintained decoder. Not here on purpose: formats that
# start other programs (EPS), need handlers from outside (WMF, GRIB, …), or that no user would miss. JPEG includes MPO,
# PNG includes APNG; of an animation the first frame is taken.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF")

_START_OF_SCAN = b"\xff\xda"  # never inside coded data, where 0xff is escaped
_USUAL_SCANS = 16
_MOST_SCANNED_PIXELS = 1 << 30

# Pillow decodes run-length BMP in Python, byte by byte and pixel by pixel: so many of both take a second.
_MOST_RUN_LENGTH_WORK = 1 << 22

# Bytes that a pixel takes while it is decoded, beside the picture itself: buffers of the decoders' own, as measured.
_DECODER_BYTES = {"WEBP": 12, "AVIF": 14, "TIFF": 8, "GIF": 1}
_PROGRESSIVE_BYTES = 6  # coefficients of the whole picture
_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "LA": 4, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
_LAYER_BYTES = 4

_LONGEST_SIGNATURE = 16  # as many bytes as Pillow shows to its readers

logger = logging.getLogger(__name__)

Image.init()  # registers the readers


def decode_image(data: bytes, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Bytes:
    """Decode one image to uint8 RGB of shape (height, width, 3); the array may be read-only. As `load_image`."""
    return np.asarray(load_image(data, max_image_pixels=max_image_pixels))


def load_image(data: bytes, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode one image to Pillow's RGB, upright.

    `max_image_pixels`, at most `MAX_IMAGE_PIXELS`, bounds height × width as the header states them. At its peak, decoding holds
    about as many bytes as `image_header` said.

    Raises:
        PixelError: if the bytes are no image in one of `FORMATS`, are damaged or cut short, or hold too many pixels; if reading
            or decoding them would take far more work than their size explains.
    """
    if not 0 < max_image_pixels <= MAX_IMAGE_PIXELS:
        raise PixelError(f"max_image_pixels must be from 1 to {MAX_IMAGE_PIXELS}, got {max_image_pixels}")
    image = _open(data, max_image_pixels)
    what = f"the {image.format} image of {image.width}×{image.height} pixels"
    _check_work(image, data, what)
    try:
        # A damaged compressed TIFF fails once and then passes for whole: vLLM, which loads twice, takes it.
        image.load()
        if image.mode.startswith("I;16"):
            _say_once_that_grey_is_clipped()
        for blob in (image.info.get("exif"), _raw_profile(image)):
            if isinstance(blob, bytes):
                check_tags(blob, "the image's EXIF block")
        return _rgb(_upright(image))
    except PixelError:
        raise
    except MemoryError as error:
        raise PixelError(f"not enough memory to decode {what}; send a smaller one") from error
    except Exception as error:
        raise PixelError(f"{what} is cut short or damaged: its header could be read, its pixels could not") from error


@dataclass(frozen=True, slots=True)
class Header:
    """Of an encoded picture, before any EXIF turn.

    Attributes:
        decode_bytes: about what decoding holds at its peak.
    """

    height: int
    width: int
    decode_bytes: int


def image_header(data: bytes, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Header:
    """What the header states; no pixel is decoded. Raises as `load_image`."""
    image = _open(data, max_image_pixels)
    _check_work(image, data, f"the {image.format} image of {image.width}×{image.height} pixels")
    pixels = image.width * image.height
    padding = max(0, _tile_pixels(image) - pixels) * _DECODER_BYTES["TIFF"]
    return Header(image.height, image.width, pixels * _bytes_per_pixel(image) + padding)


def image_size(data: bytes, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """Height and width as the header states them, before any EXIF turn; no pixel is decoded. Raises as `load_image`."""
    header = image_header(data, max_image_pixels=max_image_pixels)
    return header.height, header.width


def is_picture(data: bytes) -> bool:
    """Whether the first bytes are those of a picture in one of `FORMATS`; 256 are enough."""
    prefix = bytes(data[:_LONGEST_SIGNATURE])
    recognised = any((accepts := Image.OPEN[name][1]) is not None and accepts(prefix) for name in FORMATS)
    return recognised and (prefix[4:8] != b"ftyp" or _is_avif(data))


def _is_avif(data: bytes) -> bool:
    """Its reader takes any HEIF container, and finds only then that its pictures are HEVC."""
    return not heif_brand(data)


def _bytes_per_pixel(image: ImageFile.ImageFile) -> int:
    """As it lies in memory, what the decoder holds beside it, and the copies on the way to RGB: one of them at a time for a
    picture that is turned, laid over white, or converted."""
    own = _MODE_BYTES.get(image.mode, _LAYER_BYTES)
    decoder = _DECODER_BYTES.get(image.format or "", 0)
    if image.info.get("progressive"):
        decoder += _PROGRESSIVE_BYTES
    if image.mode == "RGB":
        copies = _LAYER_BYTES  # if it is turned
    elif image.mode == "RGBA":
        copies = 2 * _LAYER_BYTES
    else:
        copies = 3 * _LAYER_BYTES
    return own + max(decoder, copies)


def _open(data: bytes, max_image_pixels: int) -> ImageFile.ImageFile:
    """Read the header alone, and judge the size that it states.

    Pillow's readers are called one by one because `Image.open` would warn of sizes by a limit of its own, which is
    global to the process, and cannot say which format it found damaged.
    """
    check_header(data)
    for name in FORMATS:
        reader, recognises = Image.OPEN[name]
        recognised = recognises is None or recognises(data[:_LONGEST_SIGNATURE])
        if isinstance(recognised, str):
            raise PixelError(f"the image is {name}, which this installation of Pillow cannot read; send JPEG or PNG")
        if not recognised or (name == "AVIF" and not _is_avif(data)):
            continue
        try:
            image = reader(BytesIO(data), "")
        except Image.DecompressionBombError as error:
            # WEBP and GIF readers look at the size themselves; their limit is MAX_IMAGE_PIXELS.
            limit = f"the limit is {max_image_pixels} (max_image_pixels)"
            raise PixelError(f"the {name} image has over {MAX_IMAGE_PIXELS} pixels; {limit}") from error
        except Exception as error:
            raise PixelError(f"the {name} image is cut short or damaged: its header cannot be read") from error
        if (count := image.width * image.height) > max_image_pixels:
            raise PixelError(
                f"the {name} image of {image.width}×{image.height} has {count} pixels; the limit is {max_image_pixels} "
                "(max_image_pixels)"
            )
        if name == "AVIF":
            check_frames(data, image.width, image.height)
        return image
    if not data:
        raise PixelError("the image is empty: 0 bytes")
    taken = ", ".join(FORMATS)
    if (known := what_it_is(data)) is not None:
        raise PixelError(f"the {len(data)} bytes are {known} (taken here: {taken})")
    raise PixelError(f"the {len(data)} bytes are not an image in a format taken here: {taken}")


def _check_work(image: ImageFile.ImageFile, data: bytes, what: str) -> None:
    """A progressive JPEG is gone over once for each of its scans, and an empty scan takes ten bytes: without a bound, a few
    kilobytes would keep a decoder busy for minutes. Encoders write about ten scans, for each strip or tile of a TIFF.

    Raises:
        PixelError: if there are far more of them than the picture's size can explain, or it is decoded in Python and large.
    """
    if image.format in ("JPEG", "MPO") or "jpeg" in str(image.info.get("compression", "")):
        pieces = _pieces(image)
        scans = -(-data.count(_START_OF_SCAN) // pieces)
        if scans * image.width * image.height > _MOST_SCANNED_PIXELS and scans > _USUAL_SCANS:
            raise PixelError(f"{what} has {scans} scans, which would take too long to decode; save it again as usual")
    run_lengths = image.tile and image.tile[0].codec_name == "bmp_rle"
    if run_lengths and image.width * image.height + len(data) > _MOST_RUN_LENGTH_WORK:
        raise PixelError(
            f"{what} is compressed by run lengths, which are read up to {_MOST_RUN_LENGTH_WORK} pixels and bytes; send PNG"
        )


def _pieces(image: ImageFile.ImageFile) -> int:
    """The strips or tiles of a TIFF."""
    if image.format != "TIFF":
        return 1
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    return max(1, *(len(offsets) for tag in (273, 324) if isinstance(offsets := tags.get(tag), tuple)), 1)


def _tile_pixels(image: ImageFile.ImageFile) -> int:
    """Pixels of one tile of a TIFF, which is decoded whole, even where it is larger than the picture."""
    if image.format != "TIFF":
        return 0
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    width, height = tags.get(322), tags.get(323)
    return width * height if isinstance(width, int) and isinstance(height, int) else 0


def _raw_profile(image: Image.Image) -> bytes | None:
    """The EXIF block that ImageMagick writes into a PNG as text."""
    text = image.info.get("Raw profile type exif")
    if not isinstance(text, str):
        return None
    with suppress(ValueError):
        return bytes.fromhex("".join(text.split("\n")[3:]))
    return None


@cache
def _say_once_that_grey_is_clipped() -> None:
    logger.warning(
        "a picture of 16-bit grey was clipped to its lowest 256 levels, as vLLM does: it comes out almost white. Scale such "
        "pictures to 8 bits before they are sent"
    )


def _upright(image: Image.Image) -> Image.Image:
    """Turn a loaded image as its EXIF orientation says."""
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # Like vLLM, take an EXIF block that cannot be read for none.
        return image
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """Lay transparency over white and convert to RGB."""
    if image.mode == "RGB":  # even where one colour is declared transparent: vLLM overlooks that too
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        over_white = Image.new("RGB", image.size, "white")
        over_white.paste(layer, mask=layer)  # by its alpha, without a copy of it
        return over_white
    return image.convert("RGB")
