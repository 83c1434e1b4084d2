"""What an item is called: by its content wherever it has any, whatever its key."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from google.protobuf.message import Message

from sidecar.engine.memory import Memory
from sidecar.pb import encoder_pb2 as pb
from sidecar.server.contents import Preprocessor
from sidecar.server.orders import QUICK_BYTES, Named, Orders

URL = "https://pictures.example/cat.png"


class Web:
    """What a URL leads to changes from one fetch to the next."""

    def __init__(self, *contents: bytes) -> None:
        self._contents = iter(contents)

    async def fetch(self, url: str, timeout_s: float | None, room: Callable[[int], None]) -> bytes:
        assert url == URL
        return next(self._contents)


def names(item: pb.Item, *contents: bytes) -> list[str]:
    """Of the same URL, fetched once for each content."""

    async def ask() -> list[str]:
        with ThreadPoolExecutor(1) as threads:
            orders = Orders(cast(Preprocessor, None), threads, threads, Web(*contents))
            return [(await orders.named(item)).name for _ in contents]

    return asyncio.run(ask())


@pytest.mark.parametrize("key", ["", "key"])
def test_a_url_is_known_by_what_it_leads_to_now(key: str) -> None:
    first, second, again = names(pb.Item(key=key, url=URL), b"one", b"another", b"one")
    assert first == again != second
    assert first == Named(pb.Item(key=key, image=b"one")).name


def test_the_copies_of_a_long_url_are_counted_while_it_is_fetched_and_no_longer() -> None:
    memory = Memory(1 << 30)
    held: list[int] = []

    class Data:
        async def fetch(self, url: str, timeout_s: float | None, room: Callable[[int], None]) -> bytes:
            held.append(memory.held)
            return b"picture"

    async def ask() -> None:
        with ThreadPoolExecutor(1) as threads:
            orders = Orders(cast(Preprocessor, None), threads, threads, Data(), memory)
            await orders.named(pb.Item(url="data:" + "A" * 1_000_000))

    asyncio.run(ask())
    assert held[0] >= 2_000_000
    assert memory.held == 0


def test_what_is_large_is_hashed_elsewhere_than_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed_on: list[threading.Thread] = []
    monkeypatch.setattr(
        "sidecar.server.orders.name_of_keyed", lambda *parts: hashed_on.append(threading.current_thread()) or "name"
    )
    names(pb.Item(key="key", url=URL), b"x" * QUICK_BYTES, b"small")
    assert [thread is threading.main_thread() for thread in hashed_on] == [False, True]


def test_every_field_that_shapes_an_embedding_is_part_of_its_name() -> None:
    """Also one that is added to the contract later: this walks through its fields."""
    seen: dict[str, str] = {}
    for content in (
        {"image": b"0"},
        {"rgb_image": pb.RgbImage(height=1, width=1, data=b"0")},
        {"rgb_video": pb.RgbVideo(frames=1, height=1, width=1, data=b"0")},
        {"patches": pb.Patches(grid=pb.Grid(t=1, h=1, w=1), dtype=pb.FLOAT32, data=b"0", scale=pb.Patches.PIXELS)},
    ):
        item = pb.Item(key="key", **cast(Any, content))
        for where, changed in changes(item):
            name = Named(changed).name
            assert name not in seen, f"{where} of {seen.get(name)}"
            seen[name] = f"{where} of {next(iter(content))}"
    assert len(seen) >= 31


def changes(item: pb.Item) -> list[tuple[str, pb.Item]]:
    """The item, and one for each field of it and of its content, with that field changed."""
    found = [("nothing", item)]
    for path in fields(item):
        if path[0] in ("image", "url") and path[0] != item.WhichOneof("content"):
            continue
        changed = pb.Item()
        changed.CopyFrom(item)
        holder: Any = changed
        for name in path[:-1]:
            holder = getattr(holder, name)
        value = getattr(holder, path[-1])
        setattr(
            holder, path[-1], b"1" if isinstance(value, bytes) else "other" if isinstance(value, str) else value + 1
        )
        found.append((".".join(path), changed))
    return found


def fields(message: Message, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all fields; of a oneof's, those of the one that is set."""
    paths = []
    for field in message.DESCRIPTOR.fields:
        if field.message_type is None:
            paths.append((*above, field.name))
        elif field.containing_oneof is None or message.HasField(field.name):
            paths += fields(getattr(message, field.name), (*above, field.name))
    return paths
