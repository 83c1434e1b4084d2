"""The channels to the sidecars, and what may be asked on which.

Calls are dealt out by gRPC among the addresses of one channel. What stays in a sidecar's store (a file, its lease) can only be
asked for again at that same sidecar: so files are linked only where there is one, and a key is looked for at each in turn.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from sidecar.client import AsyncEncoderClient
from sidecar.credentials import client_credentials, read_token
from sidecar.integrations.vllm.options import Options, resolve
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
        self._keywords = keywords
        self._clients = AsyncExitStack()
        # A list is of numbers by then, and a certificate is for a name.
        name = options.addresses[0] if len(options.addresses) > 1 else None
        self.every = self._open(options.target(), name)
        self._single: dict[str, AsyncEncoderClient] = {}
        self.linking: AsyncEncoderClient | None = None
        self._store: Path | None = None

    async def each(self) -> list[AsyncEncoderClient]:
        """One client for each sidecar that there is now.

        Raises:
            OptionsError: if a name cannot be looked up.
        """
        if self.linking is not None:
            return [self.linking]
        if not self._options.may_be_several:
            return [self.every]
        names = {address: address for address in self._options.addresses}
        if (target := self._options.addresses[0]).startswith("dns:"):
            name = target.rpartition("/")[2].removeprefix("dns:")
            names = {address: name for _, address in await asyncio.to_thread(resolve, name)}
        for address in names.keys() - self._single.keys():
            self._single[address] = self._open(address, names[address])
        return [self._single[address] for address in names]

    def learn_store(self, info: encoder_pb2.InfoResponse) -> None:
        """Link files from now on, if the sidecar's store is a directory of this user on this host."""
        store = self._store_of(info)
        if store == self._store:
            return
        self._store, self.linking = store, None
        if store is not None:
            self.linking = self._open(self._options.target(), None, store=store)
        logger.info("embeddings are %s", f"linked from the sidecar's store {store}" if store else "sent by the sidecar")

    async def close(self) -> None:
        await self._clients.aclose()

    def _open(self, target: str, name: str | None, **more: Any) -> AsyncEncoderClient:
        """`name`: the host:port whose certificate the other end has, where the target does not say it."""
        if name is not None and self._options.uses_tls:
            more["options"] = [("grpc.ssl_target_name_override", name.rpartition(":")[0].strip("[]"))]
        client = AsyncEncoderClient(target, **self._keywords, **more)
        self._clients.push_async_callback(client.close)
        return client

    def _store_of(self, info: encoder_pb2.InfoResponse) -> Path | None:
        if self._options.store == "off" or self._options.may_be_several or not info.HasField("store"):
            return None
        directory = Path(info.store.directory if self._options.store == "auto" else self._options.store)
        try:
            return directory if directory.stat().st_uid == os.geteuid() else None
        except OSError:
            return None
