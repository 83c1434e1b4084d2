"""From an `Item` of the contract to the engine's `Order`: its name, and where and how it is opened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Protocol

from sidecar.engine.keys import name_of_bounded, name_of_content, name_of_key, name_of_keyed, name_to_fetch
from sidecar.engine.memory import Memory, Share
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

    async def fetch(self, url: str, timeout_s: float | None, room: Callable[[int], None]) -> bytes: ...


class Named:
    """An item, the key that the caller knows it by, and its names.

    Attributes:
        name: of its embedding in the store. A hash of content, bounds and key; without content, of the key alone.
        key_name: of its key, where it has a key and content: what the key stands for from now on when it comes alone.
    """

    __slots__ = ("_share", "item", "key", "key_name", "name")

    def __init__(self, item: encoder_pb2.Item, share: Share | None = None) -> None:
        """Hash the content: half a second for a GB. `share`: what the item holds of the memory beside its request.

        Raises:
            InvalidItem: if the key is too long.
        """
        self._share = share
        self.item = item
        self.key = item.key
        self.key_name = ""
        if not item.key:
            self.name = self.key = name_of_content(*_shapes(item))
            return
        if len(item.key) > MAX_KEY_BYTES or len(item.key.encode()) > MAX_KEY_BYTES:
            raise InvalidItem(f"the key has over {MAX_KEY_BYTES} bytes; send a hash instead")
        bounded = item.min_pixels or item.max_pixels
        if item.WhichOneof("content") is None:
            name = name_to_fetch(item.key)
            self.name = name_of_bounded(item.key, item.min_pixels, item.max_pixels) if bounded else name
            return
        name = name_of_key(item.key)
        self.key_name = name_of_bounded(item.key, item.min_pixels, item.max_pixels) if bounded else name
        self.name = name_of_keyed(self.key_name, *_shapes(item))


def _shapes(item: encoder_pb2.Item) -> tuple[bytes, bytes]:
    """All of an item that shapes its embedding: what describes the content, and the content's bytes."""
    kind = item.WhichOneof("content")
    head = encoder_pb2.Item(min_pixels=item.min_pixels, max_pixels=item.max_pixels)
    data = b""
    if kind == "image":
        data = item.image
    elif kind == "rgb_image":
        picture = item.rgb_image
        head.rgb_image.height, head.rgb_image.width = picture.height, picture.width
        data = picture.data
    elif kind == "rgb_video":
        video = item.rgb_video
        head.rgb_video.frames, head.rgb_video.height, head.rgb_video.width = video.frames, video.height, video.width
        data = video.data
    elif kind == "patches":
        patches = item.patches
        head.patches.grid.CopyFrom(patches.grid)
        head.patches.dtype, head.patches.scale = patches.dtype, patches.scale
        head.patches.single_slice = patches.single_slice
        data = patches.data
    return f"{kind} ".encode() + head.SerializeToString(deterministic=True), data


class Orders:
    """Places orders of one model."""

    def __init__(
        self,
        preprocessor: Preprocessor,
        opening: Executor,
        naming: Executor,
        fetcher: Fetcher | None,
        memory: Memory | None = None,
    ) -> None:
        """
        Args:
            opening: reads headers, on threads of its own, so that what is too large is refused while others are decoded.
            memory: counts what is fetched.
            naming: hashes contents, on threads of its own, so that what is stored is found while others are decoded.
        """
        self._preprocessor = preprocessor
        self._opening = opening
        self._naming = naming
        self._fetcher = fetcher
        self._memory = memory or Memory()

    async def named(self, item: encoder_pb2.Item) -> Named:
        """Find out an item's name.

        Raises:
            InvalidItem: if the key is too long, or the item is a URL and none are taken.
            UrlRefused, UrlUnreachable: if its URL could not be fetched.
        """
        share = None
        if item.HasField("url"):
            share = Share(self._memory)
            item = await self._fetched(item, share)  # what a URL leads to may change, so the name comes from what came
        if item.ByteSize() <= QUICK_BYTES:
            return Named(item, share)
        return await asyncio.get_running_loop().run_in_executor(self._naming, Named, item, share)

    def order(self, named: Named, caller: Caller) -> Order:
        return Order(
            name=named.name,
            client=caller.client,
            open=lambda: self._open(named.item),
            deadline=caller.deadline,
        )

    async def _open(self, item: encoder_pb2.Item) -> Opened:
        if item.HasField("image"):
            return await asyncio.get_running_loop().run_in_executor(self._opening, self._preprocessor.open, item)
        return self._preprocessor.open(item)

    async def _fetched(self, item: encoder_pb2.Item, share: Share) -> encoder_pb2.Item:
        if self._fetcher is None:
            raise InvalidItem("this server takes no URLs; send the picture's bytes (or start it with --url-input)")
        url = item.url
        # A data: URL may be as long as a message. Beside what comes of it there are, until then, its text and the picture twice.
        copies = Share(self._memory)
        copies.add(2 * len(url))
        data = await self._fetcher.fetch(url, None, share.add)
        return encoder_pb2.Item(key=item.key, image=data, min_pixels=item.min_pixels, max_pixels=item.max_pixels)
