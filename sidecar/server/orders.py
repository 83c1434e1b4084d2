"""From an `Item` of the contract to the engine's `Order`: its name, and where and how it is opened."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from typing import Protocol

from sidecar.engine.keys import name_of_bounded, name_of_content, name_of_key
from sidecar.engine.order import Opened, Order
from sidecar.errors import InvalidItem
from sidecar.pb import encoder_pb2
from sidecar.server.callers import Caller
from sidecar.server.contents import Preprocessor

# The key comes back beside the embedding, in one message that must stay under gRPC's default limit of 4 MB.
MAX_KEY_BYTES = 1 << 16
# Hashing so much takes a tenth of a millisecond; more would hold up the event loop.
QUICK_BYTES = 1 << 17


class Fetcher(Protocol):
    """What `sidecar.urls.fetcher` provides."""

    async def fetch(self, url: str, timeout_s: float | None) -> bytes: ...


class Named:
    """An item, the key that the caller knows it by, and its name in the store."""

    __slots__ = ("item", "key", "name")

    def __init__(self, item: encoder_pb2.Item) -> None:
        """Raises:
        InvalidItem: if the key is too long.
        """
        self.item = item
        if item.key:
            if len(item.key) > MAX_KEY_BYTES or len(item.key.encode()) > MAX_KEY_BYTES:
                raise InvalidItem(f"the key has over {MAX_KEY_BYTES} bytes; send a hash instead")
            self.key = item.key
            if item.min_pixels or item.max_pixels:
                self.name = name_of_bounded(item.key, item.min_pixels, item.max_pixels)
            else:
                self.name = name_of_key(item.key)
        else:
            self.name = self.key = name_of_content(item.SerializeToString(deterministic=True))


class Orders:
    """Places orders of one model."""

    def __init__(self, preprocessor: Preprocessor, opening: Executor, fetcher: Fetcher | None) -> None:
        """`opening`: reads headers, on threads of its own, so that what is too large is refused while others are decoded."""
        self._preprocessor = preprocessor
        self._opening = opening
        self._fetcher = fetcher

    async def named(self, item: encoder_pb2.Item) -> Named:
        """Find out an item's name.

        Raises:
            InvalidItem: if the key is too long, or the item is a URL and none are taken.
            UrlRefused, UrlUnreachable: if its URL could not be fetched.
        """
        if item.HasField("url") and not item.key:
            item = await self._fetched(item)  # what a URL leads to may change, so the name comes from what came
        if item.key or item.ByteSize() <= QUICK_BYTES:
            return Named(item)
        return await asyncio.get_running_loop().run_in_executor(self._opening, Named, item)

    def order(self, named: Named, caller: Caller) -> Order:
        return Order(
            name=named.name,
            client=caller.client,
            open=lambda: self._open(named.item),
            deadline=caller.deadline,
            content=named.item,
        )

    async def _open(self, item: encoder_pb2.Item) -> Opened:
        if item.HasField("url"):
            item = await self._fetched(item)
        if item.HasField("image"):
            return await asyncio.get_running_loop().run_in_executor(self._opening, self._preprocessor.open, item)
        return self._preprocessor.open(item)

    async def _fetched(self, item: encoder_pb2.Item) -> encoder_pb2.Item:
        if self._fetcher is None:
            raise InvalidItem("this server takes no URLs; send the picture's bytes (or start it with --url-input)")
        data = await self._fetcher.fetch(item.url, None)
        return encoder_pb2.Item(key=item.key, image=data, min_pixels=item.min_pixels, max_pixels=item.max_pixels)
