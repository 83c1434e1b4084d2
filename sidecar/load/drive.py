"""Sends a mix at a pace, and has every item's end noted. Knows clients and the clock; what is sent comes from the mix.

In a closed loop so many callers each wait for an answer before they ask again: a slow server is asked less. In an open loop
requests arrive when they arrive, as those of many users do, and a latency counts from that arrival, not from when this
process came to send it: else what waits behind a slow answer would look fast (coordinated omission).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from sidecar.client import AsyncEncoderClient, ClientError, EncodeError, Item, ItemError
from sidecar.load.mix import Mix, Request
from sidecar.load.tally import Cause, Place, Tally, cause_of

# A server that is gone fails calls at once: a closed loop without a pause would spin.
_PAUSE_WHEN_GONE_S = 0.1
_GONE = Cause("UNAVAILABLE")
# Another stream of random numbers than any of the mix's.
_ARRIVALS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast and how long.

    Args:
        concurrency: callers in the closed loop, where `rate_per_s` is None.
        rate_per_s: requests a second in the open loop.
        poisson: they arrive at random, independently of one another; else evenly.
        requests, duration_s: no request begins after either; at least one is given.
    """

    concurrency: int = 1
    rate_per_s: float | None = None
    poisson: bool = True
    requests: int | None = None
    duration_s: float | None = None

    def arrivals_s(self, seed: int) -> Iterator[float]:
        """When the open loop's requests arrive, in seconds since the beginning, without end."""
        assert self.rate_per_s is not None
        if not self.poisson:
            yield from (number / self.rate_per_s for number in itertools.count())
        random, arrives_s = np.random.default_rng((seed, _ARRIVALS)), 0.0
        while True:
            arrives_s += float(random.exponential(1.0 / self.rate_per_s))
            yield arrives_s

    def ends(self, number: int, since_s: float) -> bool:
        """Whether the request of that number, from 0, at that time, is one too many."""
        too_many = self.requests is not None and number >= self.requests
        return too_many or (self.duration_s is not None and since_s >= self.duration_s)


class Driver:
    """One run.

    Args:
        clients: requests are dealt out to them in turn.
        retry: come back when the server says so, as long as that is before the request's deadline.
    """

    def __init__(
        self, clients: Sequence[AsyncEncoderClient], mix: Mix, pace: Pace, tally: Tally, *, retry: bool = False
    ) -> None:
        self._clients = clients
        self._mix = mix
        self._pace = pace
        self._tally = tally
        self._retry = retry
        self._numbers = itertools.count()

    async def run(self) -> None:
        """Send all and wait for all. Cancelled, it cancels what is under way, notes that, and passes it on."""
        async with asyncio.TaskGroup() as group:
            if self._pace.rate_per_s is None:
                for _ in range(self._pace.concurrency):
                    group.create_task(self._closed_loop())
            else:
                await self._open_loop(group)

    async def _closed_loop(self) -> None:
        while not self._pace.ends(number := next(self._numbers), _now() - self._tally.began):
            await self._send(number)

    async def _open_loop(self, group: asyncio.TaskGroup) -> None:
        for number, arrival_s in enumerate(self._pace.arrivals_s(self._mix.seed)):
            if self._pace.ends(number, arrival_s):
                return
            arrived = self._tally.began + arrival_s
            # Also where this is late already: answers must be read between one request and the next.
            await asyncio.sleep(max(arrived - _now(), 0.0))
            group.create_task(self._send(number, arrived))

    async def _send(self, number: int, arrived: float | None = None) -> None:
        """`arrived` is given in the open loop; in the closed one a request arrives when it has been made."""
        request = self._mix.request(number)
        arrived = _now() if arrived is None else arrived
        self._tally.note_sent(len(request.items), (_now() - arrived) * 1e3)
        waiting = dict(enumerate(request.items))
        cancelled_at = None if request.cancel_after_s is None else arrived + request.cancel_after_s
        try:
            async with asyncio.timeout_at(cancelled_at):
                await self._ask(number, request, waiting, arrived)
        except (TimeoutError, asyncio.CancelledError) as end:
            for index in waiting:
                self._tally.note_cancelled(arrived, _now(), Place(number, index))
            if isinstance(end, asyncio.CancelledError):
                raise

    async def _ask(self, number: int, request: Request, waiting: dict[int, Item], arrived: float) -> None:
        """Ask until nothing waits; what has its end leaves `waiting`, also where this is cancelled half-way."""
        deadline = arrived + request.timeout_s
        while waiting:
            again_after_s = await self._ask_once(number, waiting, arrived, deadline)
            # What waits and was not put off has been lost. It has no end, and the sum will tell.
            for lost in waiting.keys() - again_after_s.keys():
                del waiting[lost]
            if waiting:
                await asyncio.sleep(max(again_after_s.values()))
                self._tally.retried += len(waiting)

    async def _ask_once(
        self, number: int, waiting: dict[int, Item], arrived: float, deadline: float
    ) -> dict[int, float]:
        """One call for all that waits; returns what to ask for again, and in how many seconds."""
        client = self._clients[number % len(self._clients)]
        indexes = list(waiting)
        again_after_s: dict[int, float] = {}
        try:
            left_s = max(deadline - _now(), 0.001)
            async with aclosing(client.encode_stream(list(waiting.values()), left_s)) as results:
                async for position, result in results:
                    index = indexes[position]
                    if isinstance(result, ItemError):
                        if (delay_s := self._delay_s(result, deadline)) is not None:
                            again_after_s[index] = delay_s
                            continue
                        self._tally.note_error(result, arrived, _now(), Place(number, index))
                    else:
                        self._tally.note_embedding(result, arrived, _now(), Place(number, index))
                    waiting.pop(index, None)
        except ClientError as error:
            delay_s = self._delay_s(error, deadline)
            for index in waiting.keys() - again_after_s.keys():
                if delay_s is not None:
                    again_after_s[index] = delay_s
                    continue
                del waiting[index]
                self._tally.note_error(error, arrived, _now(), Place(number, index))
            if cause_of(error) == _GONE:
                await asyncio.sleep(_PAUSE_WHEN_GONE_S)
        return again_after_s

    def _delay_s(self, error: ItemError | ClientError, deadline: float) -> float | None:
        """How long to wait before asking again; None: not at all."""
        if not self._retry or not isinstance(error, ItemError | EncodeError) or error.retry_delay_s is None:
            return None
        return error.retry_delay_s if _now() + error.retry_delay_s < deadline else None


def _now() -> float:
    """Seconds on the running loop's clock, which sleeps and timeouts are given in."""
    return asyncio.get_running_loop().time()
