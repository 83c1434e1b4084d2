"""One request of a prefill worker: all images at once, each to whichever sidecar the fleet picks, checked before it goes on.

A row too few ends prefill's engine, and prefill keeps embeddings by the image they belong to: so nothing leaves here that is not
the embedding of the right model, of the right shape, and finite.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from sidecar.fleet import Fleet
from sidecar.integrations.dynamo.handover import HandOver
from sidecar.integrations.dynamo.model import Model, WrongEmbeddingError
from sidecar.integrations.dynamo.protocol import Bounds, EncodeRequest, RequestError, Transfer
from sidecar.items import Item
from sidecar.replies import ClientError, EncodeError
from sidecar.vision.grid import Grid

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


class FailedError(Exception):
    """A request has no answer; its words are for whoever sent it."""


class Worker:
    """Answers requests. `tally` counts `requests`, `images` and `failed` ones."""

    def __init__(self, fleet: Fleet, model: Model, hand_over: HandOver, bounds: Bounds, request_s: float) -> None:
        self.tally: Counter[str] = Counter()
        self._fleet = fleet
        self._model = model
        self._hand_over = hand_over
        self._bounds = bounds
        self._request_s = request_s
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def answer(self, raw: str, gone: Callable[[], Awaitable[object]] | None = None) -> str | None:
        """The answer to a request; None if its caller has gone.

        Args:
            gone: returns once that has happened.

        Raises:
            FailedError: if an image cannot be had; the others of the request are then withdrawn.
        """
        started = time.monotonic()
        self._begin()
        try:
            request = EncodeRequest(raw, self._bounds)
            encoding = asyncio.create_task(self._encode_all(request))
            if not await _first(encoding, gone):
                logger.debug("request %s: its caller has gone", request.id)
                return None
            answer = request.answer(encoding.result())
        except RequestError as error:
            self.tally["failed"] += 1
            raise FailedError(str(error)) from error
        except FailedError as error:
            self.tally["failed"] += 1
            logger.warning("request %s: %s", request.id, error)
            raise
        finally:
            self._end()
        self.tally["images"] += len(request.images)
        took_ms = (time.monotonic() - started) * 1e3
        logger.debug("request id=%s images=%d ms=%.1f", request.id, len(request.images), took_ms)
        return answer

    async def drain(self, seconds: float) -> bool:
        """Wait until nothing is under way. Returns whether that was so in time."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def _encode_all(self, request: EncodeRequest) -> list[tuple[Grid, Transfer]]:
        ends = time.monotonic() + self._request_s
        tasks = [asyncio.create_task(self._encode(number, item, ends)) for number, item in enumerate(request.images, 1)]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for task in tasks:
                if not task.cancelled() and task.exception() is None:
                    await self._hand_over.withdraw(task.result()[1])
            raise

    async def _encode(self, number: int, item: Item, ends: float) -> tuple[Grid, Transfer]:
        try:
            embedding = await self._fleet.encode(item, max(0.001, ends - time.monotonic()))
            self._model.check(embedding)
            async with asyncio.timeout(max(0.001, ends - time.monotonic())):
                return embedding.grid, await self._hand_over.offer(embedding)
        except EncodeError as error:
            if error.code in _THEIR_FAULT:
                raise FailedError(f"image {number}: {error.message}") from error
            raise FailedError(f"image {number} could not be encoded now, try again: {error.message}") from error
        except (ClientError, WrongEmbeddingError) as error:
            logger.error("an embedding was refused: %s", error)
            raise FailedError(f"image {number}: the encoder's answer was refused: {error}") from error
        except TimeoutError as error:
            logger.error("embeddings are not read as fast as they come: there was no room for one in time")
            raise FailedError(f"image {number} could not be handed over in time, try again") from error
        except OSError as error:
            logger.error("an embedding could not be handed over: %s", error)
            raise FailedError(f"image {number} could not be handed over: {error.strerror}") from error

    def _begin(self) -> None:
        self.tally["requests"] += 1
        self._under_way += 1
        self._idle.clear()

    def _end(self) -> None:
        self._under_way -= 1
        if not self._under_way:
            self._idle.set()


async def _first(
    encoding: asyncio.Task[list[tuple[Grid, Transfer]]], gone: Callable[[], Awaitable[object]] | None
) -> bool:
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
