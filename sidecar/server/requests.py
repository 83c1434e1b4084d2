"""From the bytes of a request to its message.

gRPC would parse them before anybody could look at them, and a parsed item costs forty times the two bytes that an empty one
takes on the wire: a message within its limit could fill the memory. So the items are counted first.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from sidecar.errors import InvalidRequest
from sidecar.pb import encoder_pb2

# What a newer client may send beside items.
_UNKNOWN_FIELDS = 64
# Parsing them happens on the event loop.
_MOST_LEASES = 4096

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


def parse_request(data: bytes, max_items: int) -> encoder_pb2.EncodeRequest:
    """Parse a request of 1 to `max_items` items.

    Raises:
        InvalidRequest: if there are none or more of them, or the bytes are no EncodeRequest.
    """
    if _has_more_fields(data, max_items + _UNKNOWN_FIELDS):
        raise InvalidRequest(f"the request has far more than the {max_items} items that this server takes at once")
    try:
        request = encoder_pb2.EncodeRequest.FromString(data)
    except DecodeError as error:
        raise InvalidRequest(f"the request is not an epd.encoder.v1.EncodeRequest: {error}") from None
    if not request.items:
        raise InvalidRequest("the request has no items; send at least one")
    if len(request.items) > max_items:
        raise InvalidRequest(f"the request has {len(request.items)} items, this server takes {max_items} at once")
    return request


def parse_fetch(data: bytes, max_items: int) -> encoder_pb2.FetchRequest:
    """Parse a request of 1 to `max_items` keys.

    Raises:
        InvalidRequest: if there are none or more of them, or the bytes are no FetchRequest.
    """
    if _has_more_fields(data, max_items + _UNKNOWN_FIELDS):
        raise InvalidRequest(f"the request has far more than the {max_items} keys that this server takes at once")
    try:
        request = encoder_pb2.FetchRequest.FromString(data)
    except DecodeError as error:
        raise InvalidRequest(f"the request is not an epd.encoder.v1.FetchRequest: {error}") from None
    if not 0 < len(request.keys) <= max_items:
        raise InvalidRequest(f"send from 1 to {max_items} keys, got {len(request.keys)}")
    return request


def parse_release(data: bytes) -> encoder_pb2.ReleaseRequest:
    """Raises:
    InvalidRequest: if there are too many leases, or the bytes are no ReleaseRequest.
    """
    if _has_more_fields(data, _MOST_LEASES):
        raise InvalidRequest(f"the request has more than {_MOST_LEASES} leases; send several")
    try:
        return encoder_pb2.ReleaseRequest.FromString(data)
    except DecodeError as error:
        raise InvalidRequest(f"the request is not an epd.encoder.v1.ReleaseRequest: {error}") from None


def _has_more_fields(data: bytes, most: int) -> bool:
    """Whether a message has over `most` fields on its top level (protobuf's "Encoding"). Damage is left to the parser,
    which stops where it lies."""
    position = 0
    try:
        for _ in range(most):
            tag, position = _varint(data, position)
            kind = tag & 7
            if kind == _VARINT:
                _, position = _varint(data, position)
            elif kind == _LENGTH_DELIMITED:
                length, position = _varint(data, position)
                position += length
            elif kind in (_FIXED64, _FIXED32):
                position += 8 if kind == _FIXED64 else 4
    except IndexError:
        return False
    return position < len(data)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position` and where it ends.

    Raises:
        IndexError: if it does not end.
    """
    number = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    return number, position
