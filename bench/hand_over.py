"""What handing an embedding over costs: from the store by path, from the store inline, and what gRPC takes for the same.

    python -m bench.hand_over --artifact DIR

Each figure is timed in turn with what it is compared to, in one run. Needs an artifact of the true width (random:3b): the rows
of a 1080p picture are then 11 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import numpy as np
from PIL import Image

from bench.server import serving
from export.samples import PHOTO_NAMES, PHOTOS
from sidecar.client import Embedding, EncoderClient, image_item, rgb_image_item
from sidecar.pb import encoder_pb2, encoder_pb2_grpc

_CHUNK_BYTES = 1 << 20
_METHOD = "/bench.Bare/Stream"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--flags", default="", help="further flags of the server")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        store = Path(scratch) / "store"
        flags = ("--store", str(store), *arguments.flags.split())
        with serving(arguments.artifact, Path(scratch) / "log", *flags) as server:
            mapped, sent = EncoderClient(server.address, store=store), EncoderClient(server.address)
            with mapped, sent, grpc.insecure_channel(server.address) as channel:
                compare(mapped, sent, encoder_pb2_grpc.EncoderStub(channel), arguments.rounds)


def compare(mapped: EncoderClient, sent: EncoderClient, stub: encoder_pb2_grpc.EncoderStub, rounds: int) -> None:
    photo = image_item(_photo(448))
    large = rgb_image_item(np.asarray(Image.open(io.BytesIO(_photo(1920, 1080)))), key="1080p")
    (first,) = mapped.encode([photo], 600)
    began = time.perf_counter()
    (whole,) = mapped.encode([large], 600)
    assert isinstance(first, Embedding) and isinstance(whole, Embedding)
    print(f"448×448: {first.data.nbytes / 1e6:.2f} MB; 1080p: {whole.data.nbytes / 1e6:.2f} MB")
    print(f"1080p encoded in {time.perf_counter() - began:.1f} s on {whole.lane.device}")

    empty = encoder_pb2.ReleaseRequest()
    unary, hit = in_turn(rounds, lambda: stub.Release(empty), lambda: _checked(mapped.encode([photo])))
    print(f"empty unary call {unary:.3f} ms, cache hit of a 448×448 photo by path {hit:.3f} ms: {hit / unary:.2f} ×")

    small_ms, large_ms = in_turn(
        rounds, lambda: _checked(mapped.fetch([first.key])), lambda: _checked(mapped.fetch(["1080p"]))
    )
    print(f"by path: 448×448 {small_ms:.3f} ms, 1080p {large_ms:.3f} ms: {large_ms / small_ms:.2f} ×")

    with bare_server(whole.data.nbytes) as address, grpc.insecure_channel(address) as channel:
        stream = channel.unary_stream(_METHOD)
        bare_ms, inline_ms = in_turn(
            max(20, rounds // 5), lambda: [None for _ in stream(b"")], lambda: _checked(sent.fetch(["1080p"]))
        )
    rate = whole.data.nbytes / 1e3
    print(f"inline 1080p: {inline_ms:.2f} ms ({rate / inline_ms:.0f} MB/s), a bare gRPC stream {bare_ms:.2f} ms")
    print(f"({rate / bare_ms:.0f} MB/s): {bare_ms / inline_ms:.0%} of its rate")


def in_turn(rounds: int, *calls: Callable[[], object]) -> list[float]:
    """Median milliseconds of each, called one after the other in every round."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 5):
        for call, taken in zip(calls, times, strict=True):
            began = time.perf_counter()
            call()
            if number >= 5:
                taken.append((time.perf_counter() - began) * 1e3)
    return [statistics.median(taken) for taken in times]


class bare_server:
    """A gRPC server of its own process that streams so many bytes and does nothing else."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __enter__(self) -> str:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve_bare, args=(self._size, theirs), daemon=True)
        self._process.start()
        return str(ours.recv())

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()


def _serve_bare(size: int, address: Connection) -> None:
    async def stream(request: bytes, context: object) -> AsyncIterator[bytes]:
        data = memoryview(whole)
        for offset in range(0, size, _CHUNK_BYTES):
            yield bytes(data[offset : offset + _CHUNK_BYTES])

    async def run() -> None:
        server = grpc.aio.server()
        handlers = {"Stream": grpc.unary_stream_rpc_method_handler(stream)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Bare", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        address.send(f"127.0.0.1:{port}")
        await server.wait_for_termination()

    whole = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    asyncio.run(run())


def _photo(width: int, height: int | None = None) -> bytes:
    buffer = io.BytesIO()
    photo = Image.open(PHOTOS / PHOTO_NAMES[0]).convert("RGB").resize((width, height or width))
    photo.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _checked(results: list[object]) -> None:
    assert all(isinstance(result, Embedding) and result.cached for result in results), results


if __name__ == "__main__":
    main()
