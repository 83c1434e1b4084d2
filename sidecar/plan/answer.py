"""The answer: fleets with more and more CPU sidecars, the first that is quick enough, and from which rate on they help at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from sidecar.load.tally import PERCENTILES, percentile
from sidecar.plan.lane import picture_ms
from sidecar.plan.simulation import CPU, GPU, Fleet, Simulated, simulate
from sidecar.plan.traffic import Traffic

# A curve over rates, in parts of what the GPUs alone can do: far enough that they are overloaded at its end.
_GRID = tuple(round(0.1 * step, 2) for step in range(1, 13))
# Of a longer record only so many pictures are simulated at each of those rates; the default traffic is scanned whole.
MOST_SCANNED = 10_000
_BISECTIONS = 4
# Less than that is no help but chance.
_HELP = 0.98


@dataclass(frozen=True, slots=True)
class Row:
    """One fleet. `latency_ms` by percentile, over all requests: one that was refused counts as one that never ends."""

    cpus: int
    latency_ms: dict[int, float]
    utilisation: dict[str, float]
    items: dict[str, int]
    refused: float

    @classmethod
    def of(cls, cpus: int, simulated: Simulated) -> Row:
        refused = round(simulated.refused * len(simulated.latencies_ms) / max(1e-9, 1 - simulated.refused))
        latencies = [*simulated.latencies_ms, *[math.inf] * refused] or [math.inf]
        by_percent = {percent: percentile(latencies, percent) for percent in PERCENTILES}
        return cls(cpus, by_percent, simulated.utilisation, simulated.items, simulated.refused)


@dataclass(frozen=True, slots=True)
class Target:
    """`percent` of the requests within so many milliseconds."""

    percent: int
    ms: float

    def met(self, row: Row) -> bool:
        return row.latency_ms[self.percent] <= self.ms


@dataclass(frozen=True, slots=True)
class Curve:
    """Latency over rates: (requests a second, ms) at the percentile that is looked at. The rate that was asked about is among
    them with the table's own value, and so are the rates at which the crossover was looked for."""

    cpus: int
    points: list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Crossover:
    """Requests a second above which `cpus` beside the GPUs are quicker than the GPUs alone; None: never, up to `looked_to`."""

    cpus: int
    rate_per_s: float | None
    looked_to: float


@dataclass(frozen=True, slots=True)
class Plan:
    """`chosen`: the first row that meets the target."""

    traffic: Traffic
    fleet: Fleet
    target: Target | None
    rows: list[Row]
    chosen: Row | None
    crossover: Crossover | None
    curves: list[Curve] = field(default_factory=list)

    @property
    def percent(self) -> int:
        return self.target.percent if self.target else 95

    @property
    def scanned(self) -> int:
        """How many of the traffic's pictures the curves and the crossover stand for; the table is of all."""
        return min(MOST_SCANNED, len(self.traffic.arrivals))


def plan(
    traffic: Traffic,
    fleet: Fleet,
    cpus: Iterable[int],
    target: Target | None,
    *,
    seed: int = 0,
    curves: bool = False,
) -> Plan:
    """Fleets with so many CPU sidecars each, in turn, until the target is met; all of them where there is none.

    `curves`: also latency over rates, for a plot.
    """
    rows: list[Row] = []
    chosen = None
    for count in cpus:
        if fleet.gpus or count:
            rows.append(Row.of(count, simulate(traffic, replace(fleet, cpus=count), seed)))
            if target is not None and target.met(rows[-1]):
                chosen = rows[-1]
                break
    helpers = max(1, chosen.cpus if chosen else max((row.cpus for row in rows), default=1) if target else 1)
    found = Plan(traffic, fleet, target, rows, chosen, None)
    scan = _Scan(traffic, fleet, rows, found.percent, seed)
    crossover = scan.crossover(helpers) if fleet.gpus and fleet.cpu else None
    drawn = sorted({0, 1, helpers, rows[-1].cpus} if fleet.cpu else {0}) if curves else []
    return replace(found, crossover=crossover, curves=[scan.curve(count) for count in drawn if fleet.gpus + count])


def capacity_per_s(traffic: Traffic, fleet: Fleet) -> float:
    """Requests a second that the fleet's lanes could run, with as many pictures in a run as pays."""
    number = len(traffic.arrivals)
    patches = sum(arrival.picture.patches for arrival in traffic.arrivals) / number
    pairs = sum(arrival.picture.pairs for arrival in traffic.arrivals) / number
    lanes = ((fleet.gpus, fleet.gpu), (fleet.cpus, fleet.cpu))
    a_ms = sum(
        count * costs.streams / picture_ms(costs.run, patches, pairs, fleet.limits.batch_patches)
        for count, costs in lanes
        if costs
    )
    return a_ms * 1e3 * traffic.requests / number


class _Scan:
    """The same traffic at other rates."""

    def __init__(self, traffic: Traffic, fleet: Fleet, rows: Sequence[Row], percent: int, seed: int) -> None:
        self._traffic = traffic.at_speed(1.0, MOST_SCANNED)
        self._fleet = fleet
        self._percent = percent
        self._seed = seed
        self._known: dict[tuple[int, float], float] = {}
        alone = replace(fleet, cpus=0) if fleet.gpus else replace(fleet, cpus=1)
        self._unit = capacity_per_s(self._traffic, alone)
        self._asked = self._traffic.rate_per_s / self._unit
        if len(self._traffic.arrivals) == len(traffic.arrivals) and math.isfinite(self._asked):
            self._known = {(row.cpus, self._asked): row.latency_ms[percent] for row in rows}

    def curve(self, cpus: int) -> Curve:
        asked = [self._asked] if math.isfinite(self._asked) else []
        parts = {*_GRID, *asked, *(part for count, part in self._known if count == cpus)}
        return Curve(cpus, [(part * self._unit, self._ms(cpus, part)) for part in sorted(parts)])

    def crossover(self, cpus: int) -> Crossover:
        """Between the last rate on the grid at which they do not help and the first from which on they always do."""
        helps = [self._helps(cpus, part) for part in _GRID]
        looked_to = _GRID[-1] * self._unit
        if not helps[-1]:
            return Crossover(cpus, None, looked_to)
        first = len(helps) - next((back for back, one in enumerate(reversed(helps)) if not one), len(helps))
        high = _GRID[first]
        low = _GRID[first - 1] if first else 0.0
        for _ in range(_BISECTIONS if first else 0):
            middle = (low + high) / 2
            low, high = (low, middle) if self._helps(cpus, middle) else (middle, high)
        return Crossover(cpus, high * self._unit if first else 0.0, looked_to)

    def _helps(self, cpus: int, part: float) -> bool:
        return self._ms(cpus, part) < _HELP * self._ms(0, part)

    def _ms(self, cpus: int, part: float) -> float:
        key = cpus, part
        if key not in self._known:
            rate = self._traffic.rate_per_s
            speed = part / self._asked if math.isfinite(rate) else 1.0
            simulated = simulate(self._traffic.at_speed(speed), replace(self._fleet, cpus=cpus), self._seed)
            self._known[key] = Row.of(cpus, simulated).latency_ms[self._percent]
        return self._known[key]


def kinds(rows: Sequence[Row]) -> list[str]:
    """Of which there are any."""
    return [kind for kind in (GPU, CPU) if any(kind in row.utilisation for row in rows)]
