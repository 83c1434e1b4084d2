"""A fleet of sidecars under some traffic, in virtual time: gRPC's weighted round robin between them, and what each does itself.

Deterministic: one seed, one outcome. How long runs take scatters as it was measured to.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sidecar.plan.costs import Costs, Line, Picture
from sidecar.plan.lane import Job, Lane
from sidecar.plan.sidecar import Limits, Sidecar
from sidecar.plan.traffic import Traffic

GPU, CPU = "gpu", "cpu"
_WEIGHTS_EVERY_MS = 1000.0  # weightUpdatePeriod of sidecar.channel
_COLD_MS = 2000.0  # blackoutPeriod, and until the next update


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """So many of each kind, each a sidecar of its own, or all of them lanes of one sidecar (`joined`).

    `timeout_s`: callers' patience. `limits`: of each sidecar. `cold`: the caller has just connected, and gRPC does not know yet
    whom to send how much.
    """

    gpus: int
    cpus: int
    gpu: Costs | None
    cpu: Costs | None
    joined: bool = False
    cold: bool = False
    timeout_s: float = math.inf
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class Simulated:
    """What came of it.

    latencies_ms: of each request that was answered, from its arrival to the end of its slowest picture.
    item_latencies_ms: of each picture.
    refused: the share of requests of which a picture got no embedding.
    utilisation: by kind, the share of its lanes' time, up to the last arrival, that runs took.
    """

    latencies_ms: list[float]
    item_latencies_ms: list[float]
    refused: float
    utilisation: dict[str, float]
    items: dict[str, int]


def simulate(traffic: Traffic, fleet: Fleet, seed: int = 0) -> Simulated:
    return _Simulation(traffic, fleet, seed).run()


class _Simulation:
    def __init__(self, traffic: Traffic, fleet: Fleet, seed: int) -> None:
        self._traffic = traffic
        self._timeout_ms = fleet.timeout_s * 1e3
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._overhead = next((one.overhead for one in (fleet.gpu, fleet.cpu) if one and one.overhead), None) or Line()
        self._sidecars = _sidecars(fleet, self._later, seed)
        self._passes = [0.0] * len(self._sidecars)  # stride scheduling
        self._strides = [1.0] * len(self._sidecars)
        self._weighed_ms = _COLD_MS - _WEIGHTS_EVERY_MS if fleet.cold else -math.inf
        self._began: dict[int, float] = {}
        self._slowest: dict[int, float] = {}
        self._failed: set[int] = set()
        self._item_latencies: list[float] = []
        self._overheads: dict[Picture, float] = {}

    def run(self) -> Simulated:
        # Arrivals are merged with what happens by itself, of which there is little at a time.
        events = self._events
        for at_ms, request, picture in self._traffic.arrivals:
            while events and events[0][0] <= at_ms:
                heapq.heappop(events)[2]()
            self._arrive(at_ms, request, picture)
        last_ms = self._traffic.arrivals[-1].at_ms
        lanes = [lane for sidecar in self._sidecars for lane in sidecar.lanes]
        busy = {lane: lane.busy_ms for lane in lanes}
        while events:
            heapq.heappop(events)[2]()
        answered = [ms for request, ms in self._slowest.items() if request not in self._failed]
        utilisation, items = {}, {}
        for kind in (GPU, CPU):
            if own := [lane for lane in lanes if lane.kind == kind]:
                capacity_ms = max(last_ms, 1e-9) * sum(lane.streams for lane in own)
                utilisation[kind] = min(1.0, sum(busy[lane] for lane in own) / capacity_ms)
                items[kind] = sum(lane.items for lane in own)
        return Simulated(answered, self._item_latencies, len(self._failed) / len(self._began), utilisation, items)

    def _later(self, at_ms: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_ms, next(self._order), action))

    def _arrive(self, at_ms: float, request: int, picture: Picture) -> None:
        self._began.setdefault(request, at_ms)
        if (overhead_ms := self._overheads.get(picture)) is None:
            overhead_ms = self._overheads[picture] = self._overhead.ms(picture)

        def done(ended_ms: float | None) -> None:
            if ended_ms is None:
                self._failed.add(request)
                return
            self._item_latencies.append(ended_ms - at_ms)
            latency_ms = ended_ms - self._began[request]
            self._slowest[request] = max(self._slowest.get(request, 0.0), latency_ms)

        # The call's own time goes by before the picture is judged: which part of it comes after the run makes no difference.
        entered_ms = at_ms + overhead_ms
        self._later(entered_ms, lambda: self._enter(picture, at_ms, entered_ms, request, done))

    def _enter(
        self, picture: Picture, at_ms: float, now: float, request: int, done: Callable[[float | None], None]
    ) -> None:
        """At the sidecar whose turn it is, or at another one if that refuses it."""
        for index in self._in_turn(now):
            if self._sidecars[index].take(Job(picture, at_ms + self._timeout_ms, done), now):
                return
        self._failed.add(request)

    def _in_turn(self, now: float) -> Iterator[int]:
        if len(self._sidecars) == 1:
            yield 0
            return
        if now - self._weighed_ms >= _WEIGHTS_EVERY_MS:
            self._weighed_ms = now
            self._strides = [1.0 / max(1e-9, sidecar.rate()) for sidecar in self._sidecars]
        passed: set[int] = set()
        while len(passed) < len(self._sidecars):
            others = [index for index in range(len(self._sidecars)) if index not in passed]
            index = min(others, key=lambda one: self._passes[one] + self._strides[one])
            self._passes[index] += self._strides[index]
            passed.add(index)
            yield index


def _sidecars(fleet: Fleet, later: Callable[[float, Callable[[], None]], None], seed: int) -> list[Sidecar]:
    numbers = itertools.count()

    def lane(kind: str, costs: Costs) -> Lane:
        return Lane(kind, costs, fleet.limits.batch_patches, random.Random(f"{seed} {next(numbers)}"))

    gpus = [lane(GPU, fleet.gpu) for _ in range(fleet.gpus) if fleet.gpu]
    cpus = [lane(CPU, fleet.cpu) for _ in range(fleet.cpus) if fleet.cpu]
    if fleet.joined:
        prepare = next((one.costs.prepare for one in (*gpus, *cpus) if one.costs.prepare), None)
        return [Sidecar([*gpus, *cpus], prepare or Line(), fleet.limits, later)]
    return [Sidecar([one], one.costs.prepare or Line(), fleet.limits, later) for one in (*gpus, *cpus)]
