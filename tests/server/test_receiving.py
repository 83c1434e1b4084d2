"""Callers that send half a message and wait hold no more memory than there is for them, and keep nobody else waiting."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pictures import encoded, picture
from raw_http2 import send_half
from servers import Server, StartServer

from sidecar.client import Embedding
from sidecar.items import image_item
from sidecar.server.receiving import Receiver

MB = 1 << 20
HALF = 20 * MB


@pytest.fixture(scope="module")
def narrow(start_server: StartServer) -> Server:
    """Room for 96 MB of requests, and 6 s for each to arrive."""
    return start_server("--max-held-bytes", str(96 * MB), "--message-seconds", "6", "--store", "none")


@pytest.mark.parametrize("method", ["/grpc.health.v1.Health/Check", "/epd.encoder.v1.Encoder/Encode"])
def test_half_sent_messages_are_refused_when_they_take_too_much_memory(narrow: Server, method: str) -> None:
    host, _, port = narrow.address.rpartition(":")
    with ThreadPoolExecutor(20) as callers, narrow.growing_less_than(220 * MB):  # 400 MB are sent
        calls = [
            callers.submit(send_half, host, int(port), method, declared=HALF + 9, sent=HALF, seconds=4)
            for _ in range(20)
        ]
        time.sleep(1)
        with narrow.client() as client:
            assert isinstance(client.encode([image_item(encoded(picture(56, 56)))], timeout_s=10)[0], Embedding)
        ended = [call.result()[1] for call in calls]
    assert sum(ended) >= 12


def test_a_message_that_never_becomes_whole_is_refused_in_time(narrow: Server) -> None:
    host, _, port = narrow.address.rpartition(":")
    begun = time.monotonic()
    _, ended = send_half(host, int(port), "/epd.encoder.v1.Encoder/Info", declared=1000, sent=10, seconds=20)
    assert ended
    assert 5 < time.monotonic() - begun < 15


def test_health_and_reflection_take_small_messages_only(server: Server) -> None:
    with server.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            health.Check(health_pb2.HealthCheckRequest(service="x" * 5000), timeout=10)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            list(
                reflection.ServerReflectionInfo(
                    iter([reflection_pb2.ServerReflectionRequest(host="x" * 5000)]), timeout=10
                )
            )
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_call_without_a_message_is_told_so(server: Server) -> None:
    with server.channel() as channel:
        call = channel.stream_unary("/epd.encoder.v1.Encoder/Info")
        with pytest.raises(grpc.RpcError, match="no message"):
            call(iter(()), timeout=10)


class SlowContext:
    """A call whose message is on its way."""

    def __init__(self) -> None:
        self.refused_with: grpc.StatusCode | None = None

    async def read(self) -> bytes:

        await asyncio.sleep(60)
        return b""

    async def abort(self, code: grpc.StatusCode, details: str, trailing: object) -> None:
        self.refused_with = code
        raise grpc.aio.AbortError


async def arriving(count: int, grown: int) -> list[grpc.StatusCode | None]:
    """Let messages arrive for a while with so much more memory in use, of a limit of 100, and look. Four may be slow."""

    in_use = [1000]
    receiver = Receiver(100, 6, 60.0, lambda: False, in_use=lambda: in_use[0])
    in_use[0] += grown
    contexts = [SlowContext() for _ in range(count)]
    calls = [asyncio.create_task(receiver._receive(context, None, small=False)) for context in contexts]  # type: ignore[arg-type]
    await asyncio.sleep(0.1)
    receiver.look()
    await asyncio.sleep(0.01)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    return [context.refused_with for context in contexts]


def test_slow_messages_are_left_alone_while_there_is_memory() -> None:

    assert asyncio.run(arriving(10, grown=100)) == [None] * 10
    refused = [grpc.StatusCode.RESOURCE_EXHAUSTED] * 6
    assert asyncio.run(arriving(10, grown=101)) == refused + [None] * 4  # the oldest of them
