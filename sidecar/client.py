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
import os
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sidecar.channel import CHANNEL_OPTIONS, RELEASE_S, Patience, check_target, failure_of, own_errors
from sidecar.credentials import bearer_metadata
from sidecar.exchange import Exchange
from sidecar.items import Item, image_item, patches_item, rgb_image_item, rgb_video_item
from sidecar.pb import encoder_pb2, encoder_pb2_grpc
from sidecar.replies import (
    DEFAULT_MAX_EMBEDDING_BYTES,
    ClientError,
    Embedding,
    EncodeError,
    ItemError,
    ProtocolError,
    RequestTooLargeError,
    Result,
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

# The generated classes carry no annotations; replies are typed where they are used.
_EncoderStub: Any = encoder_pb2_grpc.EncoderStub
_HealthStub: Any = health_pb2_grpc.HealthStub


class EncoderClient:
    """A blocking client; safe to share between threads.

    Args:
        address: the server, or servers.
        credentials: for TLS, as from `sidecar.credentials.client_credentials`; None is plaintext.
        token: goes out with each call, for a server that has --token-file. Without TLS, whoever hears the call has it.
        channel: use this one instead of opening one to `address`; it stays the caller's to close.
        options: further channel arguments, which win over this module's.
        store: the server's --store, where this process can read it: embeddings are then mapped instead of sent. Nothing
            outside this directory is opened. Where it cannot be read, embeddings are sent all the same.
        max_embedding_bytes: a reply that announces more for one item is refused as a `ProtocolError`.

    Raises:
        ValueError: if not exactly one of `address` and `channel` is given, or `token` cannot be one.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        channel: grpc.Channel | None = None,
        options: Sequence[tuple[str, Any]] = (),
        store: str | os.PathLike[str] | None = None,
        max_embedding_bytes: int = DEFAULT_MAX_EMBEDDING_BYTES,
    ) -> None:
        check_target(address, channel)
        self._metadata = (*bearer_metadata(token), ("epd-client", f"{os.getpid()}-{id(self):x}"))
        self._store = None if store is None else Path(store)
        self._delivery = encoder_pb2.INLINE if store is None else encoder_pb2.STORED
        self._owned: grpc.Channel | None = None
        if channel is None:
            every_option = (*CHANNEL_OPTIONS, *options)
            if credentials is None:
                channel = grpc.insecure_channel(cast(str, address), every_option)
            else:
                channel = grpc.secure_channel(cast(str, address), credentials, every_option)
            self._owned = channel
        self._stub = _EncoderStub(channel)
        self._health = _HealthStub(channel)
        self._max_embedding_bytes = max_embedding_bytes
        self._releasing: set[Any] = set()

    def encode(self, items: Sequence[Item], timeout_s: float | None = None, *, hold: bool = False) -> list[Result]:
        """Encode items in one call; the results are in the items' order.

        Args:
            hold: keep the leases of embeddings that are files of the store: their paths may then be handed on, until
                `release` or until the leases expire.

        Raises:
            EncodeError: if the call failed as a whole. What was finished by then is lost: `encode_stream` keeps it.
            ProtocolError: if the reply breaks the contract.
        """
        results = dict(self.encode_stream(items, timeout_s, hold=hold))
        return [results[index] for index in range(len(items))]

    def encode_stream(
        self, items: Sequence[Item], timeout_s: float | None = None, *, hold: bool = False
    ) -> Generator[tuple[int, Result], None, None]:
        """Yield (index, result) for each item as it finishes.

        The call begins with the first `next`; closing the generator early cancels what remains. Raises as `encode`
        does, after the items that came before the failure.
        """
        request = encoder_pb2.EncodeRequest(items=items, delivery=self._delivery)
        yield from self._exchange(self._stub.Encode, request, items, hold, timeout_s)

    def fetch(self, keys: Sequence[str], timeout_s: float | None = None, *, hold: bool = False) -> list[Result]:
        """Embeddings that the server's store has; NOT_FOUND for each that it does not. As `encode`.

        A key stands for the content that it was last sent with. The name of a stored embedding's directory may be given as well,
        and stands for one content for good.
        """
        items = [Item(key=key) for key in keys]
        request = encoder_pb2.FetchRequest(keys=keys, delivery=self._delivery)
        results = dict(self._exchange(self._stub.Fetch, request, items, hold, timeout_s))
        return [results[index] for index in range(len(keys))]

    def release(self, leases: Sequence[str], timeout_s: float | None = None) -> int:
        """Give leases back; returns how many of them were still held.

        Raises:
            EncodeError: if the call failed.
        """
        with own_errors():
            request = encoder_pb2.ReleaseRequest(leases=leases)
            answer = self._stub.Release(request, timeout=timeout_s, metadata=self._metadata)
            return cast(encoder_pb2.ReleaseResponse, answer).released

    def _exchange(
        self, method: Any, request: Any, items: Sequence[Item], hold: bool, timeout_s: float | None
    ) -> Generator[tuple[int, Result], None, None]:
        exchange = Exchange(items, self._max_embedding_bytes, self._store, hold=hold, timeout_s=timeout_s)
        with own_errors():
            try:
                while request is not None:
                    call = method(request, timeout=exchange.timeout_s, metadata=self._metadata)
                    try:
                        for response in call:
                            if (done := exchange.accept(response)) is not None:
                                yield done
                    finally:
                        call.cancel()
                    method, request = self._stub.Fetch, exchange.finish()
            finally:
                if (leases := exchange.to_release()) is not None:
                    # Only `close` waits for it: what is mapped stays mapped, and a lease that is not given back expires.
                    releasing = self._stub.Release.future(leases, timeout=RELEASE_S, metadata=self._metadata)
                    self._releasing.add(releasing)
                    releasing.add_done_callback(self._releasing.discard)

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
        with own_errors():
            reply = self._stub.Info(encoder_pb2.InfoRequest(), timeout=timeout_s, metadata=self._metadata)
            return cast(encoder_pb2.InfoResponse, reply)

    def wait_ready(self, timeout_s: float) -> None:
        """Return once the server answers grpc.health.v1 with SERVING, waiting for it to start and to warm up.

        Raises:
            EncodeError: DEADLINE_EXCEEDED, with what it said last, if it is not ready in time; any other error at once.
        """
        patience = Patience(timeout_s)
        while True:
            try:
                answer = self._health.Check(health_pb2.HealthCheckRequest(), timeout=patience.remaining_s())
                if patience.is_serving(answer):
                    return
            except grpc.RpcError as error:
                patience.endure(failure_of(error))
            time.sleep(patience.pause_s())

    def close(self) -> None:
        """Close the channel if this client opened it; calls under way are cancelled."""
        for releasing in list(self._releasing):
            with suppress(grpc.RpcError, grpc.FutureTimeoutError, grpc.FutureCancelledError):
                releasing.result(RELEASE_S)
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
        token: str | None = None,
        channel: grpc.aio.Channel | None = None,
        options: Sequence[tuple[str, Any]] = (),
        store: str | os.PathLike[str] | None = None,
        max_embedding_bytes: int = DEFAULT_MAX_EMBEDDING_BYTES,
    ) -> None:
        check_target(address, channel)
        self._metadata = (*bearer_metadata(token), ("epd-client", f"{os.getpid()}-{id(self):x}"))
        self._store = None if store is None else Path(store)
        self._delivery = encoder_pb2.INLINE if store is None else encoder_pb2.STORED
        self._owned: grpc.aio.Channel | None = None
        if channel is None:
            every_option = (*CHANNEL_OPTIONS, *options)
            if credentials is None:
                channel = grpc.aio.insecure_channel(cast(str, address), every_option)
            else:
                channel = grpc.aio.secure_channel(cast(str, address), credentials, every_option)
            self._owned = channel
        self._stub = _EncoderStub(channel)
        self._health = _HealthStub(channel)
        self._max_embedding_bytes = max_embedding_bytes
        self._releasing: set[Any] = set()

    async def encode(
        self, items: Sequence[Item], timeout_s: float | None = None, *, hold: bool = False
    ) -> list[Result]:
        """As `EncoderClient.encode`."""
        results = {index: result async for index, result in self.encode_stream(items, timeout_s, hold=hold)}
        return [results[index] for index in range(len(items))]

    async def encode_stream(
        self, items: Sequence[Item], timeout_s: float | None = None, *, hold: bool = False
    ) -> AsyncGenerator[tuple[int, Result], None]:
        """As `EncoderClient.encode_stream`; `aclose` cancels what remains."""
        request = encoder_pb2.EncodeRequest(items=items, delivery=self._delivery)
        async with aclosing(self._exchange(self._stub.Encode, request, items, hold, timeout_s)) as results:
            async for result in results:
                yield result

    async def fetch(self, keys: Sequence[str], timeout_s: float | None = None, *, hold: bool = False) -> list[Result]:
        """As `EncoderClient.fetch`."""
        items = [Item(key=key) for key in keys]
        request = encoder_pb2.FetchRequest(keys=keys, delivery=self._delivery)
        exchange = self._exchange(self._stub.Fetch, request, items, hold, timeout_s)
        results = {index: result async for index, result in exchange}
        return [results[index] for index in range(len(keys))]

    async def release(self, leases: Sequence[str], timeout_s: float | None = None) -> int:
        """As `EncoderClient.release`."""
        with own_errors():
            request = encoder_pb2.ReleaseRequest(leases=leases)
            answer = await self._stub.Release(request, timeout=timeout_s, metadata=self._metadata)
            return cast(encoder_pb2.ReleaseResponse, answer).released

    async def _exchange(
        self, method: Any, request: Any, items: Sequence[Item], hold: bool, timeout_s: float | None
    ) -> AsyncGenerator[tuple[int, Result], None]:
        exchange = Exchange(items, self._max_embedding_bytes, self._store, hold=hold, timeout_s=timeout_s)
        with own_errors():
            try:
                while request is not None:
                    call = method(request, timeout=exchange.timeout_s, metadata=self._metadata)
                    try:
                        async for response in call:
                            if (done := exchange.accept(response)) is not None:
                                yield done
                    finally:
                        call.cancel()
                    method, request = self._stub.Fetch, exchange.finish()
            finally:
                if (leases := exchange.to_release()) is not None:
                    # It begins by being called, and only `close` waits for its end.
                    releasing = self._stub.Release(leases, timeout=RELEASE_S, metadata=self._metadata)
                    self._releasing.add(releasing)
                    releasing.add_done_callback(self._releasing.discard)

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
        with own_errors():
            reply = await self._stub.Info(encoder_pb2.InfoRequest(), timeout=timeout_s, metadata=self._metadata)
            return cast(encoder_pb2.InfoResponse, reply)

    async def wait_ready(self, timeout_s: float) -> None:
        """As `EncoderClient.wait_ready`."""
        patience = Patience(timeout_s)
        while True:
            try:
                answer = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=patience.remaining_s())
                if patience.is_serving(answer):
                    return
            except grpc.RpcError as error:
                patience.endure(failure_of(error))
            await asyncio.sleep(patience.pause_s())

    async def close(self) -> None:
        """As `EncoderClient.close`."""
        for releasing in list(self._releasing):
            with suppress(grpc.RpcError, asyncio.CancelledError):
                await releasing
        if self._owned is not None:
            await self._owned.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


def _embedding(results: list[Result]) -> Embedding:
    (result,) = results
    if isinstance(result, ItemError):
        raise result.as_exception()
    return result
