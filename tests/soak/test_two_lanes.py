"""Two devices are two lanes, and both work."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from load import QUICK, closed_loop, engine, open_clients, picture_item
from servers import StartServer

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
