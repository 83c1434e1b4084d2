"""From what is wanted to a checked file, in the background: one task an item, on an event loop of its own.

Every task ends in time, with a file or with a reason. What is tried again, and for how long, is decided here; what becomes of a
request whose embedding cannot be had is not.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any

from sidecar.client import (
    AsyncEncoderClient,
    ClientError,
    Embedding,
    EncodeError,
    ProtocolError,
    RequestTooLargeError,
)
from sidecar.integrations.vllm.features import Wanted
from sidecar.integrations.vllm.files import LocalFile, LocalFiles
from sidecar.integrations.vllm.identity import Identity, MismatchError
from sidecar.integrations.vllm.options import Options
from sidecar.integrations.vllm.sidecars import GivenUpError, Sidecars
from sidecar.integrations.vllm.tally import Tally
from sidecar.store_file import Description

logger = logging.getLogger("vllm." + __name__)

# A call of its own to a sidecar that may hold another model than before.
_INFO_S = 5.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.05, 1.0
_RELEASE_S = 5.0
_CLOSE_S = 10.0
# Another ask of the same item may end better.
_PASSING = {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED", "INTERNAL", "UNKNOWN", "DATA_LOSS", "DEADLINE_EXCEEDED"}
# And does so by waiting alone, so that no number of asks is too many.
_WAITING_HELPS = {"UNAVAILABLE", "RESOURCE_EXHAUSTED"}


class Fetch:
    """One item on its way. Once `done`, exactly one of `file` and `failure` is there."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.file: LocalFile | None = None
        self.failure: str | None = None
        self.future: Future[None] | None = None
        self._unwanted = False
        self._lock = threading.Lock()

    @property
    def done(self) -> bool:
        return self.file is not None or self.failure is not None

    def finish(self, file: LocalFile) -> bool:
        """False if nobody wants it any more."""
        with self._lock:
            if not self._unwanted:
                self.file = file
            return not self._unwanted

    def abandon(self) -> LocalFile | None:
        """Returns what there is to be removed."""
        with self._lock:
            self._unwanted = True
            return self.file


class WrongEmbeddingError(ClientError):
    """A sidecar's answer is not what was asked for."""


class Fetcher:
    """Starts at once; `close` ends it. Its methods are for one thread, the scheduler's."""

    def __init__(self, options: Options, identity: Identity, files: LocalFiles, tally: Tally) -> None:
        self._options = options
        self._identity = identity
        self._files = files
        self._tally = tally
        self._sidecars: Sidecars | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._releases: set[asyncio.Task[None]] = set()
        self._under_way: set[Fetch] = set()
        self._news = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="epd-connector", daemon=True)
        self._thread.start()
        # Options that cannot work are told now, and not at the first image.
        self._run(self._open()).result()
        self._meeting = self._run(self._meet_first())

    def start(self, wanted: Wanted) -> Fetch:
        fetch = Fetch(wanted)
        self._under_way.add(fetch)
        fetch.future = self._run(self._fetch(fetch))
        fetch.future.add_done_callback(lambda _: self._has_ended(fetch))
        return fetch

    def cancel(self, fetch: Fetch) -> None:
        """Nobody wants it any more."""
        if (file := fetch.abandon()) is not None:
            self._files.remove(file.name)
        if fetch.future is not None:
            fetch.future.cancel()

    def wait_for_news(self, seconds: float) -> bool:
        """Until something that is under way has ended, or the time is over; True if there is nothing more to wait for."""
        if not self._under_way:
            return True
        ended = self._news.wait(seconds)
        self._news.clear()
        return ended

    def _has_ended(self, fetch: Fetch) -> None:
        self._under_way.discard(fetch)
        self._news.set()

    def close(self) -> None:
        try:
            self._run(self._close()).result(_CLOSE_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_S)

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _open(self) -> None:
        tower = self._identity.tower
        # Twice the longest video that Qwen2.5-VL takes, in float32.
        self._sidecars = Sidecars(self._options, 2 * 24576 * tower.out_hidden_size * 4, self._refused)
        self._known = asyncio.ensure_future(asyncio.to_thread(self._identity.establish))

    async def _close(self) -> None:
        # Not every task of the loop: gRPC has one for each call, of releases too.
        tasks = [self._known, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # A sidecar that drains waits for its leases.
        await asyncio.gather(*self._releases, return_exceptions=True)
        if self._sidecars is not None:
            await self._sidecars.close()

    def _end_on_close(self) -> None:
        """The task that calls this is cancelled by `close`."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _meet_first(self) -> None:
        """Tell the operator early whether the sidecar is there and holds the same model."""
        self._end_on_close()
        told = ""
        while True:
            try:
                await self._meet()
                proof = "by its weights" if self._identity.proven else "by its structure only"
                return logger.info(
                    "the sidecar serves this model, %s: fingerprint %.16s…", proof, self._identity.expected
                )
            except ClientError as error:
                if str(error) != told:
                    told = str(error)
                    logger.warning("no embeddings from %s yet: %s", ", ".join(self._options.addresses), told)
            await asyncio.sleep(_LAST_PAUSE_S)

    async def _meet(self) -> None:
        await asyncio.shield(self._known)
        assert self._sidecars is not None
        info = await self._sidecars.info(_INFO_S)
        self._identity.meet(info)
        self._sidecars.learn_store(info)

    async def _fetch(self, fetch: Fetch) -> None:
        self._end_on_close()
        begun = time.monotonic()
        try:
            outcome, file = await self._obtain(fetch.wanted, begun + self._options.item_s)
        except Exception as error:
            if not isinstance(error, (ClientError, GivenUpError, OSError, ValueError)):
                logger.exception("a defect in fetching an embedding")
            spent_s, asked = time.monotonic() - begun, ", ".join(self._options.addresses)
            fetch.failure = f"{str(error) or type(error).__name__} ({asked}, after {spent_s:.1f} s)"
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            fetch.failure = "a call was cancelled by nobody here"  # who waits for it must not wait for ever
        else:
            self._tally.obtained(outcome, time.monotonic() - begun, file.description.nbytes)
            if not fetch.finish(file):
                self._files.remove(file.name)

    async def _obtain(self, wanted: Wanted, ends: float) -> tuple[str, LocalFile]:
        """Ask until there is a file, or an end of asking."""
        unreachable_ends = min(ends, time.monotonic() + self._options.patience_s)
        pause_s, asks = _FIRST_PAUSE_S, 0
        while True:
            wait_s, last = pause_s, ends
            try:
                asks += 1
                return await self._ask(wanted, ends)
            except EncodeError as error:
                self._tally.error(error.code)
                if error.code not in _PASSING or isinstance(error, RequestTooLargeError):
                    raise
                if error.code not in _WAITING_HELPS and asks >= self._options.attempts:
                    raise
                if error.code == "UNAVAILABLE":
                    last = unreachable_ends
                wait_s = max(pause_s, error.retry_delay_s or 0.0)
                failure: Exception = error
            except (ProtocolError, WrongEmbeddingError, MismatchError) as error:
                self._tally.error("wrong embedding")
                if asks >= self._options.attempts:
                    raise
                failure = error
            if time.monotonic() + wait_s >= last:
                raise failure
            await asyncio.sleep(wait_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)

    async def _ask(self, wanted: Wanted, ends: float) -> tuple[str, LocalFile]:
        await asyncio.shield(self._known)
        if self._identity.expected is None:
            await self._meet()
        assert self._sidecars is not None
        timeout_s = ends - time.monotonic()
        if timeout_s <= 0:
            raise EncodeError("DEADLINE_EXCEEDED", "its time was over before a sidecar was asked")
        client: AsyncEncoderClient | None
        if wanted.pixels is None:
            outcome, (embedding, client) = "fetched", await self._sidecars.fetch(wanted.key, timeout_s)
        else:
            item = await asyncio.to_thread(wanted.item, self._identity.tower, self._identity.pixels)
            embedding, client = await self._sidecars.encode(item, timeout_s, partial(self._check, wanted))
            outcome = "linked" if embedding.path is not None else "sent"
        try:
            return outcome, await self._keep(wanted, embedding)
        finally:
            if client is not None and embedding.lease:
                release = asyncio.ensure_future(_release(client, embedding.lease))
                self._releases.add(release)
                release.add_done_callback(self._releases.discard)

    def _refused(self, code: str) -> None:
        self._tally.error("wrong embedding" if code == "PROTOCOL" else code)

    def _check(self, wanted: Wanted, embedding: Embedding) -> None:
        """Raises:
        ClientError: if it is not what was asked for.
        """
        width = self._identity.tower.out_hidden_size
        if embedding.grid != wanted.grid or embedding.data.shape != (wanted.tokens, width):
            raise WrongEmbeddingError(
                f"the sidecar's embedding is {embedding.tokens} × {embedding.width} for grid {tuple(embedding.grid)}, "
                f"{wanted.tokens} × {width} for grid {tuple(wanted.grid)} was asked for"
            )
        self._identity.check(embedding.fingerprint)

    async def _keep(self, wanted: Wanted, embedding: Embedding) -> LocalFile:
        self._check(wanted, embedding)
        description = Description(
            grid=embedding.grid,
            tokens=embedding.tokens,
            width=embedding.width,
            dtype=embedding.dtype,
            fingerprint=embedding.fingerprint,
        )
        adding = asyncio.ensure_future(asyncio.to_thread(self._files.add, embedding.data, description, embedding.path))
        try:
            return await asyncio.shield(adding)
        except ValueError as error:
            raise WrongEmbeddingError(str(error)) from error
        except asyncio.CancelledError:  # a thread cannot be: what it makes goes when it is made
            adding.add_done_callback(self._remove_added)
            raise

    def _remove_added(self, adding: asyncio.Future[LocalFile]) -> None:
        if not adding.cancelled() and adding.exception() is None:
            self._files.remove(adding.result().name)


async def _release(client: AsyncEncoderClient, lease: str) -> None:
    try:
        await client.release([lease], _RELEASE_S)
    except ClientError:
        logger.debug("a lease is left to expire")
