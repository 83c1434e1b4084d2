"""What the streams of `Encode` and `Fetch` carry, as bytes.

A chunk is framed by hand (protobuf's "Encoding"): through a message object its megabyte would be copied three times.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sidecar.engine.observer import StageTimes
from sidecar.engine.scheduler import Encoded
from sidecar.engine.status import LaneIdentity
from sidecar.pb import encoder_pb2
from sidecar.vision.dtypes import Array, DType

# Well under gRPC's default limit of 4 MB on what a client receives, large enough that framing costs nothing.
CHUNK_BYTES = 1 << 20

WIRE_DTYPES = {
    DType.FLOAT32: encoder_pb2.FLOAT32,
    DType.FLOAT16: encoder_pb2.FLOAT16,
    DType.BFLOAT16: encoder_pb2.BFLOAT16,
}

_VARINT, _BYTES = 0, 2


def embedding(index: int, key: str, encoded: Encoded, file: encoder_pb2.File | None) -> bytes:
    """The part that announces an embedding. With `file` no chunks follow it."""
    described = encoded.description
    message = encoder_pb2.Embedding(
        key=key,
        grid=encoder_pb2.Grid(**described.grid._asdict()),
        tokens=described.tokens,
        width=described.width,
        dtype=WIRE_DTYPES[described.dtype],
        size_bytes=described.nbytes,
        fingerprint=described.fingerprint,
        lane=lane(encoded.lane),
        times=_times(encoded.times),
        file=file,
        cached=encoded.cached,
        coalesced=encoded.coalesced,
    )
    return encoder_pb2.EncodeResponse(index=index, embedding=message).SerializeToString()


def chunks(index: int, rows: Array) -> Iterator[bytes]:
    """An embedding's rows in parts, each copied once."""
    data = rows.reshape(-1).view(np.uint8).data
    for offset in range(0, len(data), CHUNK_BYTES):
        part = data[offset : offset + CHUNK_BYTES]
        head = _number(1, offset) + _tag(2, _BYTES) + _varint(len(part))
        yield b"".join((_number(1, index), _tag(3, _BYTES), _varint(len(head) + len(part)), head, part))


def lane(identity: LaneIdentity) -> encoder_pb2.Lane:
    return encoder_pb2.Lane(runtime=identity.runtime, device=identity.device, precision=identity.precision)


def _times(times: StageTimes) -> encoder_pb2.StageTimes:
    return encoder_pb2.StageTimes(
        decode_ms=times.decode_ms,
        preprocess_ms=times.preprocess_ms,
        queue_ms=times.queue_ms,
        run_ms=times.run_ms,
        publish_ms=times.publish_ms,
    )


def _number(field: int, value: int) -> bytes:
    return _tag(field, _VARINT) + _varint(value) if value else b""


def _tag(field: int, kind: int) -> bytes:
    return bytes((field << 3 | kind,))


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*parts, value))
