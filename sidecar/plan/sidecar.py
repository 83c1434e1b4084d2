"""One sidecar in virtual time, as sidecar.engine does it: what may enter, whose turn it is, the preprocessing threads, and lanes
that share runs where that pays. All for one client, so turns come in the order of arrival.

Times are milliseconds. Nothing here waits: whoever owns the clock is given what happens next, and calls back when it has.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from sidecar.plan.costs import WORTHWHILE, Costs, Line, Picture, Run

# As in sidecar.engine.lane.
_MOST_SHARED = 8
# As in sidecar.engine.scheduler.
_DECODED_PIXELS_A_PATCH = 4096
_NOTHING = Line()
_ENOUGH = 10

Later = Callable[[float, Callable[[], None]], None]  # calls something at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Settings of a sidecar, under the names of its flags and with their defaults."""

    preprocess_threads: int = 2
    batch_patches: int = 8192
    max_queue_items: int = 2048
    max_queue_patches: int = 262_144


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
        self._latest: deque[tuple[int, float]] = deque(maxlen=32)
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
        if len(self._latest) >= 4:
            return self.streams * sum(p for p, _ in self._latest) / sum(ms for _, ms in self._latest)
        return 1024 / self.bulk_ms(1024, 1024.0**2, 1)

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


class Sidecar:
    """Its doors, its threads and its lanes."""

    def __init__(self, lanes: Sequence[Lane], prepare: Line, limits: Limits, later: Later) -> None:
        self.lanes = tuple(lanes)
        self._prepare = prepare
        self._limits = limits
        self._later = later
        self._waiting: deque[Job] = deque()  # for their turn
        self._queued_share = 0
        self._unready: deque[Job] = deque()  # had their turn, and wait for a preprocessing thread
        self._threads = limits.preprocess_threads
        self._jobs = 0
        self._patches, self._pairs = 0, 0.0
        self._turned = self._turned_patches = self._unprepared = 0
        self._least_turned = limits.preprocess_threads + 2 * sum(lane.streams for lane in lanes)
        self._most_turned_patches = 2 * sum(lane.run_patches * lane.streams for lane in lanes)
        self._called_in: set[Lane] = set()

    def rate(self) -> float:
        """What its load report has gRPC weigh it by, in patches a millisecond."""
        return sum(lane.rate() for lane in self.lanes)

    def take(self, job: Job, now: float) -> bool:
        """Whether it may enter; it is then under way."""
        if self._jobs >= self._limits.max_queue_items:
            return False
        if self._patches and self._patches + job.patches > self._limits.max_queue_patches:
            return False
        if now + self._finish_ms(job) > job.ends_by_ms:
            return False
        self._jobs += 1
        self._patches += job.patches
        self._pairs += job.pairs
        self._waiting.append(job)
        self._queued_share += job.share
        self._give_turns(now)
        return True

    def _finish_ms(self, job: Job) -> float:
        if job.ends_by_ms == math.inf:
            return 0.0
        ahead = self._queued_share + self._turned_patches
        own_ms = min(lane.run.ms(job.patches, job.pairs) for lane in self.lanes)
        return self._wait_ms(ahead, len(self._waiting) + self._turned, self.lanes) + own_ms

    def _wait_ms(self, ahead: float, items: int, lanes: Sequence[Lane]) -> float:
        """Until so many patches of those accepted have run on these lanes."""
        if not items or not ahead:
            return 0.0
        pairs = self._pairs * ahead / max(1, self._patches)
        return 1.0 / sum(1.0 / max(1e-3, lane.bulk_ms(ahead, pairs, items)) for lane in lanes)

    def _give_turns(self, now: float) -> None:
        while self._waiting and self._unprepared <= self._limits.preprocess_threads and self._has_room():
            self._give_turn(self._waiting.popleft(), now)
        if len(self.lanes) > 1 and self._waiting:
            self._call_in(now)

    def _has_room(self) -> bool:
        return self._turned < self._least_turned or self._turned_patches < self._most_turned_patches

    def _give_turn(self, job: Job, now: float) -> None:
        self._queued_share -= job.share
        self._turned += 1
        self._turned_patches += job.patches
        self._unprepared += 1
        self._unready.append(job)
        self._prepare_next(now)

    def _call_in(self, now: float) -> None:
        """A slow lane takes the newest of those who wait, if it is done sooner than in its turn on the others."""
        for lane in self.lanes:
            if not self._waiting or self._unprepared > self._limits.preprocess_threads:
                return
            if lane in self._called_in:
                continue
            job = self._waiting[-1]
            backlog_ms, own_ms = lane.backlog_ms(), lane.run.ms(job.patches, job.pairs)
            if backlog_ms > own_ms or self._soonest(job) is lane:
                continue
            others = [other for other in self.lanes if other is not lane]
            ahead = self._queued_share + self._turned_patches
            if backlog_ms + own_ms < self._wait_ms(ahead, self._jobs, others):
                self._waiting.pop()
                self._called_in.add(lane)
                job.called_in = lane
                self._give_turn(job, now)

    def _prepare_next(self, now: float) -> None:
        if self._threads and self._unready:
            self._threads -= 1
            job = self._unready.popleft()
            ends = now + self._prepare.ms(job.picture)
            self._later(ends, partial(self._prepared, job, ends))

    def _prepared(self, job: Job, now: float) -> None:
        self._threads += 1
        self._unprepared -= 1
        self._prepare_next(now)
        self._give_turns(now)
        lane = job.called_in or self._soonest(job)
        self._called_in.discard(lane)
        lane.push(job)
        self._run_next(lane, now)

    def _soonest(self, job: Job) -> Lane:
        if len(self.lanes) == 1:
            return self.lanes[0]
        return min(self.lanes, key=lambda lane: lane.backlog_ms() + lane.run.ms(job.patches, job.pairs))

    def _run_next(self, lane: Lane, now: float) -> None:
        while (begun := lane.begin(now)) is not None:
            run, late, took_ms = begun
            for job in late:
                self._end(job, None, now)
            if not run:
                continue
            ends = now + took_ms
            for number, job in enumerate(run):
                ends += lane.publish_ms(job)
                last = number == len(run) - 1
                self._later(ends, partial(self._ran, lane, run, job, ends, last))
            lane.busy_ms += ends - now

    def _ran(self, lane: Lane, run: Sequence[Job], job: Job, now: float, last: bool) -> None:
        if last:  # before anybody hears of it, the lane has begun its next run
            lane.end(run)
            self._run_next(lane, now)
        self._end(job, now, now)

    def _end(self, job: Job, at: float | None, now: float) -> None:
        self._jobs -= 1
        self._patches -= job.patches
        self._pairs -= job.pairs
        self._turned -= 1
        self._turned_patches -= job.patches
        job.done(at)
        self._give_turns(now)
