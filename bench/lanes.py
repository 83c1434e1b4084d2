"""`python -m bench.lanes --artifact DIR --device cuda:0 --device cpu`: two unequal lanes under one scheduler, and each alone.

The engine itself in this process, without gRPC or pictures, so that what is measured is which lane an item goes to. Throughput
with a full queue; then latency at a load that the fast lane bears alone, without and with the slow one, in turn; then the fast
lane dies under load.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sidecar.artifact import open_artifact
from sidecar.engine.lane import Lane
from sidecar.engine.order import Opened, Order, Prepared
from sidecar.engine.scheduler import Limits, Scheduler
from sidecar.errors import EncoderError
from sidecar.runtimes.base import Runtime, RuntimeFault
from sidecar.server.loading import choose_variant, load_lanes
from sidecar.settings import Settings
from sidecar.vision.dtypes import Array
from sidecar.vision.grid import Grid
from sidecar.vision.pixels import Patches
from sidecar.vision.spec import TowerSpec

_LIMITS = Limits(items=100_000, patches=1 << 40)
_names = itertools.count()


class Mortal(Runtime):
    """A runtime that can be made to fail from one moment on."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.name, self.device, self.precision = runtime.name, runtime.device, runtime.precision
        self.output_dtype, self.streams, self.pipelined = runtime.output_dtype, runtime.streams, runtime.pipelined
        self.dead = False

    def run(self, patches: Array, grids: Sequence[Grid], out: Array) -> None:
        if self.dead:
            raise RuntimeFault("killed")
        self._runtime.run(patches, grids, out)
        if self.dead:  # in the middle of this run
            raise RuntimeFault("killed")


@dataclass(slots=True)
class Outcome:
    """What came of a phase: latencies in ms, items by lane, and failures."""

    latencies_ms: list[float] = field(default_factory=list)
    lanes: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    per_second: float = 0.0

    @property
    def p95_ms(self) -> float:
        return float(np.percentile(self.latencies_ms, 95))


class Bench:
    """Orders of one size of item for schedulers over lanes that outlive them."""

    def __init__(self, tower: TowerSpec, grid: Grid) -> None:
        self._tower = tower
        values = np.random.default_rng(0).integers(0, 256, (grid.patches, tower.patch_width), dtype=np.uint8)
        self._item = Patches(values, grid)
        self._threads = ThreadPoolExecutor(2)

    def scheduler(self, lanes: Sequence[Lane]) -> Scheduler:
        return Scheduler(
            lanes, self._tower, "bench", store=None, preprocessing=self._threads, preprocess_threads=2, limits=_LIMITS
        )

    async def saturate(self, lanes: Sequence[Lane], seconds: float, concurrency: int) -> Outcome:
        """As many at a time as `concurrency`; the first fifth of the time is not counted."""
        scheduler, outcome = self.scheduler(lanes), Outcome()
        begin = time.monotonic() + seconds / 5
        end = time.monotonic() + seconds
        done = 0

        async def caller() -> None:
            nonlocal done
            while time.monotonic() < end:
                await self._ask(scheduler, outcome)
                done += begin <= time.monotonic() < end

        callers = [asyncio.create_task(caller()) for _ in range(concurrency)]
        await asyncio.wait(callers, timeout=seconds)
        for one in callers:
            one.cancel()
        await asyncio.wait(callers)
        outcome.per_second = done / (end - begin)
        return outcome

    async def arrive(
        self, lanes: Sequence[Lane], seconds: float, per_second: float, kill: Mortal | None = None
    ) -> Outcome:
        """Poisson arrivals; `kill` dies halfway."""
        scheduler, outcome = self.scheduler(lanes), Outcome()
        started, asked = time.monotonic(), []
        async for moment in _poisson(random.Random(1), per_second, seconds):
            if kill is not None and moment - started > seconds / 2:
                kill.dead = True
            asked.append(asyncio.create_task(self._ask(scheduler, outcome)))
        await asyncio.gather(*asked)
        outcome.per_second = len(asked) / seconds
        return outcome

    async def _ask(self, scheduler: Scheduler, outcome: Outcome) -> None:
        async def opened() -> Opened:
            return Opened(self._item.grid, lambda: Prepared(self._item, 0.0, 0.0))

        started = time.monotonic()
        try:
            encoded = await scheduler.encode(Order(name=f"item-{next(_names)}", client="bench", open=opened))
        except EncoderError as error:
            outcome.failures[type(error).__name__] += 1
        else:
            outcome.latencies_ms.append((time.monotonic() - started) * 1e3)
            outcome.lanes[encoded.lane.name] += 1


async def _poisson(chance: random.Random, per_second: float, seconds: float) -> AsyncIterator[float]:
    moment = time.monotonic()
    end = moment + seconds
    while (moment := moment + chance.expovariate(per_second)) < end:
        await asyncio.sleep(max(0.0, moment - time.monotonic()))
        yield moment


async def compare(
    bench: Bench, fast: Lane, slow: Lane, mortal: Mortal, seconds: float, concurrency: int
) -> dict[str, object]:
    """The figures of both lanes together against each alone; `mortal` is the fast lane's runtime."""
    alone = {lane.identity.name: await bench.saturate([lane], seconds, concurrency) for lane in (fast, slow)}
    both = await bench.saturate([fast, slow], seconds, concurrency)
    total = sum(outcome.per_second for outcome in alone.values())
    load = 0.8 * alone[fast.identity.name].per_second
    p95: dict[str, list[float]] = {"fast alone": [], "both": []}
    helped: Counter[str] = Counter()
    for _ in range(3):
        p95["fast alone"].append((await bench.arrive([fast], seconds, load)).p95_ms)
        together = await bench.arrive([fast, slow], seconds, load)
        p95["both"].append(together.p95_ms)
        helped += together.lanes
    killed = await bench.arrive([fast, slow], seconds, 0.8 * alone[slow.identity.name].per_second, kill=mortal)
    return {
        "alone_per_second": {name: outcome.per_second for name, outcome in alone.items()},
        "both_per_second": both.per_second,
        "of_the_sum": both.per_second / total,
        "both_by_lane": dict(both.lanes),
        "load_per_second": load,
        "p95_fast_alone_ms": statistics.median(p95["fast alone"]),
        "p95_both_ms": statistics.median(p95["both"]),
        "at_that_load_by_lane": dict(helped),
        "fast_lane_killed": {"by_lane": dict(killed.lanes), "failures": dict(killed.failures)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.lanes", description=__doc__)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--device", action="append", required=True, help="twice, the fast one first")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--patches", type=int, default=32, help="an item's side in patches")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--concurrency", type=int, default=256)
    options = parser.parse_args()
    settings = Settings(artifact=options.artifact, device=tuple(options.device), runtime=options.runtime, store=None)
    artifact = open_artifact(options.artifact)
    variants = [choose_variant(artifact, device, settings) for device in settings.device]
    fast, slow = load_lanes(artifact, variants, settings)
    for lane in (fast, slow):
        print(lane.identity, lane.cost.curve().fixed_ms, lane.cost.curve().per_patch_ms)
    mortal = Mortal(fast.runtime)
    fast.runtime = mortal
    bench = Bench(artifact.manifest.tower, Grid(1, options.patches, options.patches))
    print(json.dumps(asyncio.run(compare(bench, fast, slow, mortal, options.seconds, options.concurrency)), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
