"""The ways to a fleet's sidecars: one channel over all of them, on which gRPC deals calls out, and one to each.

A way carries one item at a time of asking and says who answered. What follows from an answer is not decided here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import grpc
import grpc.aio

from sidecar.addresses import target
from sidecar.channel import CHANNEL_OPTIONS, FLEET_OPTIONS, failure_of, own_errors
from sidecar.exchange import Exchange
from sidecar.items import Item
from sidecar.pb import encoder_pb2, encoder_pb2_grpc
from sidecar.replies import ClientError, Embedding, EncodeError, ItemError, ProtocolError

# What each reply's trailing metadata name the server process by.
SERVER_KEY = "epd-server"

_EncoderStub: Any = encoder_pb2_grpc.EncoderStub


@dataclass(frozen=True, slots=True)
class Access:
    """What every way of a fleet has in common. `host` is the one that certificates are for."""

    credentials: grpc.ChannelCredentials | None
    metadata: tuple[tuple[str, str], ...]
    host: str | None
    max_embedding_bytes: int

    def open(self, address: str, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
        if self.credentials is None:
            return grpc.aio.insecure_channel(address, options)
        if self.host is not None:  # the address is a number
            options = (*options, ("grpc.ssl_target_name_override", self.host))
        return grpc.aio.secure_channel(address, self.credentials, options)


class Way:
    """A channel, to one sidecar or to all.

    Attributes:
        server: who has answered on it last; empty if it gave no name, None if nobody is known to answer.
    """

    def __init__(self, access: Access, addresses: Sequence[str], *, balanced: bool) -> None:
        """`balanced`: over sidecars that are SERVING only, by their load reports."""
        self.server: str | None = None
        self._access = access
        self._channel = access.open(target(addresses), FLEET_OPTIONS if balanced else CHANNEL_OPTIONS)
        self._stub = _EncoderStub(self._channel)
        self._under_way = 0
        self._retired = False
        self._closing: asyncio.Task[None] | None = None

    async def ask(self, item: Item, timeout_s: float) -> tuple[Embedding | ClientError, str]:
        """An item's embedding, or why there is none; and which server says so, empty if none did."""
        try:
            with self._used():
                outcome, server = await self._ask(item, timeout_s)
        except EncodeError as error:
            return error, ""
        self.server = server or (None if isinstance(outcome, EncodeError) and not outcome.details else "")
        return outcome, server

    async def info(self, timeout_s: float) -> encoder_pb2.InfoResponse:
        """Raises:
        EncodeError: if the call failed.
        """
        with self._used(), own_errors():
            call = self._stub.Info(encoder_pb2.InfoRequest(), timeout=timeout_s, metadata=self._access.metadata)
            answer = cast(encoder_pb2.InfoResponse, await call)
            self.server = _server_of(await call.trailing_metadata())
            return answer

    async def meet(self, timeout_s: float) -> None:
        """Learn who answers here, if anybody does."""
        with suppress(EncodeError):
            await self.info(timeout_s)

    def retire(self) -> None:
        """Close it when nothing is under way on it any more."""
        self._retired = True
        self._close_if_idle()

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._channel.close(None))
        await self._closing

    async def _ask(self, item: Item, timeout_s: float) -> tuple[Embedding | ClientError, str]:
        exchange = Exchange([item], self._access.max_embedding_bytes, None, hold=False, timeout_s=timeout_s)
        request = encoder_pb2.EncodeRequest(items=[item], delivery=encoder_pb2.INLINE)
        call = self._stub.Encode(request, timeout=exchange.timeout_s, metadata=self._access.metadata)
        outcomes: list[Embedding | ItemError] = []
        try:
            async for response in call:
                if (done := exchange.accept(response)) is not None:
                    outcomes.append(done[1])
            exchange.finish()  # or there is not one outcome
            server = _server_of(await call.trailing_metadata())
        except grpc.RpcError as error:
            return failure_of(error), _server_of(cast(Any, error).trailing_metadata())
        except ProtocolError as error:
            return error, _server_of(await call.trailing_metadata()) if call.done() else ""
        finally:
            call.cancel()
        (outcome,) = outcomes
        return outcome if isinstance(outcome, Embedding) else outcome.as_exception(), server

    @contextmanager
    def _used(self) -> Iterator[None]:
        """Not to be closed meanwhile by its retirement.

        Raises:
            EncodeError: UNAVAILABLE if it is retired already; CANCELLED if the fleet is closed meanwhile.
        """
        if self._is_closing():
            raise EncodeError("UNAVAILABLE", "this sidecar is not among those addressed any more")
        self._under_way += 1
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._is_closing() or (task is not None and task.cancelling()):
                raise
            raise EncodeError("CANCELLED", "the fleet was closed meanwhile") from None
        finally:
            self._under_way -= 1
            self._close_if_idle()

    def _is_closing(self) -> bool:
        return self._closing is not None

    def _close_if_idle(self) -> None:
        if self._retired and not self._under_way and self._closing is None:
            self._closing = asyncio.ensure_future(self._channel.close(None))


def _server_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    return next((str(value) for key, value in metadata or () if key == SERVER_KEY), "")
