"""What a client gets: the stream of a reply put together into embeddings and errors. Knows nothing of connections.

    ClientError
    ├── EncodeError                 the server, or the way to it, answered with an error
    │   └── RequestTooLargeError    the same request can never succeed there
    └── ProtocolError               the reply breaks the contract; nothing in it is to be trusted

An item's own error is a value, `ItemError`, so that it takes its neighbours nothing.

The sender is not trusted: what decodes these embeddings may crash on one row too few, and a size is memory. Every
number is checked before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.any_pb2 import Any as PackedMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from sidecar.items import WIRE_DTYPES, Item
from sidecar.pb import encoder_pb2
from sidecar.store_file import FILE_NAME, Description, StoreFileError, read
from sidecar.vision.dtypes import Array, DType, to_float32
from sidecar.vision.grid import Grid

# The longest video that Qwen2.5-VL takes (24576 tokens), 72B's 8192 wide in float32, is 768 MiB.
DEFAULT_MAX_EMBEDDING_BYTES = 1 << 30

_DTYPES = {number: dtype for dtype, number in WIRE_DTYPES.items()}
_CODE_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
_DETAIL_TYPES: tuple[type[Message], ...] = (
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
    error_details_pb2.ErrorInfo,
    error_details_pb2.ResourceInfo,
    error_details_pb2.QuotaFailure,
    error_details_pb2.PreconditionFailure,
    error_details_pb2.DebugInfo,
)


class ClientError(Exception):
    """Whatever keeps a client from an answer."""


class EncodeError(ClientError):
    """A call failed as a whole, or an item did where one embedding was all that was asked for.

    Attributes:
        code: the status code's name, such as `RESOURCE_EXHAUSTED`.
        message: what was wrong, in the server's or gRPC's words.
        details: google.rpc messages (BadRequest, RetryInfo, ErrorInfo, …); of a type not known here, still packed.
    """

    def __init__(self, code: str, message: str, details: tuple[Message, ...] = ()) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.details = details

    @property
    def retry_delay_s(self) -> float | None:
        """When the server wants to be asked again, in seconds from now; None where it did not say."""
        return _retry_delay_s(self.details)


class RequestTooLargeError(EncodeError):
    """The request has more bytes than one message to the server may have."""


class ProtocolError(ClientError):
    """The server's reply breaks the contract."""


@dataclass(frozen=True, slots=True)
class ItemError:
    """Why one item could not be encoded; the fields are those of `EncodeError`."""

    code: str
    message: str
    details: tuple[Message, ...] = ()

    @property
    def retry_delay_s(self) -> float | None:
        return _retry_delay_s(self.details)

    def as_exception(self) -> EncodeError:
        return EncodeError(self.code, self.message, self.details)


@dataclass(frozen=True, slots=True)
class Lane:
    """What encoded the item, as the runtime itself reports it."""

    runtime: str
    device: str
    precision: str


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Where the item's time in the server went. The run may have been shared with other items."""

    preprocess_ms: float
    queue_ms: float
    run_ms: float
    decode_ms: float = 0.0
    publish_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Embedding:
    """One item, encoded.

    Attributes:
        key: the name under which the server knows the content.
        grid: the item's size in patches.
        dtype: what `data` holds.
        data: (tokens, width) of `dtype.storage`, rows in raster order of (t, h, w); bfloat16 is uint16, bit for bit.
        fingerprint: equal fingerprints mean interchangeable embeddings.
        cached: it was in the server's store already.
        coalesced: it was being encoded for another caller already.
        path: the store's file that `data` maps, read-only; None where the rows came over the wire.
        lease: holds that file; empty once it was released.
    """

    key: str
    grid: Grid
    dtype: DType
    data: Array
    fingerprint: str
    lane: Lane
    times: StageTimes
    cached: bool = False
    coalesced: bool = False
    path: Path | None = None
    lease: str = ""

    @property
    def tokens(self) -> int:
        return int(self.data.shape[0])

    @property
    def width(self) -> int:
        return int(self.data.shape[1])

    @property
    def spatial_merge_size(self) -> int:
        """Patches along each side of the square that became one token."""
        return math.isqrt(self.grid.patches // self.tokens)

    def float32(self) -> npt.NDArray[np.float32]:
        """`data` widened, (tokens, width)."""
        return to_float32(self.data, self.dtype)


Result = Embedding | ItemError


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """An embedding in a store that this process cannot read, on another host perhaps; the server gives it out by `name`."""

    key: str
    name: str
    lease: str


@dataclass(slots=True)
class _Started:
    """An embedding of which `received` bytes are in place; `buffer` and `embedding.data` are the same memory."""

    embedding: Embedding
    buffer: memoryview
    received: int = 0


class Replies:
    """The answers to one request, fed with the parts of the reply in the order in which they came."""

    def __init__(
        self,
        items: Sequence[Item],
        *,
        max_embedding_bytes: int = DEFAULT_MAX_EMBEDDING_BYTES,
        store: Path | None = None,
    ) -> None:
        """`store`: the only directory in which a file is opened that the server names."""
        self._store = store
        self._unanswered = set(range(len(items)))
        self._count = len(items)
        self._sent_grids = {i: _grid(item.patches.grid) for i, item in enumerate(items) if item.HasField("patches")}
        self._started: dict[int, _Started] = {}
        self._max_embedding_bytes = max_embedding_bytes

    def accept(self, response: encoder_pb2.EncodeResponse) -> tuple[int, Result | Elsewhere] | None:
        """Take one part; return (index, result) if it completes an item.

        Raises:
            ProtocolError: if the part does not fit what came before it, or contradicts itself.
        """
        index, part = response.index, response.WhichOneof("part")
        if index >= self._count:
            raise ProtocolError(f"the reply has a part for item {index} of a request of {self._count}")
        if index not in self._unanswered:
            raise ProtocolError(f"item {index} was answered, then came another part ({part})")
        if part == "chunk":
            return self._take_chunk(index, response.chunk)
        if index in self._started:
            raise ProtocolError(f"item {index}: the embedding is incomplete, then came another answer ({part})")
        if part == "embedding":
            announced = _announced(index, response.embedding, self._max_embedding_bytes)
            self._check_grid(index, announced.grid)
            if response.embedding.HasField("file"):
                self._unanswered.remove(index)
                return index, _stored(index, response.embedding, announced, self._store)
            self._started[index] = _start(response.embedding, announced)
            return None
        if part == "error":
            if response.error.code == grpc.StatusCode.OK.value[0]:
                raise ProtocolError(f"item {index} failed with the status OK")
            self._unanswered.remove(index)
            return index, item_error(response.error)
        raise ProtocolError(f"item {index}: a part of a kind that this client does not know; is the server newer?")

    def finish(self) -> None:
        """The stream has ended without an error.

        Raises:
            ProtocolError: if an item was left unanswered.
        """
        if self._unanswered:
            states = (
                f"{index} ({started.received} of {len(started.buffer)} bytes)"
                if (started := self._started.get(index))
                else f"{index} (nothing)"
                for index in sorted(self._unanswered)
            )
            raise ProtocolError(f"the reply ended before these items were answered: {', '.join(states)}")

    def _take_chunk(self, index: int, chunk: encoder_pb2.Chunk) -> tuple[int, Result] | None:
        started = self._started.get(index)
        if started is None:
            raise ProtocolError(f"item {index}: a chunk came before its embedding")
        # Parts of one stream arrive in the order they were sent, so an offset that is not the next byte is a gap or
        # an overlap; a gap would hand out memory that nobody wrote.
        if chunk.offset != started.received:
            raise ProtocolError(f"item {index}: a chunk at byte {chunk.offset}, expected at {started.received}")
        data = chunk.data
        end = started.received + len(data)
        if not data or end > len(started.buffer):
            raise ProtocolError(
                f"item {index}: a chunk of {len(data)} bytes where {len(started.buffer) - started.received} are missing"
            )
        started.buffer[started.received : end] = data
        started.received = end
        if end < len(started.buffer):
            return None
        self._unanswered.remove(index)
        return index, self._started.pop(index).embedding

    def _check_grid(self, index: int, answered: Grid) -> None:
        sent = self._sent_grids.get(index)
        if sent is not None and sent != answered:
            raise ProtocolError(f"item {index}: patches of grid {tuple(sent)} were answered as {tuple(answered)}")


def item_error(status: status_pb2.Status) -> ItemError:
    """A status in the words of this module; a code that gRPC does not define is UNKNOWN, as gRPC has it."""
    return ItemError(_CODE_NAMES.get(status.code, "UNKNOWN"), status.message, _unpack(status.details))


def _announced(index: int, header: encoder_pb2.Embedding, max_bytes: int) -> Description:
    """What a reply says an embedding is.

    Raises:
        ProtocolError: if that cannot be.
    """
    grid, dtype = _grid(header.grid), _DTYPES.get(header.dtype)
    if dtype is None:
        raise ProtocolError(f"item {index}: an embedding of unknown dtype {header.dtype}")
    if dtype is DType.UINT8:
        raise ProtocolError(f"item {index}: an embedding of dtype uint8, which is for pixels")
    if min(*grid, header.tokens, header.width) < 1:
        raise ProtocolError(
            f"item {index}: grid {tuple(grid)}, {header.tokens} tokens of {header.width}: none of these may be 0"
        )
    # A token is a square of patches, so a wrong number of rows shows without knowing the model.
    merge = math.isqrt(grid.patches // header.tokens)
    if header.tokens * merge**2 != grid.patches or grid.h % merge or grid.w % merge:
        raise ProtocolError(f"item {index}: {header.tokens} tokens cannot come from grid {tuple(grid)}")
    size = header.tokens * header.width * dtype.storage.itemsize
    if header.size_bytes != size:
        raise ProtocolError(
            f"item {index}: size_bytes {header.size_bytes}, but {header.tokens} × {header.width} × {dtype} are {size}"
        )
    if size > max_bytes:
        raise ProtocolError(f"item {index}: an embedding of {size} bytes; this client takes {max_bytes}")
    return Description(grid=grid, tokens=header.tokens, width=header.width, dtype=dtype, fingerprint=header.fingerprint)


def _start(header: encoder_pb2.Embedding, announced: Description) -> _Started:
    buffer = np.empty(announced.nbytes, np.uint8)
    rows = buffer.view(announced.dtype.storage).reshape(announced.tokens, announced.width)
    return _Started(_embedding(header, announced, rows), buffer.data)


def _stored(
    index: int, header: encoder_pb2.Embedding, announced: Description, store: Path | None
) -> Embedding | Elsewhere:
    """Map the file that the server names, if it is in our store.

    Raises:
        ProtocolError: if nobody asked for a file, it lies outside the store, or is not the embedding announced.
    """
    file = header.file
    if store is None:
        raise ProtocolError(f"item {index}: the embedding was left in a file, which nobody asked for")
    path = store / file.name / FILE_NAME
    # Under another path it may be the same store: in a container, say. Under this one it has to be what is announced.
    try:
        rows = read(store, file.name, announced)
    except OSError:
        return Elsewhere(header.key, file.name, file.lease)
    except StoreFileError as error:
        if file.path == str(path):
            raise ProtocolError(f"item {index}: {error}") from error
        return Elsewhere(header.key, file.name, file.lease)
    return replace(_embedding(header, announced, rows), path=path, lease=file.lease)


def _embedding(header: encoder_pb2.Embedding, announced: Description, rows: Array) -> Embedding:
    times = header.times
    return Embedding(
        key=header.key,
        grid=announced.grid,
        dtype=announced.dtype,
        data=rows,
        fingerprint=header.fingerprint,
        lane=Lane(header.lane.runtime, header.lane.device, header.lane.precision),
        times=StageTimes(times.preprocess_ms, times.queue_ms, times.run_ms, times.decode_ms, times.publish_ms),
        cached=header.cached,
        coalesced=header.coalesced,
    )


def _grid(grid: encoder_pb2.Grid) -> Grid:
    return Grid(grid.t, grid.h, grid.w)


def _unpack(packed: Iterable[PackedMessage]) -> tuple[Message, ...]:
    return tuple(_unpack_one(detail) for detail in packed)


def _unpack_one(packed: PackedMessage) -> Message:
    for kind in _DETAIL_TYPES:
        if packed.TypeName() == kind.DESCRIPTOR.full_name:
            detail = kind()
            try:
                packed.Unpack(detail)
            except DecodeError:
                return packed
            return detail
    return packed


def _retry_delay_s(details: Iterable[Message]) -> float | None:
    for detail in details:
        if isinstance(detail, error_details_pb2.RetryInfo):
            return float(detail.retry_delay.seconds + detail.retry_delay.nanos / 1e9)
    return None
