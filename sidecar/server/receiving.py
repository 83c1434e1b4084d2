"""Messages on their way in: received under a watch, so that callers who send half of one cannot fill the memory.

gRPC buffers a message from its first byte until it is whole, up to `grpc.max_receive_message_length`, for every stream that
waits for one. It has no limit on the sum, none for a single method, and does not say how much has come. A handler of a stream of
requests is the one kind that is called before its message is received, so every handler becomes one, and receives it here.

Most messages are whole at once. Those that are not are left alone while the memory is there; when it is not, the ones that have
been arriving the longest are refused.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from sidecar.errors import EncoderError, Fault, InvalidRequest, Overloaded, fault_of
from sidecar.machine import memory_in_use

# What arrives within this time is never refused; it bounds how much may come between two looks.
_LOOK_S = 0.05
# Of the memory for calls, the part that messages which arrive slowly are left when there is no more of it.
_SLOW_SHARE = 4
# For services that want a name at most: health, reflection.
_MOST_SMALL_BYTES = 4096
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # not in the stubs
_LARGE = "/epd.encoder.v1.Encoder/"

_Context = grpc.aio.ServicerContext[Any, Any]
_Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]]


class Receiver(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Receives the message of every call. To be the last of the interceptors: what they refuse is not received at all."""

    def __init__(
        self,
        max_bytes: int,
        max_message_bytes: int,
        seconds: float,
        is_idle: Callable[[], bool],
        *,
        in_use: Callable[[], int] = memory_in_use,
        refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """
        Args:
            max_bytes: how much more memory than when it is idle the process may use before slow messages are refused.
            max_message_bytes: of one message.
            seconds: longest that one may take to arrive.
            is_idle: whether no call is under way, so that the memory in use is what the process needs for itself.
            in_use: memory that the process uses, in bytes.
            refused: is told the reason of each refusal.
        """
        self._max_bytes = max_bytes
        self._least_slow = max(1, max_bytes // _SLOW_SHARE // max_message_bytes)
        self._seconds = seconds
        self._is_idle = is_idle
        self._in_use = in_use
        self._refused = refused
        self._idle_bytes = in_use()
        self._arriving: dict[asyncio.Timeout, float] = {}  # since when, the oldest first

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:  # a handler, or None for a method that is not known
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        small = not handler_call_details.method.startswith(_LARGE)
        return grpc.stream_stream_rpc_method_handler(
            self._received(handler, small), response_serializer=handler.response_serializer
        )

    def _received(self, handler: Any, small: bool) -> Callable[[Any, _Context], AsyncIterator[Any]]:
        async def one(_: Any, context: _Context) -> AsyncIterator[Any]:
            request = await self._receive(context, handler.request_deserializer, small)
            if request is _EOF:
                await _abort(context, fault_of(InvalidRequest("the call has no message")))
            if not handler.response_streaming:
                yield await handler.unary_unary(request, context)
                return
            answers = handler.unary_stream(request, context)
            del request  # it may be large, and is not wanted here any more
            async with aclosing(answers) as parts:
                async for part in parts:
                    yield part

        async def several(_: Any, context: _Context) -> AsyncIterator[Any]:
            async def requests() -> AsyncIterator[Any]:
                while (request := await self._receive(context, handler.request_deserializer, small)) is not _EOF:
                    yield request

            async with aclosing(handler.stream_stream(requests(), context)) as parts:
                async for part in parts:
                    yield part

        return several if handler.request_streaming else one

    async def watch(self) -> None:
        """Look at the memory, for ever."""
        while True:
            self.look()
            await asyncio.sleep(_LOOK_S)

    def look(self) -> None:
        """Refuse the slowest of the arriving messages if the memory for them is used up."""
        in_use = self._in_use()
        if not self._arriving and self._is_idle():
            self._idle_bytes = in_use
        if not self._arriving or in_use - self._idle_bytes <= self._max_bytes:
            return
        before = time.monotonic() - _LOOK_S
        slow = [arriving for arriving, since in self._arriving.items() if since < before]
        # Those that came last stay: whoever sends half a message and waits has been at it the longest.
        for arriving in slow[: -self._least_slow]:
            del self._arriving[arriving]
            arriving.reschedule(0.0)

    async def _receive(self, context: _Context, parse: Callable[[bytes], Any] | None, small: bool) -> Any:
        """The next message, or EOF."""
        try:
            message = await self._read(context)
            if message is _EOF:
                return message
            if small and len(message) > _MOST_SMALL_BYTES:
                raise InvalidRequest(f"the message has {len(message)} bytes; this method takes {_MOST_SMALL_BYTES}")
            return parse(message) if parse else message
        except DecodeError:
            fault = fault_of(InvalidRequest("the message is not what this method takes"))
        except EncoderError as error:
            fault = fault_of(error)
        self._refused(fault.reason)
        return await _abort(context, fault)

    async def _read(self, context: _Context) -> Any:
        """Raises:
        Overloaded: if the message is not whole in time, or until the memory is needed.
        """
        timeout = asyncio.timeout(self._seconds)
        self._arriving[timeout] = time.monotonic()
        try:
            async with timeout:
                return await context.read()
        except TimeoutError:
            why = (
                f"the message was not whole after {self._seconds:g} s"
                if timeout in self._arriving
                else "messages that arrive slowly hold too much memory; send this one again"
            )
            raise Overloaded(why, retry_after_s=1.0) from None
        finally:
            self._arriving.pop(timeout, None)


async def _abort(context: _Context, fault: Fault) -> NoReturn:
    status = rpc_status.to_status(fault.status())
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort returns never")
