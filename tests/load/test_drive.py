"""Open and closed loop, cancellations, retries and losses, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from itertools import islice, pairwise
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from virtual_time import Script, ScriptedClient, VirtualLoop, embedding, run

from sidecar.client import EncodeError, Item, ItemError
from sidecar.load.drive import Driver, Pace
from sidecar.load.mix import Mix
from sidecar.load.tally import Kind, Tally
from sidecar.replies import Result

Answers = AsyncGenerator[tuple[int, Result], None]


class Blank:
    def item(self, number: int) -> Item:
        return Item()


class SlowToMake:
    """Making the fourth picture takes this process three seconds, in which nothing else happens."""

    def item(self, number: int) -> Item:
        if number == 3:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualLoop)
            loop.now += 3.0
        return Item()


def answering_after(seconds: float) -> Script:
    async def script(items: Sequence[Item], timeout_s: float) -> Answers:
        for index in range(len(items)):
            await asyncio.sleep(seconds)
            yield index, embedding()

    return script


def refusal(retry_after_s: float) -> ItemError:
    delay = Duration()
    delay.FromMilliseconds(round(retry_after_s * 1000))
    return ItemError("RESOURCE_EXHAUSTED", "full", (ErrorInfo(reason="OVERLOADED"), RetryInfo(retry_delay=delay)))


def drive(script: Script | list[Script], pace: Pace, *, retry: bool = False, pictures: Any = None, **mix: Any):
    """The tally, and the clients, one for each script."""
    clients = [ScriptedClient(one) for one in (script if isinstance(script, list) else [script])]

    async def main() -> Tally:
        tally = Tally(asyncio.get_running_loop().time())
        drawn = Mix(pictures=pictures or Blank(), seed=7, **mix)
        await Driver(clients, drawn, pace, tally, retry=retry).run()
        return tally

    return run(main()), clients


def latencies(tally: Tally) -> list[float]:
    return [round(outcome.latency_ms) for outcome in tally.outcomes]


def test_in_a_closed_loop_so_many_callers_wait_for_their_answers() -> None:
    tally, (client,) = drive(answering_after(1.0), Pace(concurrency=3, requests=10))
    assert client.most_at_once == 3
    assert tally.counts()[Kind.ANSWERED] == tally.sent == 10
    assert latencies(tally) == [1000] * 10
    assert tally.elapsed_s == pytest.approx(4.0)


def test_a_closed_loop_begins_nothing_after_its_time() -> None:
    tally, _ = drive(answering_after(1.0), Pace(concurrency=2, duration_s=2.5))
    assert tally.sent == 6
    assert tally.elapsed_s == pytest.approx(3.0)


def test_in_an_open_loop_requests_arrive_whatever_is_answered() -> None:
    tally, (client,) = drive(answering_after(100.0), Pace(rate_per_s=10.0, poisson=False, duration_s=2.0))
    assert tally.sent == client.most_at_once == 20
    assert tally.missing == 0


def test_an_open_loops_latency_counts_from_the_arrival_also_where_sending_was_late() -> None:
    pace = Pace(rate_per_s=1.0, poisson=False, requests=6)
    tally, _ = drive(answering_after(0.1), pace, pictures=SlowToMake())
    assert latencies(tally) == [100, 100, 100, 3100, 2100, 1100]
    assert [round(late) for late in tally.late_ms] == [0, 0, 0, 3000, 2000, 1000]


def test_a_closed_loops_latency_has_no_time_of_making_pictures_in_it() -> None:
    tally, _ = drive(answering_after(0.1), Pace(requests=6), pictures=SlowToMake())
    assert latencies(tally) == [100] * 6


def test_poisson_arrivals_have_the_rate_and_are_bursty() -> None:
    arrivals = list(islice(Pace(rate_per_s=50.0, requests=1).arrivals_s(seed=1), 5000))
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.02, rel=0.05)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.1)  # as of an exponential distribution


def test_connections_take_turns() -> None:
    _, clients = drive([answering_after(0.1)] * 3, Pace(requests=9), items_per_request=2)
    assert [client.calls for client in clients] == [[2, 2, 2]] * 3


def test_cancelled_items_are_their_own_kind_and_keep_what_was_answered() -> None:
    tally, (client,) = drive(
        answering_after(1.0), Pace(requests=20), items_per_request=4, cancel_fraction=1.0, cancel_within_s=3.0
    )
    counts = tally.counts()
    assert counts[Kind.CANCELLED] + counts[Kind.ANSWERED] == tally.sent == 80
    assert counts[Kind.ANSWERED] > 0
    assert max(outcome.latency_ms for outcome in tally.of(Kind.CANCELLED)) <= 3000
    assert client.most_at_once == 1  # a cancelled call is over before the next begins


def busy_until(seconds: float, retry_after_s: float) -> Script:
    """Refuses every second item of a call for so long after the first call."""
    first: list[float] = []

    async def script(items: Sequence[Item], timeout_s: float) -> Answers:
        now = asyncio.get_running_loop().time()
        first.append(now)
        for index in range(len(items)):
            yield index, refusal(retry_after_s) if index % 2 and now < first[0] + seconds else embedding()

    return script


def test_a_retry_comes_when_the_server_says_and_only_for_what_was_refused() -> None:
    tally, (client,) = drive(busy_until(0.1, 0.5), Pace(requests=1), items_per_request=4, retry=True)
    assert client.calls == [4, 2]
    assert tally.retried == 2
    assert latencies(tally) == [0, 0, 500, 500]
    assert tally.counts()[Kind.ANSWERED] == tally.sent == 4


def test_without_retry_a_refusal_is_the_end() -> None:
    tally, (client,) = drive(busy_until(0.1, 0.5), Pace(requests=1), items_per_request=4)
    assert client.calls == [4]
    assert tally.counts()[Kind.REFUSED] == 2
    assert tally.retried == 0


def test_nothing_is_sent_again_after_its_deadline() -> None:
    async def full(items: Sequence[Item], timeout_s: float) -> Answers:
        for index in range(len(items)):
            yield index, refusal(0.5)

    tally, (client,) = drive(full, Pace(requests=1), items_per_request=2, retry=True, timeout_s=(1.2, 1.2))
    assert client.calls == [2, 2, 2]
    assert tally.counts()[Kind.REFUSED] == 2
    assert tally.missing == 0


def test_the_deadline_that_a_call_gets_counts_from_the_arrival() -> None:
    given: list[float] = []

    async def script(items: Sequence[Item], timeout_s: float) -> Answers:
        given.append(round(timeout_s, 3))
        yield 0, embedding()

    drive(script, Pace(rate_per_s=1.0, poisson=False, requests=5), pictures=SlowToMake(), timeout_s=(4.0, 4.0))
    assert given == [4.0, 4.0, 4.0, 1.0, 2.0]


def test_an_item_that_the_server_forgets_is_missing() -> None:
    async def forgets_the_second(items: Sequence[Item], timeout_s: float) -> Answers:
        yield 0, embedding()
        yield 2, embedding()

    tally, _ = drive(forgets_the_second, Pace(requests=5), items_per_request=3, retry=True)
    assert tally.missing == 5


def test_a_call_that_breaks_keeps_what_was_answered_and_fails_the_rest() -> None:
    async def breaks(items: Sequence[Item], timeout_s: float) -> Answers:
        yield 1, embedding()
        raise EncodeError("UNAVAILABLE", "connection reset")

    tally, _ = drive(breaks, Pace(requests=4), items_per_request=3)
    counts = tally.counts()
    assert (counts[Kind.ANSWERED], counts[Kind.FAILED], tally.missing) == (4, 8, 0)


def test_a_server_that_is_gone_does_not_make_the_loop_spin() -> None:
    async def gone(items: Sequence[Item], timeout_s: float) -> Answers:
        raise EncodeError("UNAVAILABLE", "connection refused")
        yield

    tally, _ = drive(gone, Pace(duration_s=10.0))
    assert 90 <= tally.sent <= 110
    assert tally.counts()[Kind.FAILED] == tally.sent


def test_an_interrupted_run_accounts_for_what_was_under_way() -> None:
    client = ScriptedClient(answering_after(1.0))

    async def main() -> Tally:
        tally = Tally(asyncio.get_running_loop().time())
        mix = Mix(pictures=Blank(), seed=7, items_per_request=2)
        running = asyncio.create_task(Driver([client], mix, Pace(concurrency=5), tally).run())
        await asyncio.sleep(3.5)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return tally

    tally = run(main())
    assert tally.counts()[Kind.ANSWERED] == 15
    assert tally.counts()[Kind.CANCELLED] == 5
    assert tally.missing == 0
