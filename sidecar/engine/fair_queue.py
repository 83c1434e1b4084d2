"""A queue that is fair between clients: whoever has had least is next, however much the others have waiting.

Start-time fair queueing (Goyal, Vin and Cheng, 1996): each client has a clock that its own work moves on, and the client whose
clock is furthest behind is served. One that comes back after a pause starts at the present, so that idling saves nothing up, and
one that runs ahead of the present stays ahead of it, so that leaving and coming back is no way to the front.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Client(Generic[T]):
    clock: float
    order: int  # among equal clocks, whoever came first
    waiting: deque[tuple[T, float]] = field(default_factory=deque)
    cost: float = 0.0


class FairQueue(Generic[T]):
    """First in, first out for each client; between clients by what they have had. Not safe between threads."""

    def __init__(self) -> None:
        self._clients: dict[str, _Client[T]] = {}
        self._ahead: dict[
            str, float
        ] = {}  # clocks of clients that have nothing waiting and have had more than their share
        self._now = 0.0
        self._orders = itertools.count()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def clients(self) -> int:
        """How many clients have something waiting."""
        return len(self._clients)

    def push(self, client: str, item: T, cost: float) -> None:
        """`cost`: in the unit that the queue's user counts in; more than 0."""
        entry = self._clients.get(client)
        if entry is None:
            clock = max(self._now, self._ahead.pop(client, 0.0))
            entry = self._clients[client] = _Client(clock, next(self._orders))
        entry.waiting.append((item, cost))
        entry.cost += cost
        self._length += 1

    def pop(
        self, fits: Callable[[T], bool] = lambda item: True, passed: Callable[[T], bool] = lambda item: False
    ) -> T | None:
        """The item whose turn it is; None if there is none, or `fits` refuses it: it then keeps its place. `passed` says which
        items those of other clients may pass for now."""
        ready = [pair for pair in self._clients.items() if not passed(pair[1].waiting[0][0])]
        if not ready:
            return None
        name, client = min(ready, key=lambda pair: (pair[1].clock, pair[1].order))
        item, cost = client.waiting[0]
        if not fits(item):
            return None
        client.waiting.popleft()
        self._now = client.clock
        client.clock += cost
        self._took(name, client, cost)
        return item

    def remove(self, client: str, item: T) -> bool:
        """Take out an item that is no longer wanted. Returns whether it was waiting."""
        entry = self._clients.get(client)
        if entry is None:
            return False
        for index, (waiting, cost) in enumerate(entry.waiting):
            if waiting is item:
                del entry.waiting[index]
                self._took(client, entry, cost)
                return True
        return False

    def clear(self) -> list[T]:
        """Take out everything, in the order of its turns."""
        items = []
        while (item := self.pop()) is not None:
            items.append(item)
        return items

    def ahead_of(self, client: str, cost: float) -> float:
        """About what will have had its turn before something of this cost that `client` pushed now: all of its own, and of each
        other client's no more than as much again."""
        own = self._clients[client].cost if client in self._clients else 0.0
        return own + sum(min(other.cost, own + cost) for name, other in self._clients.items() if name != client)

    def _took(self, name: str, client: _Client[T], cost: float) -> None:
        self._length -= 1
        client.cost -= cost
        if client.waiting:
            return
        del self._clients[name]
        if not self._clients:
            self._ahead.clear()  # nobody was kept waiting by anybody
            return
        self._ahead = {other: clock for other, clock in self._ahead.items() if clock > self._now}
        if client.clock > self._now:
            self._ahead[name] = client.clock
