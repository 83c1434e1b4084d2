"""Many calls at once, some given up: each is answered or refused in words, and afterwards nothing of them is left."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import numpy as np
import pytest
from load import (
    QUICK,
    REFUSALS,
    all_at_once,
    closed_loop,
    is_idle,
    memory_bytes,
    open_clients,
    open_files,
    outcome_of,
    picture_item,
    png,
    tally,
    threads,
    wait_until,
)
from servers import Server, StartServer

from sidecar.client import AsyncEncoderClient

pytestmark = pytest.mark.soak

SIDES = (56, 112, 224, 448)
REQUESTS, WIDTH = 10_000, 32
GRPC_THREADS = 8


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server(*QUICK, "--store-bytes", "4000000")


def test_200_requests_at_once_lose_none_three_times_in_a_row(server: Server) -> None:
    async def run() -> list[Counter[str]]:
        async with open_clients(server, 8) as clients:
            items = ([picture_item(1000 * run + i, SIDES[i % 4]) for i in range(200)] for run in range(3))
            return [tally(await all_at_once(clients, batch)) for batch in items]

    for ended in asyncio.run(run()):
        print(f"\n200 at once: {dict(ended)}", end="")
        assert ended.total() == 200 and set(ended) <= {"embedding", *REFUSALS}, ended
        assert ended["embedding"] > 0


def test_1000_requests_with_cancellations_and_deadlines_leave_nothing_behind(server: Server) -> None:
    chance = random.Random(1)

    async def one(client: AsyncEncoderClient, number: int) -> str:
        timeout_s = chance.choice((30.0, 30.0, chance.uniform(0.01, 2.0)))
        call = asyncio.create_task(outcome_of(client, picture_item(10_000 + number, SIDES[number % 4]), timeout_s))
        if chance.random() < 0.3:
            asyncio.get_running_loop().call_later(chance.uniform(0.0, 2.0), call.cancel)
        try:
            return next(iter(tally([await call])))
        except asyncio.CancelledError:
            return "cancelled by the caller"

    async def run(count: int) -> Counter[str]:
        async with open_clients(server, 8, stored=True) as clients:
            return Counter(await asyncio.gather(*(one(clients[number % 8], number) for number in range(count))))

    asyncio.run(run(100))  # from here on it has all the threads that it will have
    wait_until("idle", lambda: is_idle(server))
    before = threads(server), open_files(server)
    ended = asyncio.run(run(1000))
    wait_until("idle again", lambda: is_idle(server))
    wait_until("no more files than before", lambda: open_files(server) <= before[1])
    # gRPC's own pool grows with load and keeps what it has for minutes; a leak would grow with the thousand.
    wait_until("no more threads than before", lambda: threads(server) <= before[0] + GRPC_THREADS)
    print(f"\n1000 with cancellations and deadlines: {dict(ended)}; threads and files before {before}, ", end="")
    print(f"after {(threads(server), open_files(server))}", end="")
    assert ended.total() == 1000 and set(ended) <= {"embedding", "cancelled by the caller", *REFUSALS}, ended
    assert ended["embedding"] and ended["cancelled by the caller"] and ended["DEADLINE_EXCEEDED"]
    with server.client() as client:
        assert client.encode_image(png(7, 56), timeout_s=30).tokens


def test_memory_stays_flat_over_10000_requests(start_server: StartServer) -> None:
    server = start_server(*QUICK, "--store-bytes", "4000000")
    # Zipf over 4000 pictures, of which the store holds a few hundred: some are hits and most come back after an eviction.
    numbers = np.random.default_rng(0).zipf(1.2, REQUESTS) % 4000

    async def run(numbers: np.ndarray) -> Counter[str]:
        async with open_clients(server, 2) as inline, open_clients(server, 2, stored=True) as stored:
            items = (picture_item(100_000 + int(number), SIDES[number % 2]) for number in numbers)
            return await closed_loop([*inline, *stored], items, WIDTH)

    first = asyncio.run(run(numbers[:2000]))
    wait_until("idle", lambda: is_idle(server))
    before = memory_bytes(server)
    rest = asyncio.run(run(numbers[2000:]))
    wait_until("idle", lambda: is_idle(server))
    after = memory_bytes(server)
    print(f"\n{REQUESTS} requests: {dict(first + rest)}; resident MB own and shared: ", end="")
    print(f"after 2000 {_mb(before)}, after {REQUESTS} {_mb(after)}, grown by {after[0] / before[0] - 1:.1%}", end="")
    assert (first + rest) == {"embedding": REQUESTS}
    assert after[0] < 1.05 * before[0]
    assert after[1] <= max(1.05 * before[1], before[1] + (1 << 20))


def _mb(sizes: tuple[int, int]) -> str:
    return " + ".join(f"{size / 1e6:.1f}" for size in sizes)
