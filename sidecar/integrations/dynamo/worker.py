"""One request of a prefill worker: all images at once, each to whichever sidecar the fleet picks, checked before it goes on.

A row too few ends prefill's engine, and prefill keeps embeddings by the image they belong to: so nothing leaves here that is not
the embedding of the right model, of the right shape, and finite.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from sidecar.fleet import Fleet
from sidecar.integrations.dynamo.handover import HandOver
from sidecar.integrations.dynamo.images import Bounds
from sidecar.integrations.dynamo.metrics import Tally
from sidecar.integrations.dynamo.model import Model, WrongEmbeddingError
from sidecar.integrations.dynamo.protocol import EncodeRequest, RequestError
from sidecar.items import Item
from sidecar.replies import ClientError, Embedding, EncodeError

logger = logging.getLogger(__name__)

# What is the image's fault, or the request's, and not the sidecars'.
_THEIR_FAULT = {
    "INVALID_ARGUMENT",
    "FAILED_PRECONDITION",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "NOT_FOUND",
    "PERMISSION_DENIED",
}


# So many images of one request are under way at a time: to the sidecars, all requests are one client's, in their order.
_ALONGSIDE = 32


class FailedError(Exception):
    """A request has no answer; its words are for whoever sent it."""


class Worker:
    """Answers requests and counts them in `tally`."""

    def __init__(self, fleet: Fleet, model: Model, hand_over: HandOver, bounds: Bounds, request_s: float) -> None:
        """
        Args:
            bounds: for a request that brings none of its own.
            request_s: how long a request may take, all its images together.
        """
        self.tally = Tally()
        self._fleet = fleet
        self._model = model
        self._hand_over = hand_over
        self._bounds = bounds
        self._request_s = request_s
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def answer(self, raw: str, name: str, gone: Callable[[], Awaitable[object]] | None = None) -> str | None:
        """The answer to a request; None if its caller has gone.

        Args:
            raw: what prefill sent.
            name: Dynamo's, for the log.
            gone: returns once the caller has gone.

        Raises:
            FailedError: if an image cannot be had; nothing is handed over then.
        """
        started = time.monotonic()
        self._under_way += 1
        self._idle.clear()
        count, outcome = 0, "failed"
        try:
            request = EncodeRequest(raw, self._bounds)
            count = len(request.images)
            encoding = asyncio.create_task(self._answer(request))
            if not await _ended_first(encoding, gone):
                outcome = "left"
                return None
            answer = encoding.result()
            outcome = "answered"
            return answer
        except (RequestError, FailedError) as error:
            logger.warning("request %s failed: %s", name, error)
            raise FailedError(str(error)) from error
        except asyncio.CancelledError:
            outcome = "left"
            raise
        finally:
            self.tally.requests[outcome] += 1
            logger.debug(
                "request id=%s outcome=%s images=%d ms=%.1f", name, outcome, count, (time.monotonic() - started) * 1e3
            )
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def drain(self, seconds: float) -> bool:
        """Wait until nothing is under way. Returns whether that was so in time."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def _answer(self, request: EncodeRequest) -> str:
        ends = time.monotonic() + self._request_s
        embeddings = await self._encode_all(request, ends)
        try:
            async with asyncio.timeout(_left_s(ends)):
                transfers = await self._hand_over.offer(embeddings)
        except TimeoutError as error:
            raise self._failed(
                "room", "the embeddings could not be handed over in time: those before them have not been read"
            ) from error
        except OSError as error:
            raise self._failed("room", f"the embeddings could not be handed over: {error.strerror or error}") from error
        return request.answer([(one.grid, transfer) for one, transfer in zip(embeddings, transfers, strict=True)])

    async def _encode_all(self, request: EncodeRequest, ends: float) -> list[Embedding]:
        room = asyncio.Semaphore(_ALONGSIDE)

        async def encode(number: int, item: Item) -> Embedding:
            async with room:
                return await self._encode(number, item, ends)

        tasks = [asyncio.create_task(encode(number, item)) for number, item in enumerate(request.images, 1)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()  # nothing, where it is done
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _encode(self, number: int, item: Item, ends: float) -> Embedding:
        started = time.monotonic()
        try:
            embedding = await self._fleet.encode(item, _left_s(ends), check=self._check)
        except EncodeError as error:
            if error.code in _THEIR_FAULT:
                raise self._failed("image", f"image {number}: {error.message}") from error
            why = f"image {number} could not be encoded now, try again: {error.message}"
            raise self._failed("sidecars", why) from error
        except ClientError as error:
            raise self._failed("embedding", f"image {number}: the encoder's answer was refused: {error}") from error
        self.tally.image_took(time.monotonic() - started)
        return embedding

    def _failed(self, fault: str, why: str) -> FailedError:
        self.tally.failures[fault] += 1
        return FailedError(why)

    def _check(self, embedding: Embedding) -> None:
        try:
            self._model.check(embedding)
        except WrongEmbeddingError as error:
            logger.error("an embedding of %s was refused: %s", embedding.lane.device, error)
            raise


def _left_s(ends: float) -> float:
    return max(0.001, ends - time.monotonic())


async def _ended_first(encoding: asyncio.Task[str], gone: Callable[[], Awaitable[object]] | None) -> bool:
    """Whether the encoding ended, one way or another, before its caller had gone; else it is cancelled."""
    leaving = asyncio.ensure_future(gone()) if gone is not None else None
    try:
        await asyncio.wait({encoding, leaving} if leaving else {encoding}, return_when=asyncio.FIRST_COMPLETED)
        return encoding.done()
    finally:
        if leaving is not None:
            leaving.cancel()
        if not encoding.done():
            encoding.cancel()
            await asyncio.gather(encoding, return_exceptions=True)
