"""The Encoder service: one request in, a stream of parts out, an answer for every item."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import grpc
import numpy as np
from grpc_status import rpc_status

from sidecar import __version__
from sidecar.artifact import Accuracy, Manifest, Variant
from sidecar.engine.keys import content_key
from sidecar.engine.lane import Encoded, Lane
from sidecar.engine.scheduler import Scheduler
from sidecar.errors import EncoderError, Fault, Overloaded, fault_of
from sidecar.pb import encoder_pb2
from sidecar.server.contents import Preprocessor
from sidecar.server.requests import parse_request
from sidecar.settings import Settings
from sidecar.vision.dtypes import DType
from sidecar.vision.pixels import Patches

logger = logging.getLogger(__name__)

SERVICE = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"].full_name

# Well under gRPC's default limit of 4 MB on what a client receives, large enough that framing costs nothing.
CHUNK_BYTES = 1 << 20

_WIRE_DTYPE = {
    DType.FLOAT32: encoder_pb2.FLOAT32,
    DType.FLOAT16: encoder_pb2.FLOAT16,
    DType.BFLOAT16: encoder_pb2.BFLOAT16,
}

InfoContext = grpc.aio.ServicerContext[encoder_pb2.InfoRequest, encoder_pb2.InfoResponse]
EncodeContext = grpc.aio.ServicerContext[bytes, encoder_pb2.EncodeResponse]


@dataclass(frozen=True, slots=True)
class _Answer:
    """One item's outcome: an embedding, or why there is none."""

    index: int
    outcome: tuple[encoder_pb2.Embedding, Encoded] | Fault


class EncoderService:
    """Takes requests apart into items, and puts the answers together."""

    def __init__(
        self,
        manifest: Manifest,
        variant: Variant,
        scheduler: Scheduler,
        preprocessing: Executor,
        settings: Settings,
    ) -> None:
        self._manifest = manifest
        self._variant = variant
        self._scheduler = scheduler
        self._preprocessing = preprocessing
        self._held_bytes = 0  # of requests and embeddings, in calls that are not over
        self._settings = settings
        self._preprocessor = Preprocessor(
            manifest.tower, manifest.pixels, settings.max_image_pixels, settings.max_item_patches
        )

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the methods, as generated code would, but for `Encode` taking a request's bytes (see `requests`)."""
        info = grpc.unary_unary_rpc_method_handler(
            self.Info,
            request_deserializer=encoder_pb2.InfoRequest.FromString,
            response_serializer=encoder_pb2.InfoResponse.SerializeToString,
        )
        encode = grpc.unary_stream_rpc_method_handler(
            self.Encode, response_serializer=encoder_pb2.EncodeResponse.SerializeToString
        )
        handlers = {"Info": info, "Encode": encode}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def Info(self, request: encoder_pb2.InfoRequest, context: InfoContext) -> encoder_pb2.InfoResponse:
        manifest, settings = self._manifest, self._settings
        tower, pixels = manifest.tower, manifest.pixels
        lanes = self._scheduler.lanes
        return encoder_pb2.InfoResponse(
            version=__version__,
            fingerprint=manifest.fingerprint,
            checkpoint=encoder_pb2.Checkpoint(
                source=manifest.checkpoint.source,
                dtype=str(manifest.checkpoint.dtype),
                random_weights=manifest.checkpoint.random_weights,
            ),
            tower=encoder_pb2.TowerSpec(
                depth=tower.depth,
                hidden_size=tower.hidden_size,
                out_hidden_size=tower.out_hidden_size,
                patch_size=tower.patch_size,
                temporal_patch_size=tower.temporal_patch_size,
                spatial_merge_size=tower.spatial_merge_size,
                in_channels=tower.in_channels,
            ),
            pixels=encoder_pb2.PixelSpec(**pixels.to_dict()),
            embedding_dtype=_WIRE_DTYPE[lanes[0].runtime.output_dtype],
            lanes=[_lane(lane) for lane in lanes],
            limits=encoder_pb2.Limits(
                message_bytes=settings.max_message_bytes,
                items=settings.max_items,
                image_pixels=settings.max_image_pixels,
                item_patches=settings.max_item_patches,
            ),
            accuracy=[_accuracy(self._variant, self._variant.accuracy)] if self._variant.accuracy else [],
        )

    async def Encode(self, message: bytes, context: EncodeContext) -> AsyncIterator[encoder_pb2.EncodeResponse]:
        started = time.perf_counter()
        try:
            self._admit(len(message))
            request = parse_request(message, self._settings.max_items)
        except EncoderError as error:
            status = rpc_status.to_status(fault_of(error).status())
            await context.abort_with_status(status)  # type: ignore[attr-defined]  # grpc-stubs lacks it
        answered = failed = 0
        held = len(message)
        self._held_bytes += held
        tasks = [asyncio.create_task(self._answer(index, item)) for index, item in enumerate(request.items)]
        try:
            for finished in asyncio.as_completed(tasks):
                answer = await finished
                failed += isinstance(answer.outcome, Fault)
                if not isinstance(answer.outcome, Fault):
                    result = answer.outcome[0].size_bytes
                    held += result
                    self._held_bytes += result
                for part in _parts(answer):
                    yield part
                answered += 1
        finally:
            # The caller has gone, or everything is answered: nothing of this request may still run.
            for task in tasks:
                task.cancel()
            self._held_bytes -= held
            took_ms = (time.perf_counter() - started) * 1e3
            logger.info("encode items=%d answered=%d failed=%d ms=%.1f", len(tasks), answered, failed, took_ms)

    def _admit(self, size: int) -> None:
        """Callers who send and do not read what they get must not fill the memory."""
        limit = self._settings.max_held_bytes
        if self._held_bytes and self._held_bytes + size > limit:
            raise Overloaded(f"calls in hand hold {self._held_bytes} bytes, the limit is {limit}", retry_after_s=1.0)

    async def _answer(self, index: int, item: encoder_pb2.Item) -> _Answer:
        try:
            return _Answer(index, await self._encode(item))
        except Exception as error:  # one item's fault must not reach its neighbours
            fault = fault_of(error)
            if fault.reason == "INTERNAL":
                logger.exception("an item failed")
            return _Answer(index, fault)

    async def _encode(self, item: encoder_pb2.Item) -> tuple[encoder_pb2.Embedding, Encoded]:
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        patches, key = await loop.run_in_executor(self._preprocessing, self._prepare, item)
        preprocess_ms = (time.perf_counter() - started) * 1e3
        encoded = await self._scheduler.encode(patches)
        tokens, width = encoded.rows.shape
        times = encoder_pb2.StageTimes(preprocess_ms=preprocess_ms, queue_ms=encoded.queue_ms, run_ms=encoded.run_ms)
        embedding = encoder_pb2.Embedding(
            key=key,
            grid=encoder_pb2.Grid(**patches.grid._asdict()),
            tokens=tokens,
            width=width,
            dtype=_WIRE_DTYPE[encoded.lane.runtime.output_dtype],
            size_bytes=encoded.rows.nbytes,
            fingerprint=self._manifest.fingerprint,
            lane=_lane(encoded.lane),
            times=times,
        )
        return embedding, encoded

    def _prepare(self, item: encoder_pb2.Item) -> tuple[Patches, str]:
        patches = self._preprocessor.patches(item)
        return patches, item.key or content_key(patches)


def _parts(answer: _Answer) -> Iterator[encoder_pb2.EncodeResponse]:
    """What the stream carries for one item; the embedding's bytes are copied a chunk at a time, never as a whole."""
    if isinstance(answer.outcome, Fault):
        yield encoder_pb2.EncodeResponse(index=answer.index, error=answer.outcome.status())
        return
    embedding, encoded = answer.outcome
    yield encoder_pb2.EncodeResponse(index=answer.index, embedding=embedding)
    data = encoded.rows.reshape(-1).view(np.uint8).data
    for offset in range(0, len(data), CHUNK_BYTES):
        chunk = encoder_pb2.Chunk(offset=offset, data=bytes(data[offset : offset + CHUNK_BYTES]))
        yield encoder_pb2.EncodeResponse(index=answer.index, chunk=chunk)


def _lane(lane: Lane) -> encoder_pb2.Lane:
    runtime = lane.runtime
    return encoder_pb2.Lane(runtime=runtime.name, device=runtime.device, precision=runtime.precision)


def _accuracy(variant: Variant, accuracy: Accuracy) -> encoder_pb2.Accuracy:
    return encoder_pb2.Accuracy(
        runtime=variant.runtime,
        precision=variant.precision,
        cosine_min=accuracy.cosine_min,
        cosine_mean=accuracy.cosine_mean,
        relative_error=accuracy.relative_error,
    )
