"""What a caller who does not read its answers holds of the budget that all callers share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import pytest
from stores import LANE, description

from sidecar.engine.keys import name_to_fetch
from sidecar.engine.memory import Memory
from sidecar.engine.scheduler import Encoded
from sidecar.engine.store import Store, loose_draft
from sidecar.engine.store_directory import StoreDirectory
from sidecar.monitoring.metrics import Metrics
from sidecar.monitoring.tracing import Tracing
from sidecar.pb import encoder_pb2 as pb
from sidecar.server.calls import Calls
from sidecar.server.service import EncoderService
from sidecar.server.wire import CHUNK_BYTES
from sidecar.settings import Settings
from sidecar.vision.dtypes import Array, DType

# Two chunks and a bit.
LARGE = description(2048, 550, dtype=DType.BFLOAT16)
KEYS = ("big", "other")
# A request of keys alone, and the parts' own small buffers.
SMALL_BYTES = 16_384


class Context:
    """A call's, of a caller on this host."""

    def set_trailing_metadata(self, metadata: object) -> None: ...

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def time_remaining(self) -> None: ...

    def auth_context(self) -> dict[str, Any]:
        return {}

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


class Served:
    """A service whose store holds `KEYS`; an item that is not in the store is encoded into ordinary memory."""

    def __init__(self, directory: Path) -> None:
        self.store = Store(StoreDirectory(directory), 1 << 30, 10.0, "model")
        self.memory = Memory(1 << 30)
        self.encoded = 0
        # As the scheduler has it: equal items that wait share their rows, which nothing keeps afterwards.
        self.rows: WeakValueDictionary[str, Array] = WeakValueDictionary()
        for key in KEYS:
            draft = self.store.write(name_to_fetch(key), LARGE)
            draft.rows[:] = 0
            assert draft.publish(LANE)
        model: Any = SimpleNamespace(scheduler=self, orders=self, lanes=(), fingerprint="model")
        self.lanes = ()
        self.service = EncoderService(
            model,
            Settings(artifact=directory),
            Calls(Metrics(), Tracing.from_environment(), self.memory),
        )

    def known(self, name: str) -> Encoded | None:
        entry = self.store.find(name, "model")
        return Encoded(description=LARGE, lane=LANE, entry=entry, rows=None, cached=True) if entry else None

    async def named(self, item: pb.Item) -> Any:
        return SimpleNamespace(key=item.key, name=name_to_fetch(item.key), key_name="")

    def order(self, named: Any, caller: object) -> Any:
        return named

    async def encode(self, order: Any, *, past_store: bool) -> Encoded:
        self.encoded += 1
        rows = self.rows.get(order.name)
        if rows is None:
            rows = self.rows[order.name] = loose_draft(LARGE).rows
        return Encoded(description=LARGE, lane=LANE, entry=None, rows=rows)

    def ask(self, *keys: str) -> AsyncIterator[bytes]:
        request = pb.EncodeRequest(items=[pb.Item(key=key) for key in keys])
        context: Any = Context()
        return self.service.Encode(request.SerializeToString(), context)


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path / "store")


def test_a_caller_who_does_not_read_holds_one_chunk_and_not_all_that_it_asked_for(served: Served) -> None:
    async def run() -> None:
        for parts in (1, 2, 5):
            answers = served.ask(*["big"] * 256)
            for _ in range(parts):
                await anext(answers)
            assert served.memory.held <= CHUNK_BYTES + SMALL_BYTES
            await answers.aclose()  # type: ignore[attr-defined]
            assert served.memory.held == 0

    asyncio.run(run())


def test_an_embedding_in_ordinary_memory_is_given_back_once_its_last_part_is_sent(served: Served) -> None:
    async def run() -> list[int]:
        answers = served.ask("new", "newer")
        held = []
        async for _ in answers:
            held.append(served.memory.held)
        return held

    held = asyncio.run(run())
    assert held[1] > 2 * LARGE.nbytes  # both are in memory while the first is sent
    assert LARGE.nbytes < held[-1] < 2 * LARGE.nbytes
    assert served.memory.held == 0


def test_equal_items_share_their_rows_which_count_once_and_are_freed_when_sent(served: Served) -> None:
    async def run() -> tuple[int, int]:
        answers = served.ask(*["new"] * 256)
        await anext(answers)
        await anext(answers)
        held = served.memory.held
        async for part in answers:
            assert not pb.EncodeResponse.FromString(part).HasField("error")
        return held, len(served.rows)

    held, left = asyncio.run(run())
    assert held <= LARGE.nbytes + CHUNK_BYTES + SMALL_BYTES
    assert (served.memory.held, left) == (0, 0)


def test_what_was_sent_is_freed_while_the_rest_is_not_read(served: Served) -> None:
    async def run() -> set[str]:
        answers = served.ask("new", "newer", "newest")
        announced = 0
        while announced < 2:
            announced += pb.EncodeResponse.FromString(await anext(answers)).HasField("embedding")
        return set(served.rows)

    assert len(asyncio.run(run())) == 2


def test_what_is_evicted_before_its_turn_to_be_sent_is_encoded(served: Served) -> None:
    async def run() -> list[pb.EncodeResponse]:
        answers = served.ask("big", "other")
        parts = [await anext(answers)]
        served.store.turn_over("another model")
        parts += [part async for part in answers]
        return [pb.EncodeResponse.FromString(part) for part in parts]

    responses = asyncio.run(run())
    assert served.encoded == 1
    sizes = {index: sum(len(part.chunk.data) for part in responses if part.index == index) for index in (0, 1)}
    assert sizes == {0: LARGE.nbytes, 1: LARGE.nbytes}
