"""What is framed by hand is what protobuf would have written."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sidecar.pb import encoder_pb2
from sidecar.server import wire


@given(index=st.integers(0, 2**32 - 1), size=st.sampled_from([1, 2, 127, 128, 16_383, 16_384, wire.CHUNK_BYTES // 2]))
def test_chunks_are_the_messages_that_the_contract_has(index: int, size: int) -> None:
    rows = np.arange(size, dtype=np.uint16).reshape(1, size)
    (part,) = wire.chunks(index, rows)
    chunk = encoder_pb2.Chunk(offset=0, data=rows.tobytes())
    assert part == encoder_pb2.EncodeResponse(index=index, chunk=chunk).SerializeToString()


def test_large_embeddings_come_in_chunks_that_add_up() -> None:
    rows = np.random.default_rng(0).integers(0, 2**16, (700, 2048), np.uint16)
    parts = [encoder_pb2.EncodeResponse.FromString(part) for part in wire.chunks(3, rows)]
    assert {part.index for part in parts} == {3}
    assert [part.chunk.offset for part in parts] == list(range(0, rows.nbytes, wire.CHUNK_BYTES))
    assert b"".join(part.chunk.data for part in parts) == rows.tobytes()
    assert max(part.ByteSize() for part in parts) < 4_000_000
