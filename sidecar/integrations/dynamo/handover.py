"""How an embedding gets to the prefill worker: a file on the same host, or NIXL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sidecar.integrations.dynamo.local_files import LocalFiles
from sidecar.integrations.dynamo.protocol import Transfer
from sidecar.replies import Embedding

MODES = ("local", "nixl-write", "nixl-read")


class HandOver(Protocol):
    """One way."""

    async def offer(self, embeddings: Sequence[Embedding]) -> list[Transfer]:
        """Make those of one request ready for prefill to take: all or none. May wait for room.

        Raises:
            OSError: if that cannot be done.
        """

    async def close(self, wait_s: float) -> None:
        """End, once what was offered has been taken or so much time is over."""


class LocalHandOver:
    """Mode `local`."""

    def __init__(self, files: LocalFiles) -> None:
        self._files = files

    async def offer(self, embeddings: Sequence[Embedding]) -> list[Transfer]:
        paths = await self._files.add([(embedding.data, embedding.dtype) for embedding in embeddings])
        return [Transfer.of(embedding, str(path)) for embedding, path in zip(embeddings, paths, strict=True)]

    async def close(self, wait_s: float) -> None:
        await self._files.close(wait_s)
