"""A real gRPC server that answers what a test tells it to, faults included, and both clients behind one face."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from sidecar.client import AsyncEncoderClient, ClientError, EncoderClient, Result
from sidecar.items import WIRE_DTYPES
from sidecar.pb import encoder_pb2 as pb
from sidecar.pb import encoder_pb2_grpc
from sidecar.vision.dtypes import Array, DType
from sidecar.vision.grid import Grid

Script = Callable[[pb.EncodeRequest, grpc.ServicerContext], Iterable[pb.EncodeResponse]]


class ScriptedServer(encoder_pb2_grpc.EncoderServicer):
    def __init__(self, script: Script, info: pb.InfoResponse, options: Any, address: str, health: Any) -> None:
        self.requests: list[pb.EncodeRequest] = []
        self.health = health
        self._script, self._info = script, info
        self.grpc = grpc.server(ThreadPoolExecutor(4), options=options)
        encoder_pb2_grpc.add_EncoderServicer_to_server(self, self.grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.grpc)
        port = self.grpc.add_insecure_port(address)
        self.address = address if address.startswith("unix:") else f"127.0.0.1:{port}"
        self.grpc.start()

    def Info(self, request: pb.InfoRequest, context: grpc.ServicerContext) -> pb.InfoResponse:
        return self._info

    def Encode(self, request: pb.EncodeRequest, context: grpc.ServicerContext) -> Iterator[pb.EncodeResponse]:
        self.requests.append(request)
        yield from self._script(request, context)


@pytest.fixture
def serve() -> Iterator[Callable[..., ScriptedServer]]:
    """serve(script, …) starts a server; a list of responses is the simplest script."""
    servers: list[ScriptedServer] = []

    def start(
        script: Any = (), *, info: Any = None, options: Any = (), address: str = "127.0.0.1:0", health: Any = None
    ) -> ScriptedServer:
        follow = script if callable(script) else lambda *_: script
        servers.append(ScriptedServer(follow, info or pb.InfoResponse(), options, address, health or HealthServicer()))
        return servers[-1]

    yield start
    for server in servers:
        server.grpc.stop(0).wait()


def _parts(
    index: int, data: Array, grid: Grid, dtype: DType = DType.FLOAT32, chunk_bytes: int = 16
) -> list[pb.EncodeResponse]:
    """What a faultless server sends for one item."""
    raw = data.tobytes()
    header = pb.Embedding(
        key=f"key-{index}",
        grid=pb.Grid(t=grid.t, h=grid.h, w=grid.w),
        tokens=data.shape[0],
        width=data.shape[1],
        dtype=WIRE_DTYPES[dtype],
        size_bytes=len(raw),
        fingerprint="f1",
        lane=pb.Lane(runtime="openvino", device="CPU", precision="int8"),
        times=pb.StageTimes(preprocess_ms=1.5, queue_ms=2.5, run_ms=3.5),
    )
    answer = [pb.EncodeResponse(index=index, embedding=header)]
    for offset in range(0, len(raw), chunk_bytes):
        chunk = pb.Chunk(offset=offset, data=raw[offset : offset + chunk_bytes])
        answer.append(pb.EncodeResponse(index=index, chunk=chunk))
    return answer


@pytest.fixture
def parts() -> Callable[..., list[pb.EncodeResponse]]:
    return _parts


@pytest.fixture
def good() -> Callable[[int], list[pb.EncodeResponse]]:
    """good(index): a small embedding, 4 tokens of 3 float32 in three chunks."""
    return lambda index: _parts(index, np.arange(12, dtype="<f4").reshape(4, 3) + index, Grid(1, 4, 4))


class Face:
    """One of the two clients, called as if it were blocking."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def call(self, target: str, method: str, *arguments: Any, client: Any = None, **named: Any) -> Any:
        """`method` of a client of `target`, made with the keyword arguments `client`."""
        if self.kind == "blocking":
            with EncoderClient(target, **client or {}) as encoder:
                return getattr(encoder, method)(*arguments, **named)

        async def run() -> Any:
            async with AsyncEncoderClient(target, **client or {}) as encoder:
                return await getattr(encoder, method)(*arguments, **named)

        return asyncio.run(run())

    def encode(self, target: str, items: Any, timeout_s: float | None = 10, **client: Any) -> list[Result]:
        results: list[Result] = self.call(target, "encode", items, timeout_s, client=client)
        return results

    def stream(
        self, target: str, items: Any, *, on_result: Callable[[], None] = lambda: None, most: int = 99
    ) -> tuple[list[tuple[int, Result]], ClientError | None]:
        """What came, at most `most` results, before the stream ended or failed, and the failure."""
        came: list[tuple[int, Result]] = []

        def take(pair: tuple[int, Result]) -> bool:
            came.append(pair)
            on_result()
            return len(came) < most

        def blocking() -> None:
            with EncoderClient(target) as encoder:
                stream = encoder.encode_stream(items, 10)
                while take(next(stream)):
                    pass
                stream.close()

        async def run() -> None:
            async with AsyncEncoderClient(target) as encoder:
                stream = encoder.encode_stream(items, 10)
                while take(await anext(stream)):
                    pass
                await stream.aclose()

        try:
            with suppress(StopIteration, StopAsyncIteration):
                blocking() if self.kind == "blocking" else asyncio.run(run())
        except ClientError as error:
            return came, error
        return came, None


@pytest.fixture(params=["blocking", "asyncio"])
def face(request: pytest.FixtureRequest) -> Face:
    return Face(request.param)
