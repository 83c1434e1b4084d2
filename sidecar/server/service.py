"""The Encoder service: one request in, a stream of parts out, an answer for every item."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass, replace

import grpc

from sidecar.engine.keys import name_to_fetch
from sidecar.engine.scheduler import Encoded
from sidecar.errors import (
    EncoderError,
    Fault,
    NotStored,
    Overloaded,
    ShuttingDown,
    fault_of,
)
from sidecar.pb import encoder_pb2
from sidecar.server import wire
from sidecar.server.calls import Call, Calls
from sidecar.server.model import Model
from sidecar.server.orders import QUICK_BYTES, Named
from sidecar.server.requests import parse_fetch, parse_release, parse_request
from sidecar.settings import Settings

logger = logging.getLogger(__name__)

SERVICE = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"].full_name

Context = grpc.aio.ServicerContext[bytes, bytes]


@dataclass(frozen=True, slots=True)
class _Answer:
    """One item's outcome: an embedding under its key, with where it lies or its rows, or why there is none.

    `held`: the call holds its rows until the last part is sent.
    """

    index: int
    key: str = ""
    encoded: Encoded | None = None
    file: encoder_pb2.File | None = None
    fault: Fault | None = None
    held: bool = False


@dataclass(frozen=True, slots=True)
class _Hit:
    """An item that the store had when the request was read. It is leased or mapped only when its turn to be sent comes."""

    index: int
    named: Named
    encoded: Encoded


class EncoderService:
    """Takes requests apart into items, and puts the answers together.

    Attributes:
        model: what answers; calls that have begun stay with the one that they began with.
        draining: take no new items; what is stored can still be fetched, and leases released.
    """

    def __init__(self, model: Model, settings: Settings, calls: Calls) -> None:
        self.model = model
        self.draining = False
        self._settings = settings
        self._calls = calls

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the methods, as generated code would, but with bytes in (see `requests`) and out (see `wire`)."""
        handlers = {
            "Info": grpc.unary_unary_rpc_method_handler(self.Info),
            "Encode": grpc.unary_stream_rpc_method_handler(self.Encode),
            "Fetch": grpc.unary_stream_rpc_method_handler(self.Fetch),
            "Release": grpc.unary_unary_rpc_method_handler(self.Release),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def Info(self, message: bytes, context: Context) -> bytes:
        with self._calls.begin("Info", context, len(message), self.model):
            return self.model.info.SerializeToString()

    async def Release(self, message: bytes, context: Context) -> bytes:
        model = self.model
        with self._calls.begin("Release", context, len(message), model) as call:
            try:
                call.admit(len(message))
                request = parse_release(message)
            except EncoderError as error:
                await call.abort(error)
            store = model.scheduler.store
            released = store.release(request.leases) if store and request.leases else 0
            return encoder_pb2.ReleaseResponse(released=released).SerializeToString()

    async def Fetch(self, message: bytes, context: Context) -> AsyncIterator[bytes]:
        with self._calls.begin("Fetch", context, len(message), self.model) as call:
            try:
                call.admit(len(message))
                request = parse_fetch(message, self._settings.max_items)
            except EncoderError as error:
                await call.abort(error)
            stored = request.delivery == encoder_pb2.STORED
            call.record.items = len(request.keys)
            for index, key in enumerate(request.keys):
                for part in self._parts(self._fetched(index, key, stored, call), call):
                    yield part

    async def Encode(self, message: bytes, context: Context) -> AsyncIterator[bytes]:
        with self._calls.begin("Encode", context, len(message), self.model) as call:
            try:
                if self.draining:
                    raise ShuttingDown("this server is shutting down; send the items to another one")
                call.admit(len(message))
                request = parse_request(message, self._settings.max_items)
            except EncoderError as error:
                await call.abort(error)
            quick = len(message) <= QUICK_BYTES
            del message  # the parsed request is a copy
            stored = request.delivery == encoder_pb2.STORED
            call.record.items = len(request.items)
            known: list[_Hit | _Answer] = []
            running: set[asyncio.Task[_Answer]] = set()
            finished: asyncio.Queue[asyncio.Task[_Answer]] = asyncio.Queue()
            started = 0
            try:
                for index, item in enumerate(request.items):
                    # What can be named at once, and is in the store, needs no task.
                    found = self._known(index, item, call) if quick else None
                    if found is not None:
                        known.append(found)
                    else:
                        started += _start(self._encoded(index, item, stored, call), running, finished)
                for found in known:
                    # One at a time, so that a caller who does not read holds one embedding and not all of them.
                    answer = self._hit(found, stored, call) if isinstance(found, _Hit) else found
                    if answer is None:  # evicted meanwhile
                        item = request.items[found.index]
                        started += _start(self._encoded(found.index, item, stored, call), running, finished)
                        continue
                    for part in self._parts(answer, call):
                        yield part
                for _ in range(started):
                    # Nothing else refers to the answer: its rows are freed once they are sent.
                    for part in self._parts((await finished.get()).result(), call):
                        yield part
            finally:
                # The caller has gone, or everything is answered: nothing of this request may still run.
                for task in running:
                    task.cancel()

    def _known(self, index: int, item: encoder_pb2.Item, call: Call) -> _Hit | _Answer | None:
        """An item that the store has, or the fault of one that has no name; else None."""
        if item.HasField("url"):
            return None
        try:
            named = Named(item)
            known = call.model.scheduler.known(named.name)
            return _Hit(index, named, known) if known else None
        except EncoderError as error:
            return _Answer(index, fault=fault_of(error))

    def _hit(self, hit: _Hit, stored: bool, call: Call) -> _Answer | None:
        return self._delivered(hit.index, hit.named, hit.encoded, stored, call)

    def _fetched(self, index: int, key: str, stored: bool, call: Call) -> _Answer:
        known = call.model.scheduler.known(name_to_fetch(key))
        if known and (answer := self._delivered(index, Named(encoder_pb2.Item(key=key)), known, stored, call)):
            return answer
        return _Answer(index, fault=fault_of(NotStored("the store has no embedding under this key; encode the item")))

    async def _encoded(self, index: int, item: encoder_pb2.Item, stored: bool, call: Call) -> _Answer:
        try:
            named = await call.model.orders.named(item)
            order = call.model.orders.order(named, call.caller)
            for past_store in (False, True):
                encoded = await call.model.scheduler.encode(order, past_store=past_store)
                if answer := self._delivered(index, named, encoded, stored, call):
                    return answer
            raise Overloaded("the embedding went from the store as soon as it was there", retry_after_s=1.0)
        except Exception as error:  # one item's fault must not reach its neighbours
            fault = fault_of(error)
            if fault.reason == "INTERNAL":
                logger.exception("an item failed")
            return _Answer(index, fault=fault)

    def _delivered(self, index: int, named: Named, encoded: Encoded, stored: bool, call: Call) -> _Answer | None:
        """An answer that holds what the caller is to get: a lease, or the rows. None if it has gone from the store meanwhile."""
        store, entry = call.model.scheduler.store, encoded.entry
        if store and entry and stored and (lease := store.lease(entry)):
            call.leases.append(lease.id)
            if named.key_name:
                store.use_key(named.key_name, named.name, entry)
            path = str(store.path(entry))
            file = encoder_pb2.File(path=path, name=entry.name, lease=lease.id, lease_seconds=store.lease_seconds)
            return _Answer(index, named.key, encoded, file)
        if encoded.rows is None and store and entry and (rows := store.read(entry)) is not None:
            encoded = replace(encoded, rows=rows)
        if encoded.rows is None:
            return None
        if store and named.key_name:
            store.use_key(named.key_name, named.name, entry)
        # Rows of the store are a mapping of its file, which all callers share and the store's capacity bounds.
        if not entry:
            call.hold_rows(encoded.rows)
        return _Answer(index, named.key, encoded, held=not entry)

    def _parts(self, answer: _Answer, call: Call) -> Iterator[bytes]:
        """What the stream carries for one item."""
        call.answered(answer.index, answer.encoded, answer.fault)
        if answer.encoded is None:
            assert answer.fault is not None
            yield encoder_pb2.EncodeResponse(index=answer.index, error=answer.fault.status()).SerializeToString()
            return
        yield wire.embedding(answer.index, answer.key, answer.encoded, answer.file)
        if answer.file is None:
            assert answer.encoded.rows is not None
            # gRPC keeps a copy of one chunk while the caller does not read.
            chunk_bytes = min(wire.CHUNK_BYTES, answer.encoded.rows.nbytes)
            call.hold(chunk_bytes)
            for part in wire.chunks(answer.index, answer.encoded.rows):
                call.record.bytes_out += len(part)
                yield part
            call.give_back(chunk_bytes)
            if answer.held:
                call.give_back_rows(answer.encoded.rows)


def _start(
    answering: Coroutine[None, None, _Answer],
    running: set[asyncio.Task[_Answer]],
    finished: asyncio.Queue[asyncio.Task[_Answer]],
) -> int:
    """Start one task, which is in `running` until it is in `finished`; return how many were started."""
    task = asyncio.create_task(answering)
    running.add(task)
    task.add_done_callback(running.discard)
    task.add_done_callback(finished.put_nowait)
    return 1
