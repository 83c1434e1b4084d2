"""What bytes that are no picture taken here are, and what to send instead. Looks at the first bytes only."""

from __future__ import annotations

import re

# Still pictures that vLLM's Pillow reads and this server does not: their readers run in Python, or have no bounds.
_OTHER_PICTURES = (
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 code stream"),
    (b"\x00\x00\x01\x00", "an ICO icon"),
    (b"\x00\x00\x02\x00", "a CUR cursor"),
    (b"qoif", "a QOI image"),
    (b"8BPS", "a Photoshop document"),
    (b"DDS ", "a DDS texture"),
    (b"icns", "an ICNS icon"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image"),
    (b"\x76\x2f\x31\x01", "an OpenEXR image"),
    (b"SIMPLE  =", "a FITS image"),
)
_DOCUMENTS = (
    (b"%PDF-", "a PDF document", "render its pages and send each as PNG"),
    (b"%!PS", "a PostScript document", "render it and send PNG"),
    (b"PK\x03\x04", "a ZIP archive or an office document", "send the pictures in it one by one"),
    (b"\x1f\x8b", "gzip-compressed data", "send the picture itself"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video", "send its frames as rgb_video"),
    (b"FLV\x01", "a Flash video", "send its frames as rgb_video"),
    (b"OggS", "an Ogg file", "send pictures, or frames as rgb_video"),
    (b"ID3", "an MP3 sound", "send pictures"),
    (b"\x93NUMPY", "a NumPy array file", "send its pixels as rgb_image or patches"),
    (b"https://", "a URL", "send it as url, to a server that was started with --url-input"),
    (b"http://", "a URL", "send the picture's bytes"),
    (b"data:", "a data: URL", "send it as url, or the bytes that its base64 stands for"),
)
_HEIF = frozenset((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"))
_BASE64_SIGNATURES = (b"/9j/", b"iVBORw0KGgo", b"UklGR", b"R0lGOD", b"Qk0", b"SUkqA", b"TU0AK", b"AAAA")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_=\s-]{16,}")
_NETPBM = re.compile(rb"P[1-7]\s")


def heif_brand(data: bytes) -> bool:
    """Whether an ISO file, such as an AVIF's, holds pictures coded as HEVC: by its brands (ISO/IEC 14496-12, section 4.3)."""
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), 256, len(data))
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))}
    return bool(brands & _HEIF) and not brands & {b"avif", b"avis"}


def what_it_is(data: bytes) -> str | None:
    """A name for the bytes, and what to send instead; None if they are not known."""
    if heif_brand(data):
        return "a HEIC photo, which is not read here; convert it to JPEG or PNG (on an iPhone: Settings, Camera, Most Compatible)"
    if data[4:8] == b"ftyp":
        return "an MP4, MOV or other ISO media file; send a video's frames as rgb_video, a picture as JPEG or PNG"
    if data[:4] == b"RIFF":
        return "a RIFF file that is no WEBP, such as an AVI video or a WAV sound; send frames as rgb_video"
    for signature, name in _OTHER_PICTURES:
        if data.startswith(signature):
            return f"{name}, which is not read here; send JPEG, PNG or WEBP"
    if _NETPBM.match(data):
        return "a PPM, PGM or PBM image, which is not read here; send PNG, or its pixels as rgb_image"
    for signature, name, instead in _DOCUMENTS:
        if data.startswith(signature):
            return f"{name}; {instead}"
    return _text(data)


def _text(data: bytes) -> str | None:
    start = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip()
    lower = start.lower()
    if b"<svg" in lower:
        return "an SVG drawing; render it and send PNG"
    if lower.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page, perhaps an error or login page that came in the picture's place; send the picture itself"
    if lower.startswith(b"<?xml"):
        return "an XML document; send the picture itself"
    if start[:1] in (b"{", b"["):
        return "JSON, perhaps an error that came in the picture's place; send the picture itself"
    if start.startswith(_BASE64_SIGNATURES) and _BASE64.fullmatch(start):
        return "base64 text; decode it and send the bytes, or send it as url: data:image/jpeg;base64,…"
    return None
