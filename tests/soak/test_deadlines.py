"""What cannot be done in time is refused at once, and what nobody waits for any more does not run."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from load import (
    QUICK,
    all_at_once,
    engine,
    is_idle,
    items_run,
    open_clients,
    outcome_of,
    percentile,
    slow_item,
    wait_until,
)
from servers import Server, StartServer

from sidecar.client import Embedding, EncodeError, EncoderClient, ItemError

pytestmark = pytest.mark.soak

QUEUED = 12
WAITING, FLOOD = 6, 24


@pytest.fixture
def server(start_server: StartServer) -> Server:
    return start_server(*QUICK, "--threads", "1")


def service_s(client: EncoderClient, first: int) -> float:
    """What a slow item takes here and now; the lane learns it too."""
    results = [client.encode([slow_item(number)], timeout_s=120)[0] for number in range(first, first + 8)]
    return percentile([result.times.run_ms for result in results if isinstance(result, Embedding)], 0.5) / 1e3


def test_a_deadline_that_cannot_be_met_is_refused_at_once(server: Server) -> None:
    with server.client() as client:
        one_s = service_s(client, 0)

    async def run() -> tuple[Any, float]:
        async with open_clients(server, 1) as (client,):
            queue = asyncio.create_task(all_at_once([client], [slow_item(100 + i) for i in range(QUEUED)]))
            await asyncio.to_thread(
                wait_until, "queued", lambda: engine(server)["waiting_patches"] > 4096 * (QUEUED - 2)
            )
            begun = time.monotonic()
            # As the same client: it waits behind all of its own.
            refused = await outcome_of(client, slow_item(999), timeout_s=patience_s)
            took_s = time.monotonic() - begun
            answered = await queue
            assert all(isinstance(result, Embedding) for result in answered)
            return refused, took_s

    patience_s = QUEUED / 3 * one_s
    refused, took_s = asyncio.run(run())
    assert isinstance(refused, ItemError), refused
    reasons = [detail.reason for detail in refused.details if isinstance(detail, ErrorInfo)]
    print(f"\nrefused {took_s * 1e3:.0f} ms into {patience_s * 1e3:.0f} ms of patience: {refused.message}", end="")
    assert (refused.code, reasons) == ("DEADLINE_EXCEEDED", ["DEADLINE_CANNOT_BE_MET"])
    assert took_s < patience_s / 2
    assert items_run(server) == 8 + QUEUED


def test_what_expires_while_it_waits_does_not_run(server: Server) -> None:
    with server.client() as client:
        one_s = service_s(client, 0)
    wait_until("idle", lambda: is_idle(server))
    before, misses = items_run(server), engine(server)["misses"]

    async def run() -> tuple[Any, float]:
        async with open_clients(server, 3) as (client, *others):
            queue = asyncio.create_task(all_at_once([client], [slow_item(200 + i) for i in range(WAITING)]))
            await asyncio.to_thread(wait_until, "queued", lambda: engine(server)["waiting_items"] == WAITING)
            # Time for what waits now and for it. Then two other clients get two turns for each of this one's.
            begun = time.monotonic()
            late = asyncio.create_task(outcome_of(client, slow_item(998), timeout_s=1.6 * WAITING * one_s))
            await asyncio.to_thread(wait_until, "asked for", lambda: engine(server)["misses"] == misses + WAITING + 1)
            flood = await all_at_once(others, [slow_item(300 + i) for i in range(FLOOD)])
            expired = await late
            took_s = time.monotonic() - begun
            assert all(isinstance(result, Embedding) for result in [*flood, *await queue])
            return expired, took_s

    expired, took_s = asyncio.run(run())
    wait_until("idle", lambda: is_idle(server))
    ran = items_run(server) - before
    print(f"\nexpired after {took_s:.1f} s of waiting behind others; {ran} items ran, of {ran + 1} asked for", end="")
    assert isinstance(expired, (ItemError, EncodeError)) and expired.code == "DEADLINE_EXCEEDED", expired
    assert ran == WAITING + FLOOD
