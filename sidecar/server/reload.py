"""Another artifact in the place of the served one, without a lost request.

The new model is loaded and warmed up beside the old one, which takes its memory twice for a while. Then it takes the old one's
place at once: calls that have begun end on the old lanes, calls that begin run on the new. If it cannot be loaded, the old one
goes on and the log says why.

There are never more than two models. A further reload waits until the calls of the model before have ended, for at most
`patience_s` since that was replaced, and then ends them with UNAVAILABLE: a caller who does not read its answers would keep it
for ever. Requests to reload that come meanwhile are one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from sidecar.artifact import SEAL
from sidecar.server.calls import Calls
from sidecar.server.model import Model
from sidecar.server.service import EncoderService

logger = logging.getLogger(__name__)

_POLL_S = 1.0
# How long a run may take once nobody waits for it.
_LAST_RUN_S = 60.0


class Reloader:
    """Waits to be asked, by `ask` or by the directory's seal changing, and reloads."""

    def __init__(
        self,
        service: EncoderService,
        calls: Calls,
        load: Callable[[], Awaitable[Model]],
        artifact: Path,
        *,
        watch: bool,
        failed: Callable[[str], None],
        patience_s: float,
    ) -> None:
        """`artifact`: the directory of the settings. `failed` is told why a new one could not be loaded. `patience_s`: how long
        the calls of a replaced model may hold up the next reload."""
        self._service = service
        self._calls = calls
        self._load = load
        self._seal_path = artifact / SEAL
        self._watch = watch
        self._failed = failed
        self._asked = asyncio.Event()
        self._loading = False
        self._seen = self._seal()
        self._patience_s = patience_s
        self._retiring: asyncio.Task[None] | None = None
        self._replaced_at = 0.0
        self._out_of_patience = asyncio.Event()

    def ask(self) -> None:
        """Reload, whether the artifact is another one or not. Requests that come while one waits or loads are one."""
        if self._loading:
            logger.info("asked to reload while still loading: the artifact is loaded once more after this")
        elif self._asked.is_set():
            logger.info("asked to reload while a reload is waiting: the two are one")
        self._asked.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await asyncio.wait_for(self._asked.wait(), _POLL_S if self._watch else None)
            except TimeoutError:
                # An artifact that is being replaced has no seal for a moment.
                if self._seal() in (self._seen, None):
                    continue
                logger.info("another artifact has taken the place of the served one")
            await self._make_room()
            self._asked.clear()
            self._loading = True
            try:
                await self._reload()
            finally:
                self._loading = False

    async def _make_room(self) -> None:
        """Return once the model before the served one is gone."""
        if self._retiring is None or self._retiring.done():
            return
        wait_s = max(0.0, self._replaced_at + self._patience_s - time.monotonic())
        logger.info("a reload waits for calls of the model before to end, at most %.1f s", wait_s)
        done, _ = await asyncio.wait((self._retiring,), timeout=wait_s)
        if not done:
            self._out_of_patience.set()
            await asyncio.wait((self._retiring,))

    async def _reload(self) -> None:
        self._seen = self._seal()
        try:
            model = await self._load()
        except Exception as error:
            logger.error("the new artifact is not served, the old one still is: %s", error)
            self._failed(str(error))
            return
        old = self._service.model
        if model.scheduler.store is not None:
            # Gigabytes may go. What the old model still finishes meanwhile is sent inline.
            await asyncio.to_thread(model.scheduler.store.turn_over, model.fingerprint)
        self._service.model = model
        if model.fingerprint == old.fingerprint:
            logger.info("loaded %s anew: equal weights, and what is stored stays", model.fingerprint[:16])
        else:
            logger.info("serving %s in the place of %s", model.fingerprint[:16], old.fingerprint[:16])
        if (now := _variants(model)) != (before := _variants(old)):
            logger.warning("the new artifact changes what the lanes run: %s in the place of %s", now, before)
        self._replaced_at = time.monotonic()
        self._out_of_patience = asyncio.Event()
        self._retiring = asyncio.create_task(self._retire(old))

    async def _retire(self, old: Model) -> None:
        ended = asyncio.create_task(self._calls.ended(old))
        waiting = asyncio.create_task(self._out_of_patience.wait())
        await asyncio.wait((ended, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not ended.done():
            count = await self._calls.send_away(old)
            logger.warning("%d calls of the model before were ended with UNAVAILABLE for a reload", count)
            await ended
        if await asyncio.to_thread(old.scheduler.close, _LAST_RUN_S):
            logger.info("the lanes loaded before, of %s, are closed", old.fingerprint[:16])
        else:
            logger.error("a run on the lanes loaded before, of %s, does not end; they stay", old.fingerprint[:16])

    def _seal(self) -> bytes | None:
        try:
            return self._seal_path.read_bytes()
        except OSError:
            return None


def _variants(model: Model) -> str:
    """Runtime and precision of each lane, in their order."""
    return ", ".join(f"{lane.identity.runtime}/{lane.identity.precision}" for lane in model.scheduler.lanes)
