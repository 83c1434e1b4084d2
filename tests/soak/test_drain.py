"""SIGTERM: what was accepted is answered, what comes later is sent elsewhere, leased files stay until they are given back."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from load import QUICK, open_clients, outcome_of, picture_item, store_of, tally, wait_until
from safetensors.numpy import load_file
from servers import Server, StartServer, exit_code, start

from sidecar.client import AsyncEncoderClient, EncodeError, EncoderClient, ItemError

pytestmark = pytest.mark.soak

TIMES, WIDTH = 20, 24
# Far less than the 30 s after which a drain gives up: callers who do not go away do not hold it up.
PROMPT_S = 15.0
_CALL = re.compile(r"method=Encode .* code=(\w+) items=(\d+) answered=(\d+)")


async def load_until_it_ends(server: Server, answers: int) -> tuple[Counter[str], list[str]]:
    """Calls that go on after being refused, and SIGTERM once there are so many answers; also what items were refused by."""
    ended: Counter[str] = Counter()
    complaints: list[str] = []

    async def worker(client: AsyncEncoderClient, number: int) -> None:
        while server.process.poll() is None:
            outcome = await outcome_of(client, picture_item(number, 56 << number % 4))
            if isinstance(outcome, ItemError):
                complaints.append(f"{outcome.code}: {outcome.message}")
            ended.update(tally([outcome]))
            if ended["embedding"] == answers and ended["told"] == 0:
                ended["told"] += 1
                server.process.send_signal(signal.SIGTERM)
            number += WIDTH

    async with open_clients(server) as clients:
        await asyncio.gather(*(worker(clients[number % 4], number) for number in range(WIDTH)))
    del ended["told"]
    return ended, complaints


def drains_of(log: str) -> tuple[int, int]:
    """Items of calls that the server took, and how many of them it answered."""
    calls = [(int(items), int(answered)) for _, items, answered in _CALL.findall(log)]
    return sum(items for items, _ in calls), sum(answered for _, answered in calls)


def test_sigterm_in_the_middle_of_load_loses_nothing_20_times(toy_artifact: Path, tmp_path: Path) -> None:
    chance = random.Random(2)
    total: Counter[str] = Counter()
    slowest_s = 0.0
    for _ in range(TIMES):
        server = start(toy_artifact, tmp_path, *QUICK)
        begun = time.monotonic()
        try:
            ended, complaints = asyncio.run(load_until_it_ends(server, chance.randrange(1, 150)))
        finally:
            code = exit_code(server.process)
        log = server.log.read_text()
        accepted, answered = drains_of(log)
        assert code == 0, log
        # gRPC itself cancels calls that arrive while it stops listening; the server has not seen them.
        assert not complaints and set(ended) <= {"embedding", "UNAVAILABLE", "CANCELLED"}, (ended, complaints)
        assert accepted == answered == ended["embedding"], (accepted, answered, ended)
        assert not store_of(server).exists()
        slowest_s = max(slowest_s, time.monotonic() - begun)
        total += ended
    print(f"\n{TIMES} × SIGTERM under load: {dict(total)}, 0 lost; the slowest run took {slowest_s:.1f} s", end="")
    assert slowest_s < PROMPT_S


def test_a_leased_file_stays_after_sigterm_until_it_is_released(start_server: StartServer) -> None:
    server = start_server(*QUICK, "--embedding-dtype", "float32")
    store = store_of(server)
    with EncoderClient(server.address, store=store) as client:
        (held,) = client.encode([picture_item(1)], timeout_s=30, hold=True)
        assert not isinstance(held, ItemError) and held.path is not None
        server.process.send_signal(signal.SIGTERM)
        wait_until("draining", lambda: "draining for at most" in server.log.read_text())
        time.sleep(0.5)  # two at once count as one
        with pytest.raises(EncodeError, match="UNAVAILABLE.*shutting down"):
            client.encode([picture_item(2)], timeout_s=30)
        (again,) = client.fetch([held.key], timeout_s=30, hold=True)
        assert not isinstance(again, ItemError) and again.lease
        assert client.release([again.lease], timeout_s=30) == 1
        assert server.process.poll() is None
        assert (load_file(held.path)["ec_cache"] == held.data).all()
        assert client.release([held.lease], timeout_s=30) == 1
    assert exit_code(server.process) == 0
    assert not store.exists()
    assert held.data.any()  # who has mapped it keeps it


def test_a_second_sigterm_ends_it_at_once(start_server: StartServer) -> None:
    server = start_server(*QUICK)
    store = store_of(server)
    with EncoderClient(server.address, store=store) as client:
        client.encode([picture_item(1)], timeout_s=30, hold=True)  # its lease would keep the drain going for 30 s
        server.process.send_signal(signal.SIGTERM)
        wait_until("draining", lambda: "draining for at most" in server.log.read_text())
        time.sleep(0.5)  # two at once count as one
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert exit_code(server.process) == 1
    print(f"\na second SIGTERM ended it after {time.monotonic() - begun:.2f} s", end="")
    assert "told to stop a second time" in server.log.read_text()
    assert not store.exists()
