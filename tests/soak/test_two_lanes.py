"""Two devices are two lanes, and both work: equal ones in a server, and a fast one beside a slow one."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from load import QUICK, closed_loop, engine, open_clients, picture_item
from servers import StartServer

from bench.lanes import Bench, Mortal, compare
from sidecar.engine.lane import Lane
from sidecar.runtimes.base import Runtime
from sidecar.vision.dtypes import Array, DType
from sidecar.vision.grid import Grid
from sidecar.vision.spec import TowerSpec

pytestmark = pytest.mark.soak


def test_both_lanes_encode_and_info_shows_them(start_server: StartServer) -> None:
    server = start_server(*QUICK, "--device", "cpu,cpu")

    async def run() -> Counter[str]:
        async with open_clients(server) as clients:
            return await closed_loop(clients, (picture_item(number, 224) for number in range(200)), 32)

    ended = asyncio.run(run())
    with server.client() as client:
        info = client.info(timeout_s=30)
    items = {lane["name"]: lane["items"] for lane in engine(server)["lanes"]}
    print(f"\ntwo lanes: {dict(ended)}, {items}", end="")
    assert ended == {"embedding": 200}
    assert len(info.lanes) == len(items) == 2 and all(", 1 threads, " in lane.device for lane in info.lanes)
    assert sum(items.values()) == 200 and min(items.values()) > 20


TOWER = TowerSpec(
    depth=1, hidden_size=8, num_heads=2, intermediate_size=8, out_hidden_size=4, fullatt_block_indexes=(0,)
)


class Sleeper(Runtime):
    """A device that takes no core, so that two of them are as fast as each alone."""

    name, precision, output_dtype = "sleeper", "f32", DType.FLOAT32

    def __init__(self, device: str, ms: float) -> None:
        """`ms`: for 64 patches, and one more for each run."""
        self.device = device
        self._ms = ms

    def run(self, patches: Array, grids: Sequence[Grid], out: Array) -> None:
        time.sleep((sum(grid.patches for grid in grids) / 64 * self._ms + 1) / 1e3)
        out[:] = 1


@pytest.mark.parametrize("slow_ms", [60, 200])
def test_a_slow_lane_adds_what_it_can_and_costs_nothing(slow_ms: float) -> None:
    runtime = Mortal(Sleeper("fast", 20))
    lanes = [
        Lane("fast", runtime, TOWER, batch_patches=8192),
        Lane("slow", Sleeper("slow", slow_ms), TOWER, batch_patches=8192),
    ]
    for lane in lanes:
        lane.warm_up(1.0)
    figures: dict[str, Any] = asyncio.run(
        compare(Bench(TOWER, Grid(1, 8, 8)), *lanes, runtime, seconds=3, concurrency=128)
    )
    print(f"\nfast 20 ms, slow {slow_ms:g} ms: {figures}", end="")
    assert figures["of_the_sum"] >= 0.9
    # The same arrivals, by the median of three: what is left is the noise of a busy machine.
    assert figures["p95_both_ms"] <= 1.25 * figures["p95_fast_alone_ms"]
    killed = figures["fast_lane_killed"]
    assert killed["by_lane"]["slow"] and killed["by_lane"]["fast"] and not killed["failures"]
    for lane in lanes:
        assert lane.close(20)
