"""Another artifact in the place of the served one, without a lost request.

The new model is loaded and warmed up beside the old one, which takes its memory twice for a while. Then it takes the old one's
place at once: calls that have begun end on the old lanes, calls that begin run on the new. If it cannot be loaded, the old one
goes on and the log says why.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from sidecar.artifact import SEAL
from sidecar.server.calls import Calls
from sidecar.server.model import Model
from sidecar.server.service import EncoderService

logger = logging.getLogger(__name__)

_POLL_S = 1.0


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
    ) -> None:
        """`artifact`: the directory of the settings. `failed` is told why a new one could not be loaded."""
        self._service = service
        self._calls = calls
        self._load = load
        self._seal_path = artifact / SEAL
        self._watch = watch
        self._failed = failed
        self._asked = asyncio.Event()
        self._seen = self._seal()
        self._retiring: set[asyncio.Task[None]] = set()

    def ask(self) -> None:
        """Reload, whether the artifact is another one or not."""
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
            self._asked.clear()
            await self._reload()

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
        # Beside whatever comes next: a caller who does not read its answers may keep the old model for long.
        retiring = asyncio.create_task(self._retire(old))
        self._retiring.add(retiring)
        retiring.add_done_callback(self._retiring.discard)

    async def _retire(self, old: Model) -> None:
        await self._calls.ended(old)
        await asyncio.to_thread(old.scheduler.close)
        logger.info("the lanes loaded before, of %s, are closed", old.fingerprint[:16])

    def _seal(self) -> bytes | None:
        try:
            return self._seal_path.read_bytes()
        except OSError:
            return None
