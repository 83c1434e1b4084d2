"""What a picture's URL may look like: `https:` at a DNS name, or base64 `data:`. Knows nothing of networks.

Everything not expressly taken is refused, so that no two readers of a URL can find different hosts in it.
"""

from __future__ import annotations

import binascii
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urljoin

from sidecar.errors import TooLarge, UrlRefused
from sidecar.vision.images import FORMATS, is_picture
from sidecar.vision.kinds import what_it_is

HTTPS_PORT = 443
_MOST_CHARS = 8192

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
# No notation of an address has a last label that begins with a letter (WHATWG URL, "ends in a number"), and a single label
# would be a name of the local network.
_HOST = rf"(?=.{{1,253}}(?::|\Z))(?:{_LABEL}\.)+[a-z][a-z0-9-]{{0,61}}[a-z0-9]"
_AUTHORITY = re.compile(rf"(?P<host>{_HOST})(?::(?P<port>\d{{1,5}}))?", re.I | re.ASCII)
_HTTPS = re.compile(r"https://(?P<authority>[^/?#]*)(?P<path>/[^?#]*)?(?:\?(?P<query>[^#]*))?(?:#.*)?", re.I)
# RFC 2397, with parameters such as a charset. What the type says does not matter: the bytes decide.
_DATA = re.compile(r"data:image/[a-z0-9.+-]+(?:;[a-z0-9.+-]+=[^;,\s]*)*;base64,", re.I)
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_WHITESPACE = b" \t\n\r\v\f"
_ESCAPES = ((b"%0a", b""), (b"%0A", b""), (b"%0d", b""), (b"%0D", b""), (b"%20", b""), (b"%3d", b"="), (b"%3D", b"="))
# Each step on so many characters takes about a millisecond, during which no other thread runs.
_CHUNK_CHARS = 1 << 20
_LONGEST_DATA_HEAD = 256
TAKEN = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
_CHARS = re.compile(r"[!-\[\]-~]*")  # printable ASCII but for the space and the backslash

LONGEST_SIGNATURE_BYTES = 256  # an AVIF's list of brands


@dataclass(frozen=True, slots=True)
class Target:
    """An https URL taken apart: `host` in lower case, `path` and `query` as they were written, for signatures cover them."""

    host: str
    port: int
    path: str
    query: str

    def redirected(self, location: str) -> Target:
        """Where a Location header leads from here.

        Raises:
            UrlRefused: as `parse_https`.
        """
        _check_chars(location)  # before joining, which would drop some in silence
        return parse_https(urljoin(f"https://{self.host}:{self.port}{self.path}", location))


def parse_https(url: str) -> Target:
    """Raises:
    UrlRefused: if the URL is not https, or its host is no DNS name in plain ASCII.
    """
    _check_chars(url)
    match = _HTTPS.fullmatch(url)
    if match is None:
        raise UrlRefused("the URL must begin with https:// or be a base64 data: URL of an image")
    host, port = parse_authority(match["authority"])
    return Target(host, port, match["path"] or "/", match["query"] or "")


def parse_authority(text: str) -> tuple[str, int]:
    """Host in lower case and port of `name` or `name:port`.

    Raises:
        UrlRefused: if it is anything else.
    """
    if "@" in text:
        raise UrlRefused("the URL must not hold a user name or password")
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        raise UrlRefused("the URL's host must be a full DNS name, as images.example.com; addresses are not taken")
    port = int(match["port"] or HTTPS_PORT)
    if not 0 < port < 1 << 16:
        raise UrlRefused(f"the URL's port must be from 1 to 65535, got {port}")
    return match["host"].lower(), port


def is_data_url(url: str) -> bool:
    return url[:5].lower() == "data:"


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """Decode the picture in a base64 data: URL, in chunks, so that the event loop runs meanwhile: call it on a thread.

    At its peak it holds one and a half times the URL's length, beside the URL.

    Raises:
        UrlRefused: if it is of another type, or not base64.
        TooLarge: if it has over `max_bytes`.
    """
    head = _DATA.match(url[:_LONGEST_DATA_HEAD])
    if head is None:
        raise UrlRefused("a data: URL must begin with data:image/jpeg;base64, or the same with another type of image")
    try:
        picture = b"".join(_decoded(url, head.end(), max_bytes))
    except (binascii.Error, UnicodeEncodeError) as error:
        raise UrlRefused("the data: URL is not whole base64") from error
    check_signature(picture)
    return picture


def _decoded(url: str, start: int, max_bytes: int) -> Iterator[bytes]:
    rest = b""  # of the last group of four characters
    size = 0
    url_safe = padded = False
    while start < len(url):
        end = min(start + _CHUNK_CHARS, len(url))
        if end < len(url) and (escape := url.rfind("%", end - 2, end)) >= 0:
            end = escape  # it may go on in the next chunk
        text = url[start:end].encode("ascii")
        start = end
        if b"%" in text:
            for written, meant in _ESCAPES:
                text = text.replace(written, meant)
        url_safe = url_safe or b"-" in text or b"_" in text
        text = rest + text.translate(_URL_SAFE, _WHITESPACE)
        last = start == len(url)
        if last and url_safe:
            text += b"=" * (-len(text) % 4)  # this form often goes without
        whole = len(text) if last else len(text) // 4 * 4
        text, rest = text[:whole], text[whole:]
        if text and padded:
            raise binascii.Error("more follows the padding")
        decoded = binascii.a2b_base64(text, strict_mode=True)
        padded = padded or len(decoded) < whole // 4 * 3
        size += len(decoded)
        if size > max_bytes:
            raise TooLarge(f"the data: URL's picture has over {max_bytes} bytes, the limit")
        yield decoded
        time.sleep(0)  # lets go of the interpreter's lock, for which the event loop waits


def check_signature(data: bytes | bytearray) -> None:
    """Raises:
    UrlRefused: if the bytes, of which the first `LONGEST_SIGNATURE_BYTES` are enough, begin no picture of a kind taken here.
    """
    start = bytes(data[:LONGEST_SIGNATURE_BYTES])
    if not is_picture(start):
        what = what_it_is(start)
        raise UrlRefused(f"the URL leads to {what}" if what else f"the URL leads to bytes that are no {TAKEN}")


def _check_chars(url: str) -> None:
    if len(url) > _MOST_CHARS:
        raise UrlRefused(f"the URL has {len(url)} characters; the limit is {_MOST_CHARS}")
    if not _CHARS.fullmatch(url):
        raise UrlRefused(
            "the URL must be plain ASCII without spaces and backslashes: write a name as xn--…, others as %XX"
        )
