"""What a picture's URL may look like: `https:` at a DNS name, or base64 `data:`. Knows nothing of networks.

Everything not expressly taken is refused, so that no two readers of a URL can find different hosts in it.
"""

from __future__ import annotations

import base64
import binascii
import re
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
_URL_SAFE = str.maketrans("-_", "+/")
_LINE_BREAKS = re.compile(r"%0[ad]|%20|\s", re.I)
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
    """The picture in a base64 data: URL.

    Raises:
        UrlRefused: if it is of another type, or not base64.
        TooLarge: if it has over `max_bytes`.
    """
    head = _DATA.match(url[:_LONGEST_DATA_HEAD])
    if head is None:
        raise UrlRefused("a data: URL must begin with data:image/jpeg;base64, or the same with another type of image")
    encoded = url[head.end() :]
    if _LINE_BREAKS.search(encoded) is not None:
        encoded = _LINE_BREAKS.sub("", encoded)
    if "%" in encoded[-9:]:
        encoded = encoded[:-9] + encoded[-9:].replace("%3D", "=").replace("%3d", "=")
    if "-" in encoded or "_" in encoded:
        encoded = encoded.translate(_URL_SAFE)
        encoded += "=" * (-len(encoded) % 4)  # this form often goes without
    if len(encoded) // 4 * 3 > max_bytes + 2:  # at most two of the last three bytes are padding
        raise TooLarge(f"the data: URL's picture has over {max_bytes} bytes, the limit")
    try:
        picture = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UrlRefused("the data: URL is not whole base64") from error
    if len(picture) > max_bytes:
        raise TooLarge(f"the data: URL's picture has over {max_bytes} bytes, the limit")
    check_signature(picture)
    return picture


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
