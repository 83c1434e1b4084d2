"""One lane in virtual time, as sidecar.engine.lane does it: a queue, streams, and runs that are shared while that pays.

Times are milliseconds.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sidecar.plan.costs import WORTHWHILE, Costs, Line, Picture, Run

_MOST_SHARED = 8  # as in sidecar.engine.lane
# As in sidecar.engine.scheduler.
_DECODED_PIXELS_A_PATCH = 4096
# What the load report goes by: so many of the latest runs, or the curve until there are a few.
_LATEST_RUNS, _FEW_RUNS = 32, 4
_PICTURE = Picture(1024, 448 * 448)
_ENOUGH = 10
_NOTHING = Line()


@dataclass(slots=True, eq=False)
class Job:
    """One picture in one sidecar; `done` is told when its embedding leaves the lane."""

    picture: Picture
    ends_by_ms: float
    done: Callable[[float | None], None]  # the time; None: it was given up for its deadline
    patches: int = field(init=False)
    pairs: float = field(init=False)
    called_in: Lane | None = None

    def __post_init__(self) -> None:
        self.patches, self.pairs = self.picture.patches, self.picture.pairs

    @property
    def share(self) -> int:
        return self.patches + self.picture.pixels // _DECODED_PIXELS_A_PATCH


class Lane:
    """One device: a queue, streams, and the curve that it decides by. What a run really takes scatters around that."""

    def __init__(self, kind: str, costs: Costs, batch_patches: int, chance: random.Random) -> None:
        self.kind = kind
        self.costs = costs
        self.run = costs.run
        self.streams = costs.streams
        self.busy_ms = 0.0
        self.items = 0
        self.queue: deque[Job] = deque()
        self.free = costs.streams
        self._publish = costs.publish or _NOTHING
        self._batch_patches = batch_patches
        self._chance = chance
        self._ratios: dict[int, Sequence[float]] = {}
        self._patches, self._pairs, self._items = 0, 0.0, 0  # waiting and running
        self._latest: deque[tuple[int, float]] = deque(maxlen=_LATEST_RUNS)
        one = costs.run.ms(1, 1.0) - costs.run.fixed_ms
        most = math.ceil(costs.run.fixed_ms * (1 / WORTHWHILE - 1) / one) if one > 0 else batch_patches
        self.run_patches = min(batch_patches, most)

    def push(self, job: Job) -> None:
        self.queue.append(job)
        self._count(job, 1)

    def backlog_ms(self) -> float:
        return self.bulk_ms(self._patches, self._pairs, self._items) if self._items else 0.0

    def bulk_ms(self, patches: float, pairs: float, items: int) -> float:
        """For so much together, in runs as large as pays, on all streams."""
        runs = min(items, math.ceil(patches / max(1, self.run_patches)))
        return (self.run.ms(patches, pairs) + self.run.fixed_ms * (runs - 1)) / self.streams

    def rate(self) -> float:
        """Patches a millisecond while it is busy, by its latest runs; before there are a few, by the curve."""
        if len(self._latest) >= _FEW_RUNS:
            return self.streams * sum(p for p, _ in self._latest) / sum(ms for _, ms in self._latest)
        return _PICTURE.patches / self.bulk_ms(_PICTURE.patches, _PICTURE.pairs, 1)

    def begin(self, now: float) -> tuple[list[Job], list[Job], float] | None:
        """The next run, where a stream is free and anything waits: its jobs, those whose turn came too late, its duration."""
        if not self.free or not self.queue:
            return None
        run: list[Job] = []
        late: list[Job] = []
        patches, pairs = 0, 0.0
        while self.queue and (not run or self._pays(len(run), patches, pairs, self.queue[0])):
            job = self.queue.popleft()
            if now + self.run.ms(patches + job.patches, pairs + job.pairs) > job.ends_by_ms:
                self._count(job, -1)
                late.append(job)
                continue
            run.append(job)
            patches, pairs = patches + job.patches, pairs + job.pairs
        if not run:
            return run, late, 0.0
        self.free -= 1
        self.items += len(run)
        took_ms = self.run.ms(patches, pairs) * self._ratio(patches)
        self._latest.append((patches, took_ms))
        return run, late, took_ms

    def publish_ms(self, job: Job) -> float:
        return self._publish.ms(job.picture)

    def end(self, run: Sequence[Job]) -> None:
        self.free += 1
        for job in run:
            self._count(job, -1)

    def _pays(self, count: int, patches: int, pairs: float, more: Job) -> bool:
        together = patches + more.patches, pairs + more.pairs
        return count < _MOST_SHARED and pays(self.run, *together, self._batch_patches)

    def _ratio(self, patches: int) -> float:
        """What a run takes over what the curve says, as one of about as many patches did."""
        spread = self.costs.spread
        if not spread:
            return 1.0
        if (ratios := self._ratios.get(patches)) is None:
            ratios = self._ratios[patches] = _nearest(spread, patches)
        return ratios[int(self._chance.random() * len(ratios))]

    def _count(self, job: Job, sign: int) -> None:
        self._patches += sign * job.patches
        self._pairs += sign * job.pairs
        self._items += sign


def _nearest(spread: Mapping[int, Sequence[float]], patches: int) -> Sequence[float]:
    """What is known of runs of about so many patches: enough that no single one stands for all of its size."""
    ratios: list[float] = []
    for known in sorted(spread, key=lambda known: abs(math.log(known / patches))):
        ratios += spread[known]
        if len(ratios) >= _ENOUGH:
            break
    return ratios


def pays(run: Run, patches: float, pairs: float, batch_patches: int) -> bool:
    """Whether so much is worth running together."""
    return patches <= batch_patches and run.fixed_ms > WORTHWHILE * run.ms(patches, pairs)


def picture_ms(run: Run, patches: float, pairs: float, batch_patches: int) -> float:
    """A picture's part in a run of as many such as are worth running together."""
    count = 1
    while count < _MOST_SHARED and pays(run, (count + 1) * patches, (count + 1) * pairs, batch_patches):
        count += 1
    return run.ms(count * patches, count * pairs) / count
