"""One sidecar in virtual time, as sidecar.engine does it: what may enter, whose turn it is, the preprocessing threads, and which
lane. All for one client, so turns come in the order of arrival.

Times are milliseconds. Nothing here waits: whoever owns the clock is given what happens next, and calls back when it has.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from sidecar.plan.costs import Line
from sidecar.plan.lane import Job, Lane

Later = Callable[[float, Callable[[], None]], None]  # calls something at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Settings of a sidecar, under the names of its flags and with their defaults."""

    preprocess_threads: int = 2
    batch_patches: int = 8192
    max_queue_items: int = 2048
    max_queue_patches: int = 262_144


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
