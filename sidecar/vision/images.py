"""Encoded image bytes → RGB pixels, the way vLLM loads an image. Knows nothing of patches.

Orientation from EXIF first, then transparency over white, then RGB (`ImageMediaIO.load_bytes` in vLLM's
vllm/multimodal/media/image.py), with the same Pillow calls, so that an image encoded here and one that a vLLM worker
loads by itself are the same pixels.

The bytes come from strangers. Only a few formats are tried, the size in the header is judged before any pixel is
decoded, and whatever Pillow raises leaves here as a `PixelError`.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from sidecar.vision.pixels import MAX_IMAGE_PIXELS, Bytes, PixelError

# Still images that people send, each read in this process by a maintained decoder. Not here on purpose: formats that
# start other programs (EPS), need handlers from outside (WMF, GRIB, …), or that no user would miss. JPEG includes MPO,
# PNG includes APNG; of an animation the first frame is taken.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF")

_START_OF_SCAN = b"\xff\xda"  # never inside coded data, where 0xff is escaped
_USUAL_SCANS = 16
_MOST_SCANNED_PIXELS = 1 << 30

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNK_BYTES = 12  # length, type and checksum around the data
_PNG_MOST_CHUNKS = 1024  # beside those with pixels, of which large pictures have many
_PNG_MOST_PIXEL_CHUNKS = 1 << 16

_LONGEST_SIGNATURE = 16  # as many bytes as Pillow shows to its readers

Image.init()  # registers the readers


def decode_image(data: bytes, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Bytes:
    """Decode one image to uint8 RGB of shape (height, width, 3); the array may be read-only.

    `max_image_pixels`, at most `MAX_IMAGE_PIXELS`, bounds height × width as the header states them. At its peak,
    decoding holds up to 24 bytes for each pixel.

    Raises:
        PixelError: if the bytes are no image in one of `FORMATS`, are damaged or cut short, or hold too many pixels.
    """
    if not 0 < max_image_pixels <= MAX_IMAGE_PIXELS:
        raise PixelError(f"max_image_pixels must be from 1 to {MAX_IMAGE_PIXELS}, got {max_image_pixels}")
    image = _open(data, max_image_pixels)
    what = f"the {image.format} image of {image.width}×{image.height} pixels"
    _check_scans(image, data, what)
    try:
        # A damaged compressed TIFF fails once and then passes for whole: vLLM, which loads twice, takes it.
        image.load()
        return np.asarray(_rgb(_upright(image)))
    except MemoryError as error:
        raise PixelError(f"not enough memory to decode {what}; send a smaller one") from error
    except Exception as error:
        raise PixelError(f"{what} is cut short or damaged: its header could be read, its pixels could not") from error


def image_size(data: bytes, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """Height and width as the header states them, before any EXIF turn; no pixel is decoded. Raises as `decode_image`."""
    image = _open(data, max_image_pixels)
    return image.height, image.width


def _open(data: bytes, max_image_pixels: int) -> ImageFile.ImageFile:
    """Read the header alone, and judge the size that it states.

    Pillow's readers are called one by one because `Image.open` would warn of sizes by a limit of its own, which is
    global to the process, and cannot say which format it found damaged.
    """
    if data.startswith(_PNG_SIGNATURE):
        _check_chunks(data)
    for name in FORMATS:
        reader, recognises = Image.OPEN[name]
        recognised = recognises is None or recognises(data[:_LONGEST_SIGNATURE])
        if isinstance(recognised, str):
            raise PixelError(f"the image is {name}, which this installation of Pillow cannot read; send JPEG or PNG")
        if not recognised:
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
        return image
    if not data:
        raise PixelError("the image is empty: 0 bytes")
    raise PixelError(f"the {len(data)} bytes are not an image in a format taken here: {', '.join(FORMATS)}")


def _check_scans(image: Image.Image, data: bytes, what: str) -> None:
    """A progressive JPEG is gone over once for each of its scans, and an empty scan takes ten bytes: without a bound, a few
    kilobytes would keep a decoder busy for minutes. Encoders write about ten scans.

    Raises:
        PixelError: if there are far more of them than the picture's size can explain.
    """
    if image.format in ("JPEG", "MPO") or "jpeg" in str(image.info.get("compression", "")):
        scans = data.count(_START_OF_SCAN)
        if scans * image.width * image.height > _MOST_SCANNED_PIXELS and scans > _USUAL_SCANS:
            raise PixelError(f"{what} has {scans} scans, which would take too long to decode; save it again as usual")


def _check_chunks(data: bytes) -> None:
    """A PNG's header is read chunk by chunk, and an empty text chunk takes twelve bytes: without a bound, a few megabytes
    would keep a reader busy for seconds. A photo has a dozen, and its pixels in chunks that may be as small as a row.

    Raises:
        PixelError: if there are far more of them than any picture needs (PNG, third edition, section 5.3).
    """
    position, chunks, pixels = len(_PNG_SIGNATURE), 0, 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] == b"IDAT":
            pixels += 1
        else:
            chunks += 1
        if chunks > _PNG_MOST_CHUNKS or pixels > _PNG_MOST_PIXEL_CHUNKS:
            raise PixelError(
                "the PNG image has thousands of needless chunks, which take too long to read; save it again as usual"
            )
        position += _PNG_CHUNK_BYTES + length


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
        over_white.paste(layer, mask=layer.getchannel("A"))
        return over_white
    return image.convert("RGB")
