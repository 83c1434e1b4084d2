"""Whether certificates are valid now: X.509's dates (RFC 5280, 4.1.2.5), which Python's ssl reads of a connected peer only."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_INTEGER, _VERSION, _UTC_TIME = 0x02, 0xA0, 0x17
_SOON = timedelta(days=7)


def complaint_about(pem: bytes, now: datetime | None = None) -> str | None:
    """What is wrong with the dates of a PEM file's certificates, or None. Content that is no certificate has no dates."""
    now = now or datetime.now(UTC)
    for begins, ends in _validities(pem):
        if ends <= now:
            return f"a certificate in it expired at {ends:%Y-%m-%d %H:%M} UTC, and callers will refuse it; renew it"
        if begins > now:
            return f"a certificate in it is not valid before {begins:%Y-%m-%d %H:%M} UTC; does this machine's clock go right?"
        if ends - now < _SOON:
            return f"a certificate in it expires at {ends:%Y-%m-%d %H:%M} UTC; renew it"
    return None


def _validities(pem: bytes) -> Iterator[tuple[datetime, datetime]]:
    for found in _PEM.findall(pem):
        try:
            yield _validity(ssl.PEM_cert_to_DER_cert(found.decode("ascii")))
        except (ValueError, IndexError):  # whoever uses the certificate says more about it
            continue


def _validity(der: bytes) -> tuple[datetime, datetime]:
    """Certificate → tbsCertificate → (version), serialNumber, signature, issuer, validity → notBefore, notAfter.

    Raises:
        ValueError, IndexError: if it is no certificate.
    """
    (_, certificate), *_ = _elements(der)
    (_, to_be_signed), *_ = _elements(certificate)
    fields = list(_elements(to_be_signed))
    if fields[0][0] == _VERSION:
        del fields[0]
    if fields[0][0] != _INTEGER:
        raise ValueError("no serial number")
    (first, begins), (second, ends) = _elements(fields[3][1])
    return _time(first, begins), _time(second, ends)


def _elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Tags and contents of what follows one another (X.690, 8.1)."""
    at = 0
    while at < len(der):
        tag, size = der[at], der[at + 1]
        at += 2
        if size & 0x80:
            octets = size & 0x7F
            size = int.from_bytes(der[at : at + octets], "big")
            at += octets
        yield tag, der[at : at + size]
        at += size


def _time(tag: int, content: bytes) -> datetime:
    text = content.decode("ascii")
    if tag == _UTC_TIME:  # its years are from 1950 to 2049
        text = ("19" if text[:2] >= "50" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
