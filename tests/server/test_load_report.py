"""The load report, read by gRPC itself: its weighted_round_robin shares calls out by what servers of unequal speed report.

gRPC keeps the report for itself, so that no client of it can be asked what it was.
"""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from sidecar.channel import CHANNEL_OPTIONS
from sidecar.engine.cost import Work
from sidecar.engine.lane import Lane
from sidecar.engine.status import CostCurve, LaneStatus
from sidecar.server.load_report import METADATA_KEY, SERVER_KEY, load_report, trailing_metadata


class FakeLane:
    """A lane that by its cost model does `rate` pictures a second, and is `busy_share` busy.

    `ran`: (patches, milliseconds) of the runs it has measured since it was ready.
    """

    def __init__(
        self,
        rate: float,
        busy_share: float,
        out_for_s: float = 0.0,
        ran: Sequence[tuple[int, float]] = (),
        streams: int = 1,
    ) -> None:
        self.rate, self.busy_share, self.out_for_s = rate, busy_share, out_for_s
        self.ran, self.streams = ran, streams

    def bulk_ms(self, work: Work, items: int) -> float:
        return 1e3 / self.rate

    def busy(self) -> float:
        return self.busy_share

    def status(self) -> LaneStatus:
        """What a load report reads of it."""
        warm_up = ((64, 1000.0), (4096, 1000.0))
        cost = CostCurve(fixed_ms=0.0, per_patch_ms=0.0, per_pair_ms=0.0, samples=(*warm_up, *self.ran))
        return cast(LaneStatus, SimpleNamespace(runs=len(self.ran), streams=self.streams, cost=cost))


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


@pytest.mark.parametrize("runs", [4, 32, 128])
def test_once_it_has_run_something_what_was_measured_counts(runs: int) -> None:
    """A picture of 448×448 has 1024 patches: 256 patches in 10 ms are 25 pictures a second."""
    rate, utilisation = read(report(FakeLane(999.0, 0.5, ran=[(256, 10.0)] * runs)))
    assert rate / utilisation == pytest.approx(25.0)


def test_runs_of_unequal_size_count_by_the_work_that_was_done() -> None:
    rate, utilisation = read(report(FakeLane(999.0, 0.5, ran=[(256, 20.0), (1792, 60.0)] * 4)))
    assert rate / utilisation == pytest.approx(25.0)


def test_two_runs_at_a_time_do_twice_as_much() -> None:
    rate, utilisation = read(report(FakeLane(999.0, 0.5, ran=[(1024, 40.0)] * 8, streams=2)))
    assert rate / utilisation == pytest.approx(50.0)


def test_a_server_that_has_become_slower_says_so_after_a_few_runs() -> None:
    rate, utilisation = read(report(FakeLane(999.0, 0.5, ran=[(1024, 10.0)] * 100 + [(1024, 100.0)] * 32)))
    assert rate / utilisation == pytest.approx(10.0)


def test_replies_say_who_answers() -> None:
    first, second = (dict(trailing_metadata([])) for _ in range(2))
    assert first[SERVER_KEY] and first[SERVER_KEY] == second[SERVER_KEY]


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
