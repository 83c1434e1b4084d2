"""The clients against servers that refuse, vanish, hang, are many, or are not ready."""

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.protobuf.any_pb2 import Any as PackedMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import HealthServicer
from grpc_status import rpc_status

from sidecar.client import (
    AsyncEncoderClient,
    EncodeError,
    EncoderClient,
    ProtocolError,
    RequestTooLargeError,
    image_item,
)
from sidecar.pb import encoder_pb2 as pb

ITEM = image_item(b"photo")


@pytest.fixture
def nowhere():
    """An address where nobody listens, and nobody can begin to."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_a_refused_call_says_why_and_when_to_come_back(serve, face):
    def script(request, context):
        details = []
        for message in (
            error_details_pb2.ErrorInfo(reason="OVERLOADED", domain="epd"),
            error_details_pb2.RetryInfo(retry_delay=Duration(seconds=2, nanos=250_000_000)),
        ):
            details.append(PackedMessage())
            details[-1].Pack(message)
        status = status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message="the queue is full", details=details)
        context.abort_with_status(rpc_status.to_status(status))

    with pytest.raises(EncodeError, match="RESOURCE_EXHAUSTED: the queue is full") as caught:
        face.encode(serve(script).address, [ITEM])
    assert not isinstance(caught.value, RequestTooLargeError)
    assert (caught.value.code, caught.value.message) == ("RESOURCE_EXHAUSTED", "the queue is full")
    assert caught.value.details[0].reason == "OVERLOADED"
    assert caught.value.retry_delay_s == 2.25


@pytest.mark.parametrize("metadata", [(), (("grpc-status-details-bin", b"\xff\xff"),)], ids=["none", "damaged"])
def test_a_refusal_without_readable_details_is_still_told(serve, face, metadata):
    def script(request, context):
        context.set_trailing_metadata(metadata)
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no items")

    with pytest.raises(EncodeError) as caught:
        face.encode(serve(script).address, [])
    assert (caught.value.code, caught.value.message) == ("INVALID_ARGUMENT", "no items")
    assert (caught.value.details, caught.value.retry_delay_s) == ((), None)


def test_what_finished_before_a_call_failed_is_kept(serve, good, face):
    def script(request, context):
        yield from good(1)
        context.abort(grpc.StatusCode.INTERNAL, "broken")

    came, failure = face.stream(serve(script).address, [ITEM] * 2)
    assert [index for index, _ in came] == [1]
    assert isinstance(failure, EncodeError)
    assert failure.code == "INTERNAL"


def test_a_request_over_the_servers_limit_is_a_clear_error(serve, good, face):
    server = serve(good(0), options=[("grpc.max_receive_message_length", 5_000_000)])
    # Over the 4 MB that gRPC allows where nothing is said: the client's own limit is lifted, and the server's counts.
    assert len(face.encode(server.address, [image_item(bytes(4_900_000))])) == 1
    with pytest.raises(RequestTooLargeError, match=r"larger than the server takes.*50000\d\d vs. 5000000") as caught:
        face.encode(server.address, [image_item(bytes(5_000_000))])
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    assert len(server.requests) == 1


def test_a_message_too_large_to_receive_is_the_servers_fault(serve, face):
    oversized = pb.EncodeResponse(chunk=pb.Chunk(data=bytes(5_000_000)))
    with pytest.raises(ProtocolError, match="too large to receive"):
        face.encode(serve([oversized]).address, [ITEM])


def test_a_server_that_is_not_there_is_reported_at_once(nowhere, face):
    begun = time.monotonic()
    for method, arguments in (("encode", ([ITEM],)), ("info", ())):
        with pytest.raises(EncodeError, match="refused") as caught:
            face.call(nowhere, method, *arguments)
        assert caught.value.code == "UNAVAILABLE"
    assert time.monotonic() - begun < 5


def test_a_call_ends_at_its_deadline(serve, face):
    release = threading.Event()

    def script(request, context):
        release.wait(10)
        yield from ()

    begun = time.monotonic()
    try:
        with pytest.raises(EncodeError) as caught:
            face.encode(serve(script).address, [ITEM], timeout_s=0.3)
    finally:
        release.set()
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert 0.25 < time.monotonic() - begun < 5


def test_a_stream_left_early_is_cancelled_at_the_server(serve, good, face):
    cancelled = threading.Event()

    def script(request, context):
        context.add_callback(cancelled.set)
        yield from good(0)
        cancelled.wait(10)

    with_server = serve(script)
    cancelled_in_time = []
    # The channel is still open when the generator is closed, so it is not the connection's end that cancels.
    if face.kind == "blocking":
        with EncoderClient(with_server.address) as client:
            stream = client.encode_stream([ITEM] * 2)
            assert next(stream)[0] == 0
            stream.close()
            cancelled_in_time.append(cancelled.wait(5))
    else:

        async def run():
            async with AsyncEncoderClient(with_server.address) as client:
                stream = client.encode_stream([ITEM] * 2)
                assert (await anext(stream))[0] == 0
                await stream.aclose()
                cancelled_in_time.append(await asyncio.to_thread(cancelled.wait, 5))

        asyncio.run(run())
    assert cancelled_in_time == [True]


def test_info_is_the_servers(serve, face):
    info = pb.InfoResponse(version="1", fingerprint="f1", tower=pb.TowerSpec(depth=32))
    assert face.call(serve(info=info).address, "info", timeout_s=5) == info


def test_waiting_ends_when_the_server_is_ready(serve, face):
    server = serve()
    server.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    timer = threading.Timer(0.6, server.health.set, ("", health_pb2.HealthCheckResponse.SERVING))
    begun = time.monotonic()
    timer.start()
    face.call(server.address, "wait_ready", timeout_s=10)
    assert 0.5 < time.monotonic() - begun < 5


def test_waiting_for_a_server_that_falls_silent_says_what_it_said_last(serve, face):
    release = threading.Event()

    class FallsSilent(HealthServicer):
        asked = 0

        def Check(self, request, context):
            self.asked += 1
            if self.asked > 1:
                release.wait(10)
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)

    try:
        with pytest.raises(EncodeError, match=r"not ready after 0\.5 s: it says NOT_SERVING"):
            face.call(serve(health=FallsSilent()).address, "wait_ready", timeout_s=0.5)
    finally:
        release.set()


def test_waiting_in_vain_says_what_the_server_said_last(serve, nowhere, face):
    server = serve()
    server.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    with pytest.raises(EncodeError, match=r"not ready after 0\.3 s: it says NOT_SERVING") as caught:
        face.call(server.address, "wait_ready", timeout_s=0.3)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    with pytest.raises(EncodeError, match=r"not ready after 0\.3 s: .*refused"):
        face.call(nowhere, "wait_ready", timeout_s=0.3)


def test_waiting_for_a_server_that_knows_no_health_fails_at_once(face):
    bare = grpc.server(ThreadPoolExecutor(1))
    port = bare.add_insecure_port("127.0.0.1:0")
    bare.start()
    begun = time.monotonic()
    try:
        with pytest.raises(EncodeError) as caught:
            face.call(f"127.0.0.1:{port}", "wait_ready", timeout_s=10)
    finally:
        bare.stop(0).wait()
    assert caught.value.code == "UNIMPLEMENTED"
    assert time.monotonic() - begun < 5


def test_calls_are_dealt_out_among_several_servers(serve, good):
    servers = [serve(good(0)), serve(good(0))]
    with EncoderClient(f"ipv4:{servers[0].address},{servers[1].address}") as client:
        end = time.monotonic() + 5
        while not all(server.requests for server in servers) and time.monotonic() < end:
            client.encode([ITEM])
    assert all(server.requests for server in servers)


def test_a_unix_socket_is_an_address(serve, good, face, tmp_path):
    server = serve(good(0), address=f"unix:{tmp_path / 'encoder.sock'}")
    assert len(face.encode(server.address, [ITEM])) == 1


def test_credentials_are_used(serve, good, face):
    with pytest.raises(EncodeError) as caught:  # TLS spoken to a server that speaks none
        face.encode(serve(good(0)).address, [ITEM], credentials=grpc.ssl_channel_credentials())
    assert caught.value.code == "UNAVAILABLE"


def test_a_given_channel_is_used_and_left_open(serve, good):
    with grpc.insecure_channel(serve(good(0)).address) as channel:
        for _ in range(2):
            with EncoderClient(channel=channel) as client:
                assert len(client.encode([ITEM])) == 1

    async def run():
        async with grpc.aio.insecure_channel(serve(good(0)).address) as channel:
            for _ in range(2):
                async with AsyncEncoderClient(channel=channel) as client:
                    assert len(await client.encode([ITEM])) == 1

    asyncio.run(run())


def test_a_client_closes_the_channel_that_it_opened(serve, good):
    with EncoderClient(serve(good(0)).address) as client:
        client.encode([ITEM])
    with pytest.raises(ValueError, match=r"Channel closed|closed channel"):
        client.encode([ITEM])

    async def run():
        async with AsyncEncoderClient(serve(good(0)).address) as client:
            await client.encode([ITEM])
        with pytest.raises(grpc.aio.UsageError, match="closed"):
            await client.encode([ITEM])

    asyncio.run(run())


@pytest.mark.parametrize("kind", [EncoderClient, AsyncEncoderClient])
def test_a_client_needs_one_target(kind):
    for arguments in ({}, {"address": "a:1", "channel": object()}):
        with pytest.raises(ValueError, match="either an address or a channel"):
            kind(**arguments)
