"""kill -9: whoever reads the store never sees a half-written file, and the next server on it sweeps and serves."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from load import EXACT, QUICK, open_clients, outcome_of, picture_item
from safetensors.numpy import load_file
from servers import Server, StartServer, start

from sidecar.client import AsyncEncoderClient, Embedding, Item
from sidecar.store_file import FILE_NAME
from sidecar.vision.dtypes import Array

pytestmark = pytest.mark.soak

TIMES, WIDTH, KEYS = 20, 16, 48


def item_of(number: int) -> Item:
    return picture_item(number, 56 << number % 4, key=f"photo-{number}")


class Reader(threading.Thread):
    """Polls a store as stock vLLM does: does the file exist? then load it. `seen` and `wrong` count what it found."""

    def __init__(self, store: Path, right: Mapping[str, Array]) -> None:
        super().__init__()
        self.seen = 0
        self.wrong: list[str] = []
        self._store, self._right = store, right
        self._enough = threading.Event()

    def run(self) -> None:
        while not self._enough.is_set():
            for name, rows in self._right.items():
                path = self._store / name / FILE_NAME
                if path.exists():
                    self._look(path, rows)

    def stop(self) -> None:
        self._enough.set()
        self.join()

    def _look(self, path: Path, rows: Array) -> None:
        try:
            found = load_file(path)["ec_cache"]
        except FileNotFoundError:
            return  # evicted in between
        except Exception as error:
            self.wrong.append(f"{path.parent.name}: {error!r}")
            return
        self.seen += 1
        if found.shape != rows.shape or not np.allclose(found, rows, atol=1e-2):
            self.wrong.append(f"{path.parent.name}: not its rows")


async def load_until_killed(server: Server, answers: int) -> int:
    """Kill it once there are so many answers; returns how many there were in the end."""
    answered = 0

    async def worker(client: AsyncEncoderClient, chance: random.Random) -> None:
        nonlocal answered
        while isinstance(await outcome_of(client, item_of(chance.randrange(KEYS))), Embedding):
            answered += 1
            if answered >= answers:
                server.process.kill()

    async with open_clients(server, stored=True) as clients:
        await asyncio.gather(*(worker(clients[seed % 4], random.Random(seed)) for seed in range(WIDTH)))
    return answered


def test_killed_20_times_it_serves_again_and_no_reader_sees_half_a_file(
    start_server: StartServer, toy_artifact: Path, tmp_path: Path
) -> None:
    flags = (*QUICK, *EXACT)
    with start_server(*flags).client() as client:
        results = client.encode([item_of(number) for number in range(KEYS)], timeout_s=120)
    right = {result.key: result.data for result in results if isinstance(result, Embedding)}
    assert len(right) == KEYS

    # Room for about a quarter of them, so that entries come and go.
    first = start(toy_artifact, tmp_path, *flags)
    store = next(Path(word) for word in first.log.read_text().split() if word.startswith("/dev/shm/"))
    assert first.terminate() == 0
    reader = Reader(store, right)
    reader.start()
    chance = random.Random(3)
    answers = left = 0
    try:
        for _ in range(TIMES):
            server = start(toy_artifact, tmp_path, *flags, "--store", str(store), "--store-bytes", "1500000")
            try:
                assert {child.name for child in store.iterdir()} == {".lock"}, "the sweep left something"
                answers += asyncio.run(load_until_killed(server, chance.randrange(1, 200)))
            finally:
                server.process.kill()
                server.process.wait()
            left += len(list(store.iterdir())) - 1
        last = start(toy_artifact, tmp_path, *flags, "--store", str(store))
        with last.client() as client:
            (result,) = client.encode([item_of(0)], timeout_s=60)
            assert isinstance(result, Embedding) and not result.cached
        assert last.terminate() == 0
    finally:
        reader.stop()
    print(f"\n{TIMES} × kill -9 under load: {answers} answers, {left} entries left and swept; ", end="")
    print(f"{reader.seen} files read meanwhile, {len(reader.wrong)} of them wrong", end="")
    assert not reader.wrong, reader.wrong[:3]
    assert reader.seen and left
    assert not store.exists()
