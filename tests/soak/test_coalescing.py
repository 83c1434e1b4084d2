"""Equal items under way at once are encoded once, and none of them suffers from what becomes of another."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from load import (
    PATIENCE_S,
    QUICK,
    all_at_once,
    engine,
    is_idle,
    items_run,
    open_clients,
    outcome_of,
    picture_item,
    png,
    slow_item,
    wait_until,
)
from servers import Server, StartServer

from sidecar.client import Embedding, ItemError
from sidecar.items import image_item

pytestmark = pytest.mark.soak


@pytest.fixture
def server(start_server: StartServer) -> Server:
    return start_server(*QUICK, "--threads", "1")


async def reached(server: Server, **figures: int) -> None:
    """Return once the engine's figures are at least these."""

    def are_reached() -> bool:
        now: dict[str, Any] = engine(server)
        return all(now[name] >= least for name, least in figures.items())

    await asyncio.to_thread(wait_until, str(figures), are_reached)


def test_fifty_equal_items_at_once_run_once(server: Server) -> None:
    async def run() -> list[Any]:
        async with open_clients(server, 5) as clients:
            return await all_at_once(clients, [slow_item(1)] * 50)

    results = asyncio.run(run())
    now = engine(server)
    print(f"\n50 equal items: {now['misses']} miss, {now['coalesced']} coalesced, {now['hits']} hits", end="")
    assert all(isinstance(result, Embedding) for result in results)
    assert (now["misses"], now["coalesced"] + now["hits"], items_run(server)) == (1, 49, 1)
    assert now["coalesced"] > 0
    assert len({result.data.tobytes() for result in results}) == 1


def test_whoever_joined_a_caller_that_went_away_is_answered(server: Server) -> None:
    async def run() -> Any:
        async with open_clients(server, 3) as (other, first, second):
            blocker = asyncio.create_task(outcome_of(other, slow_item(0, 1792)))
            await reached(server, misses=1)
            leader = asyncio.create_task(outcome_of(first, slow_item(1)))
            await reached(server, misses=2)
            follower = asyncio.create_task(outcome_of(second, slow_item(1)))
            await reached(server, coalesced=1)
            leader.cancel()
            result = await follower
            await blocker
            return result

    result = asyncio.run(run())
    assert isinstance(result, Embedding) and result.coalesced
    assert items_run(server) == 2
    print("\nthe leader was cancelled, its follower was answered by the one run", end="")


def test_bad_content_under_a_shared_key_fails_its_sender_alone(server: Server) -> None:
    good, cut_short = png(1, 224), png(1, 224)[:2000]

    async def run() -> tuple[Any, list[Any]]:
        async with open_clients(server, 6) as (other, first, *rest):
            # Enough that what comes after it is not yet decoded when the others join.
            blockers = [asyncio.create_task(outcome_of(other, slow_item(i))) for i in range(12)]
            await reached(server, misses=12)
            bad = asyncio.create_task(outcome_of(first, image_item(cut_short, key="shared")))
            await reached(server, misses=13)
            others = [asyncio.create_task(outcome_of(client, image_item(good, key="shared"))) for client in rest]
            results = await bad, list(await asyncio.gather(*others))
            await asyncio.gather(*blockers)
            return results

    bad, others = asyncio.run(run())
    assert isinstance(bad, ItemError) and bad.code == "INVALID_ARGUMENT", bad
    assert all(isinstance(result, Embedding) for result in others), others
    assert items_run(server) == 13  # twelve blockers, and the others' content once
    print(f"\nbad content under a shared key: its sender got {bad.code}, {len(others)} others their embedding", end="")


def test_a_hit_needs_no_lane(server: Server) -> None:
    async def run() -> tuple[Any, Any, bool]:
        async with open_clients(server, 2) as (other, client):
            await outcome_of(client, picture_item(1, key="known"))
            blocker = asyncio.create_task(outcome_of(other, slow_item(1, 2688)))
            await reached(server, misses=2, waiting_items=1)
            hit = await outcome_of(client, picture_item(1, key="known"))
            (fetched,) = await client.fetch(["known"], PATIENCE_S)
            was_busy = not blocker.done()
            blocker.cancel()
            await asyncio.gather(blocker, return_exceptions=True)
            return hit, fetched, was_busy

    hit, fetched, was_busy = asyncio.run(run())
    assert isinstance(hit, Embedding) and hit.cached and hit.times.run_ms == 0
    assert isinstance(fetched, Embedding) and fetched.cached
    assert was_busy
    wait_until("idle", lambda: is_idle(server))
    print("\na hit and a fetch were answered while the only lane was running something else", end="")
