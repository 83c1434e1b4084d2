"""The channels to the sidecars, and what may be asked on which.

Calls are dealt out by gRPC among the addresses of one channel. What stays in a sidecar's store (a file, its lease) can only be
asked for again at that same sidecar: so files are linked only where there is one, and a key is looked for at each in turn.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from sidecar.client import AsyncEncoderClient
from sidecar.credentials import client_credentials, read_token
from sidecar.integrations.vllm.options import Options
from sidecar.pb import encoder_pb2

logger = logging.getLogger("vllm." + __name__)


class Sidecars:
    """To be made and used on one event loop."""

    def __init__(self, options: Options, max_embedding_bytes: int) -> None:
        """Raises:
        CredentialsError: if a file of TLS or of the token cannot be read.
        OptionsError: if an address cannot be looked up.
        """
        self._options = options
        keywords: dict[str, Any] = {"max_embedding_bytes": max_embedding_bytes}
        if options.token_file is not None:
            keywords["token"] = read_token(options.token_file)
        if options.uses_tls:
            keywords["credentials"] = client_credentials(options.tls_ca, options.tls_cert, options.tls_key)
        self._open: Callable[..., AsyncEncoderClient] = lambda address, **more: AsyncEncoderClient(
            address, **keywords, **more
        )
        self._clients = AsyncExitStack()
        self.every = self._open(options.target())
        self._clients.push_async_callback(self.every.close)
        self.each = [self.every]
        if len(options.addresses) > 1:
            self.each = [self._open(address) for address in options.addresses]
            for client in self.each:
                self._clients.push_async_callback(client.close)
        self.linking: AsyncEncoderClient | None = None
        self._store: Path | None = None

    def learn_store(self, info: encoder_pb2.InfoResponse) -> None:
        """Link files from now on, if the sidecar's store is a directory of this user on this host."""
        store = self._store_of(info)
        if store == self._store:
            return
        self._store, self.linking = store, None
        if store is not None:
            self.linking = self._open(self._options.target(), store=store)
            self._clients.push_async_callback(self.linking.close)
        logger.info("embeddings are %s", f"linked from the sidecar's store {store}" if store else "sent by the sidecar")

    async def close(self) -> None:
        await self._clients.aclose()

    def _store_of(self, info: encoder_pb2.InfoResponse) -> Path | None:
        if self._options.store == "off" or len(self._options.addresses) > 1 or not info.HasField("store"):
            return None
        directory = Path(info.store.directory if self._options.store == "auto" else self._options.store)
        try:
            return directory if directory.stat().st_uid == os.geteuid() else None
        except OSError:
            return None
