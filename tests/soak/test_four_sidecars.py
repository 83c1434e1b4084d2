"""Four sidecars of unequal speed behind one client: shares follow what each can do, and losing or adding one loses no request."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from load import percentile, picture_item
from slow_sidecar import SlowSidecar, start

from sidecar.client import ClientError
from sidecar.fleet import Fleet

pytestmark = pytest.mark.soak

# Milliseconds of a run of one picture of 224×224, 256 patches: rates as 8 : 4 : 2 : 1. A tenth of it is fixed.
RUN_MS = (20.0, 40.0, 80.0, 160.0)
SIDE, PATCHES = 224, 256
TIMEOUT_S = 60.0
SETTLED_S = 10.0

_numbers = count()
StartSlow = Callable[..., SlowSidecar]


@pytest.fixture
def start_slow(toy_artifact: Path, tmp_path: Path) -> Iterator[StartSlow]:
    """start_slow(run_ms, listen=…): as long for one picture; what still runs at the end is ended."""
    started: list[SlowSidecar] = []

    def begin(run_ms: float, listen: str = "127.0.0.1:0") -> SlowSidecar:
        directory = tmp_path / str(len(started))
        started.append(start(toy_artifact, directory, 0.1 * run_ms, 0.9 * run_ms / PATCHES, listen=listen))
        return started[-1]

    yield begin
    for sidecar in started:
        sidecar.end()


class Load:
    """Pictures through a fleet. `answered` are (when sent, seconds it took, the lane's device); `failed` counts the others."""

    def __init__(self, fleet: Fleet, timeout_s: float = TIMEOUT_S) -> None:
        self.fleet = fleet
        self.timeout_s = timeout_s
        self.answered: list[tuple[float, float, str]] = []
        self.failed: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    async def one(self) -> None:
        begun = time.monotonic()
        try:
            embedding = await self.fleet.encode(picture_item(next(_numbers), SIDE), self.timeout_s)
        except ClientError as error:
            self.failed[str(error)] += 1
            return
        assert embedding.tokens == PATCHES // 4
        self.answered.append((begun, time.monotonic() - begun, embedding.lane.device))

    async def arrive(self, rate: float, seconds: float, chance: random.Random) -> None:
        """Poisson arrivals, whatever becomes of those before. Returns when all have ended."""
        now = time.monotonic()
        ends = now + seconds
        while (now := now + chance.expovariate(rate)) < ends:
            await asyncio.sleep(max(0.0, now - time.monotonic()))
            task = asyncio.create_task(self.one())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.gather(*self._tasks)

    async def keep(self, width: int, seconds: float) -> None:
        """So many at a time. Returns when all have ended."""
        ends = time.monotonic() + seconds

        async def worker() -> None:
            while time.monotonic() < ends:
                await self.one()

        await asyncio.gather(*(worker() for _ in range(width)))

    def counts(self, since: float) -> Counter[str]:
        """Device → items sent since then."""
        return Counter(device for begun, _, device in self.answered if begun >= since)

    def line(self, what: str, since: float) -> str:
        took = [took for begun, took, _ in self.answered if begun >= since]
        quantiles = f"p50 {percentile(took, 0.5) * 1e3:.0f} ms, p95 {percentile(took, 0.95) * 1e3:.0f} ms"
        return f"{what}: {len(took)} answered, {quantiles}, {self.failed.total()} failed {dict(self.failed) or ''}"


async def rate_of(sidecar: SlowSidecar, seconds: float = 5.0) -> float:
    """Pictures a second that it does alone, by measure."""
    async with Fleet([sidecar.wait_ready()]) as fleet:
        load = Load(fleet)
        await load.keep(8, 1.0)
        load.answered.clear()
        begun = time.monotonic()
        await load.keep(8, seconds)
        return len(load.answered) / (time.monotonic() - begun)


def check_shares(what: str, rates: dict[str, float], counts: Counter[str]) -> None:
    """Print shares beside those that the rates would give, and hold them to a tenth of these."""
    ratios = {device: counts[device] / counts.total() / (rates[device] / sum(rates.values())) for device in rates}
    shares = ", ".join(f"{counts[device] / counts.total():.3f}" for device in rates)
    print(
        f"\n{what}: shares {shares}; over the measured rates' {', '.join(f'{each:.3f}' for each in ratios.values())}",
        end="",
    )
    assert all(0.9 <= each <= 1.1 for each in ratios.values()), ratios


def test_shares_follow_the_measured_rates(start_slow: StartSlow) -> None:
    sidecars = [start_slow(run_ms) for run_ms in RUN_MS]

    async def run() -> None:
        rates = {sidecar.device: await rate_of(sidecar) for sidecar in sidecars}
        total = sum(rates.values())
        print(f"\nrates alone: {', '.join(f'{rate:.1f}' for rate in rates.values())} pictures/s", end="")
        async with Fleet([sidecar.address for sidecar in sidecars]) as fleet:
            load, settled = Load(fleet), time.monotonic() + SETTLED_S
            await load.arrive(0.7 * total, 30, random.Random(1))
            check_shares("at 70 %", rates, load.counts(settled))
            print(f"\n{load.line('at 70 %', settled)}", end="")
        assert not load.failed
        async with Fleet([sidecar.address for sidecar in sidecars]) as fleet:
            load, settled = Load(fleet), time.monotonic() + SETTLED_S
            await load.keep(64, 30)
            check_shares("saturated", rates, load.counts(settled))
            done = sum(settled < begun + took < settled + 20 for begun, took, _ in load.answered) / 20
            print(f"\n{load.line('saturated', settled)}, {done:.1f} of {total:.1f} pictures/s", end="")
        assert not load.failed

    asyncio.run(run())


def test_one_killed_and_one_added_under_load_lose_nothing(
    start_slow: StartSlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind one name, as a headless service has it: every sidecar an address of its own, and the same port."""
    resolve, hosts = socket.getaddrinfo, ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"]

    def resolved(host: str, port: int, *rest: Any, **options: Any) -> list[Any]:
        if host != "encoders.test":
            return list(resolve(host, port, *rest, **options))
        return [entry for each in hosts for entry in resolve(each, port, *rest, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    first = start_slow(RUN_MS[0])
    port = first.address.rpartition(":")[2]
    sidecars = [first, *(start_slow(ms, f"{host}:{port}") for ms, host in zip(RUN_MS[1:], hosts[1:], strict=True))]
    for sidecar in sidecars:
        sidecar.wait_ready()

    async def run() -> None:
        async with Fleet([f"dns:///encoders.test:{port}"]) as fleet:
            load, begun = Load(fleet), time.monotonic()
            # 70 % of all four: more than is left when the fastest has gone.
            arriving = asyncio.create_task(load.arrive(65.0, 60, random.Random(2)))
            await asyncio.sleep(10)
            sidecars[0].end()
            killed = time.monotonic()
            hosts.remove("127.0.0.1")
            await asyncio.sleep(5)
            added = start_slow(RUN_MS[0] * 1.01, f"127.0.0.5:{port}")
            await asyncio.to_thread(added.wait_ready)
            hosts.append("127.0.0.5")
            named = time.monotonic()
            await arriving
        theirs = [at for at, _, device in load.answered if device == added.device]
        print(f"\nkilled after {killed - begun:.0f} s, another under the name after {named - begun:.0f} s: ", end="")
        print(f"its first work {min(theirs) - named:.1f} s later, {len(theirs)} items in all; ", end="")
        print(load.line("in all", begun), end="")
        assert not load.failed and theirs

    asyncio.run(run())


def test_one_that_freezes_under_load_loses_nothing_and_works_again_when_it_thaws(start_slow: StartSlow) -> None:
    """SIGSTOP: its connections stand, its health was good when last heard of, and it says nothing."""
    sidecars = [start_slow(RUN_MS[0] * (1 + number / 100)) for number in range(4)]
    frozen = sidecars[0]

    async def run() -> None:
        async with Fleet([sidecar.address for sidecar in sidecars]) as fleet:
            load, begun = Load(fleet, timeout_s=20.0), time.monotonic()
            arriving = asyncio.create_task(load.arrive(60.0, 45, random.Random(3)))
            await asyncio.sleep(5)
            frozen.process.send_signal(signal.SIGSTOP)
            froze = time.monotonic()
            await asyncio.sleep(25)
            frozen.process.send_signal(signal.SIGCONT)
            thawed = time.monotonic()
            await arriving
        late = [at - froze for at, took, _ in load.answered if froze < at < thawed and took > 1]
        again = [at - thawed for at, _, device in load.answered if device == frozen.device and at > thawed]
        print(f"\nfrozen for 25 s: no calls after {max(late, default=0):.1f} s; ", end="")
        print(f"first work {min(again, default=0):.1f} s after it thawed; {load.line('in all', begun)}", end="")
        assert not load.failed and again

    asyncio.run(run())
