"""From the bytes of a request to its message.

Parsed, a field of two bytes can cost forty times that: an empty item, or an empty message in a `oneof` that another one replaces
(the parser frees neither before the request ends). So the fields are counted on the wire, at every depth, before anything is
parsed; and strings are judged by their length, since one character beyond ASCII makes Python hold four bytes for each.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

from sidecar.errors import InvalidRequest
from sidecar.pb import encoder_pb2

# What a newer client may send beside items.
_UNKNOWN_FIELDS = 64
# Fields in one item, at all depths. This version of the contract has 12 at most.
_MOST_ITEM_FIELDS = 32
# Parsing them happens on the event loop.
_MOST_LEASES = 4096
# Beyond it the whole request is refused; a key over MAX_KEY_BYTES is its item's fault alone.
_MOST_STRING_BYTES = 1 << 20

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_URL = "url"  # the one string that may be long: it may hold a picture in base64


def parse_request(data: bytes, max_items: int) -> encoder_pb2.EncodeRequest:
    """Parse a request of 1 to `max_items` items.

    Raises:
        InvalidRequest: if there are none or more of them, or the bytes are no EncodeRequest.
    """
    too_many = f"the request has far more than the {max_items} items that this server takes at once"
    _check_fields(data, encoder_pb2.EncodeRequest.DESCRIPTOR, max_items + _UNKNOWN_FIELDS, too_many)
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
    too_many = f"the request has far more than the {max_items} keys that this server takes at once"
    _check_fields(data, encoder_pb2.FetchRequest.DESCRIPTOR, max_items + _UNKNOWN_FIELDS, too_many)
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
    too_many = f"the request has more than {_MOST_LEASES} leases; send several"
    _check_fields(data, encoder_pb2.ReleaseRequest.DESCRIPTOR, _MOST_LEASES, too_many)
    try:
        return encoder_pb2.ReleaseRequest.FromString(data)
    except DecodeError as error:
        raise InvalidRequest(f"the request is not an epd.encoder.v1.ReleaseRequest: {error}") from None


def _check_fields(data: bytes, message: Any, most: int, too_many: str) -> None:
    """Count a request's fields on the wire (protobuf's "Encoding"), skipping over contents by their length. Damage is left to the
    parser, which stops where it lies.

    Raises:
        InvalidRequest: with `too_many` if the message has over `most` fields itself; or if one of its items has far more than the
            contract has, or a string is too long.
    """
    try:
        _count_fields(data, 0, len(data), message, most, too_many, top=True)
    except IndexError:
        return


def _count_fields(
    data: bytes, position: int, end: int, message: Any, left: int, too_many: str, *, top: bool = False
) -> int:
    """The fields from `position` to `end`, those inside of known messages included.

    Returns:
        How many of `left` are left.

    Raises:
        InvalidRequest: as `_check_fields`.
        IndexError: where a field does not end.
    """
    known = message.fields_by_number
    while position < end:
        if not left:
            raise InvalidRequest(too_many)
        left -= 1
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == _VARINT:
            _, position = _varint(data, position)
        elif kind == _LENGTH_DELIMITED:
            length, position = _varint(data, position)
            stop = min(position + length, end)
            if (field := known.get(tag >> 3)) is not None:
                if field.message_type is None:
                    _check_string(data, position, stop, field)
                elif top:
                    what = f"an item of the request has over {_MOST_ITEM_FIELDS} fields; send each of them once"
                    _count_fields(data, position, stop, field.message_type, _MOST_ITEM_FIELDS, what)
                else:
                    left = _count_fields(data, position, stop, field.message_type, left, too_many)
            position += length
        elif kind in (_FIXED64, _FIXED32):
            position += 8 if kind == _FIXED64 else 4
    return left


def _check_string(data: bytes, start: int, stop: int, field: FieldDescriptor) -> None:
    """Raises:
    InvalidRequest: if it is a string that is longer than any this server takes, or a long URL that is no ASCII.
    """
    if field.type != FieldDescriptor.TYPE_STRING or stop - start <= _MOST_STRING_BYTES:
        return
    if field.name != _URL:
        what = field.name.removesuffix("s")
        raise InvalidRequest(f"the {what} has over {_MOST_STRING_BYTES} bytes; send a hash instead")
    if not data[start:stop].isascii():
        raise InvalidRequest("the url has characters beyond ASCII; write a name as xn--…, others as %XX")


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
