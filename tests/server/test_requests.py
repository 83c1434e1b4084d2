"""Requests that are wrong as a whole get a status of their own; odd ones that are right are served."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st
from pictures import encoded, picture
from servers import Server

from sidecar.client import Embedding, EncoderClient, RequestTooLargeError
from sidecar.errors import InvalidRequest
from sidecar.items import image_item, patches_item, rgb_image_item, rgb_video_item
from sidecar.pb import encoder_pb2 as pb
from sidecar.server.requests import parse_request
from sidecar.vision.dtypes import DType
from sidecar.vision.grid import Grid

PNG = encoded(picture(56, 56))
GOOD = image_item(PNG)
MB = 1 << 20
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[EncoderClient]:
    with server.client() as connected:
        yield connected


@pytest.fixture(autouse=True)
def still_answering(client: EncoderClient) -> Iterator[None]:
    yield
    assert isinstance(client.encode([GOOD], timeout_s=10)[0], Embedding)


def send(server: Server, message: bytes) -> list[pb.EncodeResponse]:
    """Any bytes as a request."""
    with server.channel() as channel:
        call = channel.unary_stream("/epd.encoder.v1.Encoder/Encode", None, pb.EncodeResponse.FromString)
        return list(call(message, timeout=30))


def refusal(server: Server, message: bytes) -> tuple[grpc.StatusCode, str, list[str]]:
    """The status that a request gets, its message, and the reasons in its details."""
    with pytest.raises(grpc.RpcError) as raised:
        send(server, message)
    told = raised.value.details() or ""
    assert "Traceback" not in told and ".py" not in told
    status = rpc_status.from_call(cast(grpc.Call, raised.value))
    reasons = []
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        assert detail.Unpack(info)
        reasons.append(info.reason)
    return raised.value.code(), told, reasons


def test_a_request_of_no_items_is_refused(server: Server) -> None:
    assert refusal(server, b"") == (INVALID, "the request has no items; send at least one", ["INVALID_REQUEST"])


def test_as_many_items_as_allowed_are_served_and_one_more_is_not(server: Server, client: EncoderClient) -> None:
    assert len(client.encode([GOOD] * 16)) == 16
    code, told, _ = refusal(server, pb.EncodeRequest(items=[GOOD] * 17).SerializeToString())
    assert (code, told) == (INVALID, "the request has 17 items, this server takes 16 at once")


def test_millions_of_empty_items_take_no_memory(server: Server) -> None:
    empty = pb.EncodeRequest(items=[pb.Item()]).SerializeToString()
    with server.growing_less_than(100 * MB):  # parsed they would take 800
        code, told, _ = refusal(server, empty * 10_000_000)
    assert code is INVALID and "more than the 16 items" in told


def length_delimited(field: int, content: bytes) -> bytes:
    size, length = len(content), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([field << 3 | 2]) + length + bytes([size]) + content


# Each empty message in a oneof replaces the one before it, which the parser keeps until the request ends.
ALTERNATING = (
    pb.Item(rgb_image=pb.RgbImage()).SerializeToString() + pb.Item(rgb_video=pb.RgbVideo()).SerializeToString()
)


@pytest.mark.parametrize(
    "message",
    [
        length_delimited(1, ALTERNATING * 8_000_000),
        length_delimited(1, length_delimited(5, b"\x0a\x00" * 16_000_000)),
        length_delimited(1, b"\x0b\x0c" * 16_000_000),
        length_delimited(1, b"\xf8\x07\x00" * 10_000_000),
        b"\xfa\x07\x00" * 10_000_000,
    ],
    ids=["a oneof that alternates", "one grid many times", "groups", "unknown fields of an item", "unknown fields"],
)
def test_fields_that_no_client_sends_take_no_memory_and_no_time(server: Server, message: bytes) -> None:
    with server.growing_less_than(150 * MB):  # the message itself, twice; parsed, the first would take 600 MB more
        code, told, reasons = refusal(server, message)
    assert (code, reasons) == (INVALID, ["INVALID_REQUEST"])
    assert "over 32 fields" in told or "far more than the 16 items" in told


def test_a_url_that_python_would_hold_fourfold_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="beyond ASCII"):
        parse_request(
            pb.EncodeRequest(items=[pb.Item(url="https://" + "a" * (2 << 20) + "\U0001f600")]).SerializeToString(), 8
        )


def test_a_message_of_300_mb_is_refused_without_being_held(server: Server, client: EncoderClient) -> None:
    with server.growing_less_than(100 * MB):
        code, told, _ = refusal(server, bytes(300 * MB))
        with pytest.raises(RequestTooLargeError, match="larger than the server takes"):
            client.encode([pb.Item(image=bytes(65 * MB))])
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(64 * MB) in told  # what would do


@pytest.mark.parametrize(
    "message",
    [b"\xff\xff\xff\xff", b"\x0a\x04\x0a\x02\xff\xfe", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x05\x0a", b'{"items": []}'],
    ids=["no field", "a key that is no UTF-8", "a length beyond the end", "an end before the end", "JSON"],
)
def test_bytes_that_are_no_request_are_the_callers_fault(server: Server, message: bytes) -> None:
    logged = len(server.log.read_text())
    code, told, _ = refusal(server, message)
    assert code is INVALID and "is not an epd.encoder.v1.EncodeRequest" in told
    assert "Traceback" not in server.log.read_text()[logged:]


@given(st.binary(max_size=60) | st.lists(st.builds(pb.Item, key=st.text(max_size=3)), max_size=12).map(
    lambda items: pb.EncodeRequest(items=items).SerializeToString()
))  # fmt: skip
def test_counting_items_first_changes_nothing_for_an_honest_request(message: bytes) -> None:
    try:
        expected = pb.EncodeRequest.FromString(message)
    except DecodeError:
        expected = pb.EncodeRequest()
    if 1 <= len(expected.items) <= 8:
        assert parse_request(message, 8) == expected
    else:
        with pytest.raises(InvalidRequest):
            parse_request(message, 8)


# Field 1000 in every form that protobuf's wire format has: a varint, eight bytes, a length and bytes, four bytes.
UNKNOWN = [b"\xc0\x3e\xff\x01", b"\xc1\x3e" + bytes(8), b"\xc2\x3e\x03new", b"\xc5\x3e" + bytes(4)]


@given(st.lists(st.sampled_from(UNKNOWN), min_size=60, max_size=80), st.integers(0, 80))
def test_a_few_unknown_fields_are_passed_over_and_a_flood_is_refused(unknown: list[bytes], place: int) -> None:
    item = pb.EncodeRequest(items=[pb.Item(key="k")]).SerializeToString()
    message = b"".join([*unknown[:place], item, *unknown[place:]])
    if len(unknown) < 8 + 64:
        assert parse_request(message, 8).items[0].key == "k"
    else:
        with pytest.raises(InvalidRequest, match="far more than the 8 items"):
            parse_request(message, 8)


def test_fields_that_only_newer_clients_know_are_passed_over(server: Server) -> None:
    """In the item, and beside it."""
    unknown = b"".join(UNKNOWN)
    item = GOOD.SerializeToString() + unknown
    message = unknown + b"\x0a" + _varint(len(item)) + item + unknown
    header, chunk = send(server, message)
    assert header.embedding.tokens == 4
    assert len(chunk.chunk.data) == header.embedding.size_bytes == 4 * 128 * 4


KEYS = [
    *("../../etc/passwd", "/etc/passwd", "..", ".", "a/b", "C:\\a", "~", "$(touch pwned)", "-rf", "a\0b", "\0", "\n"),
    *("ключ 🔑", "k" * 10_000, "k" * 65_536, "epd", ".tmp"),
]


def test_keys_are_data_whatever_they_look_like(server: Server, client: EncoderClient) -> None:
    def files() -> set[Path]:
        return set(server.log.parent.parent.rglob("*"))

    before = files()
    for start in range(0, len(KEYS), 16):
        keys = KEYS[start : start + 16]
        results = client.encode([image_item(PNG, key=key) for key in keys])
        assert [result.key for result in results if isinstance(result, Embedding)] == keys
    assert files() == before


def test_one_key_for_two_contents_gives_each_its_own(client: EncoderClient) -> None:
    """In one request, after one another, and where the key is asked for alone: then it stands for the later one, whole."""
    other = encoded(picture(56, 84, seed=77))
    alone = [client.encode_image(image).data for image in (PNG, other)]
    assert not np.array_equal(alone[0], alone[1])
    first, second = client.encode([image_item(PNG, key="same"), image_item(other, key="same")])
    assert isinstance(first, Embedding) and isinstance(second, Embedding)
    assert np.array_equal(first.data, alone[0]) and np.array_equal(second.data, alone[1])
    for image, wanted in ((other, alone[1]), (PNG, alone[0]), (other, alone[1])):
        again = client.encode([image_item(image, key="same")])[0]
        assert isinstance(again, Embedding) and again.cached and again.key == "same"
        by_key, no_content = client.fetch(["same"])[0], client.encode([pb.Item(key="same")])[0]
        for known in (again, by_key, no_content):
            assert isinstance(known, Embedding) and np.array_equal(known.data, wanted)
    bounded = client.encode([image_item(PNG, key="same", max_pixels=28 * 28 * 2)])[0]
    assert isinstance(bounded, Embedding) and bounded.tokens < first.tokens and bounded.key == "same"


@pytest.mark.parametrize("kind", ["image", "rgb_image", "rgb_video", "patches", "large"])
def test_every_kind_of_content_is_looked_at(client: EncoderClient, kind: str) -> None:
    side = 28 * 16 if kind == "large" else 56  # over what is hashed on the event loop

    def made(seed: int) -> pb.Item:
        pixels = picture(side, side, seed)
        if kind == "image":
            return image_item(encoded(pixels), key=kind)
        if kind == "rgb_video":
            return rgb_video_item(np.stack([pixels, pixels]), key=kind)
        if kind == "patches":
            values = np.random.default_rng(seed).integers(0, 256, (16, 1176), np.uint8)
            return patches_item(values, Grid(1, 4, 4), DType.UINT8, key=kind)
        return rgb_image_item(pixels, key=kind)

    items = [made(1), made(2)]
    results = client.encode([*items, items[0]], timeout_s=60)
    with_key = [result.data for result in results if isinstance(result, Embedding)]
    for item in items:
        item.key = ""
    results = client.encode(items, timeout_s=60)
    without = [result.data for result in results if isinstance(result, Embedding)]
    assert not np.array_equal(without[0], without[1])
    for ours, theirs in zip(with_key, [*without, without[0]], strict=True):
        assert np.array_equal(ours, theirs)


def test_equal_bytes_of_another_shape_or_meaning_are_other_content(client: EncoderClient) -> None:
    values = np.random.default_rng(0).integers(0, 256, (24, 1176), np.uint8)
    wide, high = (patches_item(values, Grid(1, *sides), DType.UINT8, key="k") for sides in ((4, 6), (6, 4)))
    pixels = picture(56, 84)
    turned = rgb_image_item(pixels.reshape(84, 56, 3), key="k")
    results = client.encode([wide, high, rgb_image_item(pixels, key="k"), turned])
    assert [tuple(result.grid) for result in results if isinstance(result, Embedding)] == [
        (1, 4, 6),
        (1, 6, 4),
        (1, 4, 6),
        (1, 6, 4),
    ]


def test_many_callers_of_one_key_each_get_their_own(client: EncoderClient) -> None:
    pictures = [encoded(picture(56, 56, seed)) for seed in range(4)]
    alone = [client.encode_image(image).data for image in pictures]

    def ask(number: int) -> bool:
        (result,) = client.encode([image_item(pictures[number % 4], key="fought over")], timeout_s=60)
        return isinstance(result, Embedding) and np.array_equal(result.data, alone[number % 4])

    with ThreadPoolExecutor(16) as callers:
        assert all(callers.map(ask, range(120)))


def test_without_a_key_the_content_and_its_bounds_are_the_key(client: EncoderClient) -> None:
    other, smaller = encoded(picture(56, 56, seed=1)), image_item(PNG, max_pixels=28 * 56)
    keys = [
        r.key for r in client.encode([GOOD, image_item(PNG), image_item(other), smaller]) if isinstance(r, Embedding)
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert all(re.fullmatch("content-[0-9a-f]{64}", key) for key in keys)


def test_nobody_can_answer_for_anothers_content(client: EncoderClient) -> None:
    """The server's own names are no keys: an item under one of them is stored apart from the content that it names."""
    mine = client.encode([image_item(encoded(picture(56, 84, seed=5)))])[0]
    assert isinstance(mine, Embedding)
    theirs = client.encode([image_item(PNG, key=mine.key)])[0]
    assert isinstance(theirs, Embedding) and theirs.grid != mine.grid
    (fetched,) = client.fetch([mine.key])
    assert isinstance(fetched, Embedding) and fetched.grid == mine.grid


def test_many_callers_at_once_each_get_their_own(client: EncoderClient) -> None:
    pictures = [encoded(picture(56, 56, seed)) for seed in range(8)]
    alone = [
        result.data
        for image in pictures
        for result in client.encode([image_item(image)])
        if isinstance(result, Embedding)
    ]

    def ask(caller: int) -> bool:
        (result,) = client.encode([image_item(pictures[caller % 8], key=str(caller))], timeout_s=60)
        assert isinstance(result, Embedding)
        return result.key == str(caller) and np.array_equal(result.data, alone[caller % 8])

    with ThreadPoolExecutor(32) as callers:
        assert all(callers.map(ask, range(200)))


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])
