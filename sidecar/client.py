"""The sidecar's clients, blocking (`EncoderClient`) and asyncio (`AsyncEncoderClient`), with one surface.

    with EncoderClient("encoder:50051") as client:
        client.wait_ready(timeout_s=60)
        for result in client.encode([image_item(jpeg), patches_item(pixel_values, grid, DType.UINT8)], timeout_s=30):
            ...  # an Embedding, or an ItemError that cost its neighbours nothing

An address is gRPC's: `host:port`, `unix:/path`, `dns:///name:port`, `ipv4:a:1,b:2`. Where it names several servers,
gRPC deals the calls out among them by the load that they report.

Needs numpy, grpcio and protobuf, and no part of the server: this is what a prefill worker imports. There is no retry
here but gRPC's own of calls that no server has seen: only the caller knows whether its item is still wanted.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, Self, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from sidecar.items import Item, image_item, patches_item, rgb_image_item, rgb_video_item
from sidecar.pb import encoder_pb2, encoder_pb2_grpc
from sidecar.replies import (
    DEFAULT_MAX_EMBEDDING_BYTES,
    ClientError,
    Embedding,
    EncodeError,
    ItemError,
    ProtocolError,
    Replies,
    RequestTooLargeError,
    Result,
    item_error,
)

__all__ = [
    "AsyncEncoderClient",
    "ClientError",
    "Embedding",
    "EncodeError",
    "EncoderClient",
    "Item",
    "ItemError",
    "ProtocolError",
    "RequestTooLargeError",
    "Result",
    "image_item",
    "patches_item",
    "rgb_image_item",
    "rgb_video_item",
]

# gRPC's own balancing by the servers' load reports. The default blackout, 10 s during which a new server's reports are
# not yet believed, is longer than a burst of requests.
_SERVICE_CONFIG = {
    "loadBalancingConfig": [
        {"weighted_round_robin": {"blackoutPeriod": "1s", "weightUpdatePeriod": "1s"}},
        {"round_robin": {}},
    ]
}
_CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    # The server's limit decides what a request may weigh. Replies come in chunks below gRPC's default of 4 MB.
    ("grpc.max_send_message_length", -1),
    # A host that vanished without a word is noticed within 80 s during a call, and as soon as 20 s when data is sent.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A sidecar that restarts is found again within 5 s; gRPC's default may sleep for 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
)
_READY_POLL_S = 0.2
# The generated classes carry no annotations; replies are typed where they are used.
_EncoderStub: Any = encoder_pb2_grpc.EncoderStub
_HealthStub: Any = health_pb2_grpc.HealthStub


class _FailedCall(Protocol):
    """What a sync and an asyncio RpcError have in common."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...


class EncoderClient:
    """A blocking client; safe to share between threads.

    Args:
        address: the server, or servers.
        credentials: for TLS, as from `grpc.ssl_channel_credentials`; None is plaintext.
        channel: use this one instead of opening one to `address`; it stays the caller's to close.
        options: further channel arguments, which win over this module's.
        max_embedding_bytes: a reply that announces more for one item is refused as a `ProtocolError`.

    Raises:
        ValueError: if not exactly one of `address` and `channel` is given.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        channel: grpc.Channel | None = None,
        options: Sequence[tuple[str, Any]] = (),
        max_embedding_bytes: int = DEFAULT_MAX_EMBEDDING_BYTES,
    ) -> None:
        _check_target(address, channel)
        self._owned: grpc.Channel | None = None
        if channel is None:
            every_option = (*_CHANNEL_OPTIONS, *options)
            if credentials is None:
                channel = grpc.insecure_channel(cast(str, address), every_option)
            else:
                channel = grpc.secure_channel(cast(str, address), credentials, every_option)
            self._owned = channel
        self._stub = _EncoderStub(channel)
        self._health = _HealthStub(channel)
        self._max_embedding_bytes = max_embedding_bytes

    def encode(self, items: Sequence[Item], timeout_s: float | None = None) -> list[Result]:
        """Encode items in one call; the results are in the items' order.

        Raises:
            EncodeError: if the call failed as a whole. What was finished by then is lost: `encode_stream` keeps it.
            ProtocolError: if the reply breaks the contract.
        """
        results = dict(self.encode_stream(items, timeout_s))
        return [results[index] for index in range(len(items))]

    def encode_stream(
        self, items: Sequence[Item], timeout_s: float | None = None
    ) -> Generator[tuple[int, Result], None, None]:
        """Yield (index, result) for each item as it finishes.

        The call begins with the first `next`; closing the generator early cancels what remains. Raises as `encode`
        does, after the items that came before the failure.
        """
        replies = Replies(items, max_embedding_bytes=self._max_embedding_bytes)
        with _own_errors():
            call = self._stub.Encode(encoder_pb2.EncodeRequest(items=items), timeout=timeout_s)
            try:
                for response in call:
                    if (done := replies.accept(response)) is not None:
                        yield done
                replies.finish()
            finally:
                call.cancel()

    def encode_image(
        self,
        data: bytes,
        *,
        key: str = "",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        timeout_s: float | None = None,
    ) -> Embedding:
        """Encode one encoded picture (JPEG, PNG, …).

        Raises:
            EncodeError: if the call or the item failed.
            ProtocolError: if the reply breaks the contract.
        """
        item = image_item(data, key=key, min_pixels=min_pixels, max_pixels=max_pixels)
        return _embedding(self.encode([item], timeout_s))

    def info(self, timeout_s: float | None = None) -> encoder_pb2.InfoResponse:
        """Which model the server holds, on what it runs, and what it accepts.

        The contract's own message: it is plain data with generated types, and a copy of it here would only hide the
        fields that a newer server adds.

        Raises:
            EncodeError: if the call failed.
        """
        with _own_errors():
            return cast(encoder_pb2.InfoResponse, self._stub.Info(encoder_pb2.InfoRequest(), timeout=timeout_s))

    def wait_ready(self, timeout_s: float) -> None:
        """Return once the server answers grpc.health.v1 with SERVING, waiting for it to start and to warm up.

        Raises:
            EncodeError: DEADLINE_EXCEEDED, with what it said last, if it is not ready in time; any other error at once.
        """
        patience = _Patience(timeout_s)
        while True:
            try:
                answer = self._health.Check(health_pb2.HealthCheckRequest(), timeout=patience.remaining_s())
                if patience.is_serving(answer):
                    return
            except grpc.RpcError as error:
                patience.endure(_failure(error))
            time.sleep(patience.pause_s())

    def close(self) -> None:
        """Close the channel if this client opened it; calls under way are cancelled."""
        if self._owned is not None:
            self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncEncoderClient:
    """`EncoderClient` for asyncio: the same arguments, methods and errors. Create it inside the loop that uses it."""

    def __init__(
        self,
        address: str | None = None,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        channel: grpc.aio.Channel | None = None,
        options: Sequence[tuple[str, Any]] = (),
        max_embedding_bytes: int = DEFAULT_MAX_EMBEDDING_BYTES,
    ) -> None:
        _check_target(address, channel)
        self._owned: grpc.aio.Channel | None = None
        if channel is None:
            every_option = (*_CHANNEL_OPTIONS, *options)
            if credentials is None:
                channel = grpc.aio.insecure_channel(cast(str, address), every_option)
            else:
                channel = grpc.aio.secure_channel(cast(str, address), credentials, every_option)
            self._owned = channel
        self._stub = _EncoderStub(channel)
        self._health = _HealthStub(channel)
        self._max_embedding_bytes = max_embedding_bytes

    async def encode(self, items: Sequence[Item], timeout_s: float | None = None) -> list[Result]:
        """As `EncoderClient.encode`."""
        results = {index: result async for index, result in self.encode_stream(items, timeout_s)}
        return [results[index] for index in range(len(items))]

    async def encode_stream(
        self, items: Sequence[Item], timeout_s: float | None = None
    ) -> AsyncGenerator[tuple[int, Result], None]:
        """As `EncoderClient.encode_stream`; `aclose` cancels what remains."""
        replies = Replies(items, max_embedding_bytes=self._max_embedding_bytes)
        with _own_errors():
            call = self._stub.Encode(encoder_pb2.EncodeRequest(items=items), timeout=timeout_s)
            try:
                async for response in call:
                    if (done := replies.accept(response)) is not None:
                        yield done
                replies.finish()
            finally:
                call.cancel()

    async def encode_image(
        self,
        data: bytes,
        *,
        key: str = "",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        timeout_s: float | None = None,
    ) -> Embedding:
        """As `EncoderClient.encode_image`."""
        item = image_item(data, key=key, min_pixels=min_pixels, max_pixels=max_pixels)
        return _embedding(await self.encode([item], timeout_s))

    async def info(self, timeout_s: float | None = None) -> encoder_pb2.InfoResponse:
        """As `EncoderClient.info`."""
        with _own_errors():
            return cast(encoder_pb2.InfoResponse, await self._stub.Info(encoder_pb2.InfoRequest(), timeout=timeout_s))

    async def wait_ready(self, timeout_s: float) -> None:
        """As `EncoderClient.wait_ready`."""
        patience = _Patience(timeout_s)
        while True:
            try:
                answer = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=patience.remaining_s())
                if patience.is_serving(answer):
                    return
            except grpc.RpcError as error:
                patience.endure(_failure(error))
            await asyncio.sleep(patience.pause_s())

    async def close(self) -> None:
        """As `EncoderClient.close`."""
        if self._owned is not None:
            await self._owned.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class _Patience:
    """How long `wait_ready` goes on, and what it says when it gives up."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._ends = time.monotonic() + timeout_s
        self._last = "it did not answer"

    def remaining_s(self) -> float:
        return max(self._ends - time.monotonic(), 0.001)

    def is_serving(self, answer: health_pb2.HealthCheckResponse) -> bool:
        self._last = f"it says {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def endure(self, failure: ClientError) -> None:
        """Remember a failure that waiting may mend; raise any other."""
        if not isinstance(failure, EncodeError) or failure.code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            raise failure
        if failure.code == "UNAVAILABLE":  # the other one is this wait's own end and tells nothing
            self._last = failure.message

    def pause_s(self) -> float:
        """How long to sleep before the next try.

        Raises:
            EncodeError: if there is no time for one.
        """
        remaining = self._ends - time.monotonic()
        if remaining <= 0:
            raise EncodeError("DEADLINE_EXCEEDED", f"the server is not ready after {self._timeout_s:g} s: {self._last}")
        return min(_READY_POLL_S, remaining)


def _check_target(address: str | None, channel: object | None) -> None:
    if (address is None) == (channel is None):
        raise ValueError("a client needs either an address or a channel")


def _embedding(results: list[Result]) -> Embedding:
    (result,) = results
    if isinstance(result, ItemError):
        raise result.as_exception()
    return result


@contextmanager
def _own_errors() -> Generator[None, None, None]:
    """Raise gRPC's errors as this package's."""
    try:
        yield
    except grpc.RpcError as error:
        raise _failure(error) from error


def _failure(error: grpc.RpcError) -> ClientError:
    call = cast(_FailedCall, error)
    try:
        status = rpc_status.from_call(cast(Any, error))
    except (ValueError, DecodeError):  # details that contradict the status, or are none
        status = None
    if status is not None:
        return item_error(status).as_exception()
    code, message = call.code().name, call.details() or "no reason given"
    # gRPC reports both limits with one code, and only its words, which give both sizes, tell which side refused.
    if code == "RESOURCE_EXHAUSTED" and "message larger than max" in message:
        if "CLIENT:" in message:
            return ProtocolError(f"the server sent a message that is too large to receive: {message}")
        advice = "send fewer items in a call, smaller pictures, or encoded ones instead of pixels"
        return RequestTooLargeError(code, f"the request is larger than the server takes; {advice} ({message})")
    return EncodeError(code, message)
