"""The sidecars, and what may be asked of which.

Where there may be several, items are dealt out by a fleet. What stays in a sidecar's store (a file, its lease) can only be asked
for again at that same sidecar: so files are linked only where there is one, and a key is looked for at each in turn.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from sidecar.client import AsyncEncoderClient, ClientError, Embedding, EncodeError, Item, ItemError
from sidecar.credentials import client_credentials, read_token
from sidecar.fleet import Fleet
from sidecar.integrations.vllm.options import Options
from sidecar.pb import encoder_pb2

logger = logging.getLogger("vllm." + __name__)


class GivenUpError(Exception):
    """Several sidecars were asked, by all the rules there are."""


class Sidecars:
    """To be made and used on one event loop.

    Attributes:
        fleet: of several; None where there is one.
    """

    def __init__(self, options: Options, max_embedding_bytes: int, refused: Callable[[str], None]) -> None:
        """`refused`: told of each ask of a fleet that gave no embedding, as `Fleet` tells it.

        Raises:
            CredentialsError: if a file of TLS or of the token cannot be read.
        """
        self._options = options
        keywords: dict[str, Any] = {"max_embedding_bytes": max_embedding_bytes}
        if options.token_file is not None:
            keywords["token"] = read_token(options.token_file)
        if options.uses_tls:
            keywords["credentials"] = client_credentials(options.tls_ca, options.tls_cert, options.tls_key)
        self._keywords = keywords
        self._clients = AsyncExitStack()
        self._single: dict[str, AsyncEncoderClient] = {}
        self.fleet: Fleet | None = None
        if options.may_be_several:
            self.fleet = Fleet(options.addresses, **keywords, refused=refused)
            self._clients.push_async_callback(self.fleet.close)
        self._linking: AsyncEncoderClient | None = None
        self._store: Path | None = None

    async def info(self, timeout_s: float) -> encoder_pb2.InfoResponse:
        """What a sidecar says of itself; of several, the first that answers.

        Raises:
            ClientError: if none does.
        """
        if self.fleet is None:
            return await self._at(self._options.addresses[0]).info(timeout_s)
        infos = list((await self.fleet.infos(timeout_s)).values())
        answered = [info for info in infos if not isinstance(info, ClientError)]
        if not answered:
            raise next(info for info in infos if isinstance(info, ClientError))
        return answered[0]

    async def each(self) -> list[AsyncEncoderClient]:
        """One client for each sidecar that there is now.

        Raises:
            EncodeError: if a name cannot be looked up.
        """
        if self.fleet is None:
            return [self._linking or self._at(self._options.addresses[0])]
        return [self._at(address) for address in await self.fleet.addresses(self._options.item_s)]

    async def encode(
        self, item: Item, timeout_s: float, check: Callable[[Embedding], None]
    ) -> tuple[Embedding, AsyncEncoderClient | None]:
        """Also returns who has the lease, where the embedding is a file of the store. `check` raises a ClientError for one that
        will not do, so that another sidecar of several is asked.

        Raises:
            GivenUpError: if no other ask would help: a fleet asks again by itself, and at others.
            ClientError: if there is no embedding.
        """
        if self.fleet is not None:
            try:
                patience_s = self._options.patience_s
                return await self.fleet.encode(item, timeout_s, unreachable_s=patience_s, check=check), None
            except ClientError as error:
                raise GivenUpError(str(error)) from error
        (client,) = await self.each()
        return _only(await client.encode([item], timeout_s, hold=True)), client

    async def fetch(self, key: str, timeout_s: float) -> tuple[Embedding, AsyncEncoderClient]:
        """What one of them has under a key, and who has its lease.

        Raises:
            ClientError: if none has.
        """
        clients = await self.each()
        failure: EncodeError | None = None
        for client in clients:
            try:
                return _only(await client.fetch([key], timeout_s / len(clients), hold=True)), client
            except EncodeError as error:
                # One that cannot be reached may be the one that has it.
                if failure is None or failure.code == "NOT_FOUND":
                    failure = error
        assert failure is not None
        raise failure

    def learn_store(self, info: encoder_pb2.InfoResponse) -> None:
        """Link files from now on, if the sidecar's store is a directory of this user on this host."""
        store = self._store_of(info)
        if store == self._store:
            return
        self._store, self._linking = store, None
        if store is not None:
            self._linking = self._open(self._options.addresses[0], store=store)
        logger.info("embeddings are %s", f"linked from the sidecar's store {store}" if store else "sent by the sidecar")

    async def close(self) -> None:
        await self._clients.aclose()

    def _at(self, address: str) -> AsyncEncoderClient:
        if address not in self._single:
            self._single[address] = self._open(address)
        return self._single[address]

    def _open(self, address: str, **more: Any) -> AsyncEncoderClient:
        # A fleet's addresses are numbers, and a certificate is for a name.
        if self.fleet is not None and self.fleet.host is not None and self._options.uses_tls:
            more["options"] = [("grpc.ssl_target_name_override", self.fleet.host)]
        client = AsyncEncoderClient(address, **self._keywords, **more)
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


def _only(results: list[Embedding | ItemError]) -> Embedding:
    (result,) = results
    if isinstance(result, ItemError):
        raise result.as_exception()
    return result
