"""A real sidecar behind a gRPC server that spoils its answers as a test tells it to.

    with FaultySidecar(server.address) as sidecar:
        sidecar.answer(Fault.NAN, Fault.BUSY)  # the next two calls of Encode or Fetch; those after them are faultless
        sidecar.always = Fault.INTERNAL        # every call for which nothing else was said

It can be told to from another thread at any time. Embeddings come spoilt the way they were asked for: over the wire, or as a file
of the sidecar's store, where a spoilt one is a file beside the good one.
"""

from __future__ import annotations

import itertools
import shutil
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, auto
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc
import numpy as np
from google.protobuf.any_pb2 import Any as PackedMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from sidecar.pb import encoder_pb2 as pb
from sidecar.pb import encoder_pb2_grpc
from sidecar.store_file import FILE_NAME, Description, create, read
from sidecar.vision.dtypes import Array, DType
from sidecar.vision.grid import Grid

OTHER_FINGERPRINT = "0" * 64
RETRY_S = 0.1
_CHUNK_BYTES = 1 << 20
_DTYPES = {pb.FLOAT32: DType.FLOAT32, pb.FLOAT16: DType.FLOAT16, pb.BFLOAT16: DType.BFLOAT16}


class Fault(Enum):
    """What is wrong with an answer."""

    ROWS_SHORT = auto()  # the last row is missing, and the answer says so itself
    ROWS_MERGED = auto()  # a quarter of the rows, as if 4×4 patches were merged: the answer does not contradict itself
    WIDTH_WRONG = auto()
    NAN = auto()
    OTHER_FINGERPRINT = auto()
    OTHER_GRID = auto()  # height and width exchanged
    FILE_CUT_SHORT = auto()  # the file ends early; over the wire, the stream does
    NOT_FOUND = auto()
    INTERNAL = auto()
    BUSY = auto()  # RESOURCE_EXHAUSTED, and when to come back
    HANG = auto()  # no answer until the caller goes, or `stop`
    DIE = auto()  # the server is gone in the middle of the call, until `revive`


class FaultySidecar(encoder_pb2_grpc.EncoderServicer):
    """
    Attributes:
        address: where it is reached, also after `revive`.
        calls: names of the methods that were called, `Info` and `Release` included.
        hanging, left: set once a call hangs, and once its caller has gone.
        released: one list of leases for each call of `Release`.
    """

    def __init__(self, upstream: str) -> None:
        self.always: Fault | None = None
        self.calls: list[str] = []
        self.hanging, self.left = threading.Event(), threading.Event()
        self.released: SimpleQueue[list[str]] = SimpleQueue()
        self._next: deque[Fault | None] = deque()
        self._stopped = threading.Event()
        self._spoilt: list[Path] = []
        self._leases: list[str] = []
        self._numbers = itertools.count()
        self._channel = grpc.insecure_channel(upstream, [("grpc.max_send_message_length", -1)])
        new_stub: Any = encoder_pb2_grpc.EncoderStub
        self._upstream = new_stub(self._channel)
        self.address = "127.0.0.1:0"
        self.revive()

    def answer(self, *faults: Fault | None) -> None:
        """How the next calls of Encode and Fetch are answered, one fault each; None is none."""
        self._next.extend(faults)

    def revive(self) -> None:
        """Serve (again) at `address`."""
        self._stopped.clear()
        # Others may not listen on the same port at the same time.
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)]
        self._server = grpc.server(ThreadPoolExecutor(8), options=options)
        encoder_pb2_grpc.add_EncoderServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(self.address)}"
        self._server.start()

    def die(self) -> threading.Event:
        """Break every connection; returns what is set when that is done."""
        self._stopped.set()
        return self._server.stop(None)

    def stop(self) -> None:
        self.die().wait()
        # A client gives back no lease of an answer that breaks the contract, and the real sidecar's end would wait for it.
        self._upstream.Release(pb.ReleaseRequest(leases=self._leases))
        self._channel.close()
        for directory in self._spoilt:
            shutil.rmtree(directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # The contract's methods.

    def Info(self, request: pb.InfoRequest, context: grpc.ServicerContext) -> pb.InfoResponse:
        self.calls.append("Info")
        return self._upstream.Info(request)

    def Release(self, request: pb.ReleaseRequest, context: grpc.ServicerContext) -> pb.ReleaseResponse:
        self.calls.append("Release")
        response = self._upstream.Release(request)
        self.released.put(list(request.leases))
        return response

    def Encode(self, request: pb.EncodeRequest, context: grpc.ServicerContext) -> Iterator[pb.EncodeResponse]:
        self.calls.append("Encode")
        return self._answer(self._upstream.Encode, request, len(request.items), context)

    def Fetch(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[pb.EncodeResponse]:
        self.calls.append("Fetch")
        return self._answer(self._upstream.Fetch, request, len(request.keys), context)

    def _answer(
        self, method: Any, request: Any, count: int, context: grpc.ServicerContext
    ) -> Iterator[pb.EncodeResponse]:
        fault = self._next.popleft() if self._next else self.always
        if fault is Fault.HANG:
            self._hang(context)
        if fault is Fault.DIE:
            self.die()
            self._hang(context)
        if (error := _ERRORS.get(fault)) is not None:
            yield from (pb.EncodeResponse(index=index, error=error) for index in range(count))
            return
        rows: dict[int, bytearray] = {}
        headers: dict[int, pb.Embedding] = {}
        for response in method(request):
            part = response.WhichOneof("part")
            if fault is None or part == "error":
                yield response
            elif part == "embedding":
                headers[response.index], rows[response.index] = response.embedding, bytearray()
            else:
                rows[response.index] += response.chunk.data
        for index, header in headers.items():
            yield from self._spoil(fault, index, header, bytes(rows[index]))

    def _hang(self, context: grpc.ServicerContext) -> NoReturn:
        over = threading.Event()
        if not context.add_callback(over.set):
            over.set()
        self.hanging.set()
        while not over.wait(0.05) and not self._stopped.is_set():
            pass
        self.left.set()
        context.abort(grpc.StatusCode.CANCELLED, "nobody is there any more")
        raise AssertionError

    def _spoil(self, fault: Fault | None, index: int, header: pb.Embedding, raw: bytes) -> Iterator[pb.EncodeResponse]:
        good = _described(header)
        if header.HasField("file"):
            store = Path(header.file.path).parents[1]
            values = read(store, header.file.name, good)
        else:
            values = np.frombuffer(raw, good.dtype.storage).reshape(good.tokens, good.width)
        values = _spoilt_values(fault, values, good)
        header.tokens, header.width, header.size_bytes = *values.shape, values.nbytes
        if fault is Fault.OTHER_GRID:
            header.grid.h, header.grid.w = header.grid.w, header.grid.h
        if fault is Fault.OTHER_FINGERPRINT:
            header.fingerprint = OTHER_FINGERPRINT
        cut_short = fault is Fault.FILE_CUT_SHORT
        if header.HasField("file"):
            self._write(store, header, values, cut_short=cut_short)
            yield pb.EncodeResponse(index=index, embedding=header)
            return
        yield pb.EncodeResponse(index=index, embedding=header)
        sent = values.tobytes()[: -1 if cut_short else None]
        for offset in range(0, len(sent), _CHUNK_BYTES):
            chunk = pb.Chunk(offset=offset, data=sent[offset : offset + _CHUNK_BYTES])
            yield pb.EncodeResponse(index=index, chunk=chunk)

    def _write(self, store: Path, header: pb.Embedding, values: Array, *, cut_short: bool) -> None:
        """The spoilt embedding as a file of its own; the lease stays that of the good one."""
        self._leases.append(header.file.lease)
        header.file.name = f"spoilt-{id(self)}-{next(self._numbers)}"
        path = store / header.file.name / FILE_NAME
        header.file.path = str(path)
        path.parent.mkdir()
        self._spoilt.append(path.parent)
        create(path, _described(header))[:] = values
        if cut_short:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size - 1)


def _described(header: pb.Embedding) -> Description:
    return Description(
        grid=Grid(header.grid.t, header.grid.h, header.grid.w),
        tokens=header.tokens,
        width=header.width,
        dtype=_DTYPES[header.dtype],
        fingerprint=header.fingerprint,
    )


def _spoilt_values(fault: Fault | None, values: Array, good: Description) -> Array:
    if fault is Fault.ROWS_SHORT:
        return values[:-1]
    if fault is Fault.ROWS_MERGED:
        return values[::4]
    if fault is Fault.WIDTH_WRONG:
        return values[:, :-1]
    if fault is Fault.NAN:
        values = values.copy()
        values[-1, -1] = 0x7FC0 if good.dtype is DType.BFLOAT16 else np.nan
    return values


def _status(code: grpc.StatusCode, message: str, *details: Any) -> status_pb2.Status:
    packed = []
    for detail in details:
        packed.append(PackedMessage())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


_RETRY = error_details_pb2.RetryInfo(retry_delay=Duration(nanos=int(RETRY_S * 1e9)))
_ERRORS = {
    Fault.NOT_FOUND: _status(grpc.StatusCode.NOT_FOUND, "the store has no such key"),
    Fault.INTERNAL: _status(grpc.StatusCode.INTERNAL, "something broke"),
    Fault.BUSY: _status(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much is under way", _RETRY),
}
