"""The load report, read by gRPC itself: its weighted_round_robin shares calls out by what servers of unequal speed report.

gRPC keeps the report for itself, so that no client of it can be asked what it was.
"""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import grpc
import pytest

from sidecar.channel import CHANNEL_OPTIONS
from sidecar.engine.cost import Work
from sidecar.engine.lane import Lane
from sidecar.server.load_report import METADATA_KEY, load_report


class FakeLane:
    """A lane that does `rate` pictures a second when it is `busy_share` busy."""

    def __init__(self, rate: float, busy_share: float, out_for_s: float = 0.0) -> None:
        self.rate, self.busy_share, self.out_for_s = rate, busy_share, out_for_s

    def bulk_ms(self, work: Work, items: int) -> float:
        return 1e3 / self.rate

    def busy(self) -> float:
        return self.busy_share


def report(*lanes: FakeLane) -> bytes:
    return load_report([cast(Lane, lane) for lane in lanes])


def read(data: bytes) -> tuple[float, float]:
    """Fields 6 and 9, as doubles."""
    assert len(data) == 18 and (data[0], data[9]) == (6 << 3 | 1, 9 << 3 | 1)
    return struct.unpack("<d", data[1:9])[0], struct.unpack("<d", data[10:])[0]


@pytest.mark.parametrize("busy", [0.0, 0.3, 1.0])
def test_a_servers_weight_is_what_it_could_do_however_busy_it_is(busy: float) -> None:
    rate, utilisation = read(report(FakeLane(20.0, busy), FakeLane(5.0, busy)))
    assert rate / utilisation == pytest.approx(25.0)
    assert utilisation == pytest.approx(max(0.01, busy))


def test_a_lane_out_of_service_counts_for_nothing() -> None:
    rate, utilisation = read(report(FakeLane(20.0, 0.5, out_for_s=3.0), FakeLane(5.0, 0.5)))
    assert rate / utilisation == pytest.approx(5.0)
    assert report(FakeLane(20.0, 0.5, out_for_s=3.0)) == b""


def test_grpc_shares_calls_out_by_what_servers_report() -> None:
    calls: Counter[str] = Counter()

    @asynccontextmanager
    async def serving(name: str, rate: float) -> AsyncIterator[int]:
        async def answer(request: bytes, context: Any) -> bytes:
            calls[name] += 1
            context.set_trailing_metadata(((METADATA_KEY, report(FakeLane(rate, 0.5))),))
            return b""

        server = grpc.aio.server()
        handlers = {"Call": grpc.unary_unary_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Any", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        yield port
        await server.stop(None)

    async def ask() -> None:
        async with AsyncExitStack() as stack:
            slow = await stack.enter_async_context(serving("slow", 3.0))
            fast = await stack.enter_async_context(serving("fast", 12.0))
            address = f"ipv4:127.0.0.1:{slow},127.0.0.1:{fast}"
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, CHANNEL_OPTIONS))
            method = channel.unary_unary("/test.Any/Call")
            # Reports are believed after a second, and again a second later is the first time that they weigh.
            share = 0.0
            for _ in range(40):
                calls.clear()
                for _ in range(100):
                    await method(b"")
                    await asyncio.sleep(0.002)
                share = calls["fast"] / max(1, calls["slow"])
                if 3.2 < share < 4.8:
                    return
            raise AssertionError(f"fast : slow = {share:.1f} : 1 instead of 4 : 1")

    asyncio.run(asyncio.wait_for(ask(), 60))
