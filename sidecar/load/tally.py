"""What became of every item. Knows neither pictures nor connections.

    sent = answered + refused + expired + cancelled + failed

`sent` is counted when items go out, the others one by one as answers come. An item that is lost, or answered twice, breaks
the sum.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from google.rpc.error_details_pb2 import ErrorInfo

from sidecar.client import ClientError, Embedding, EncodeError, ItemError, RequestTooLargeError
from sidecar.replies import Lane

PERCENTILES = (50, 90, 95, 99)


class Kind(StrEnum):
    ANSWERED = "answered"  # with an embedding
    REFUSED = "refused"  # the server says that it cannot take it now, or not in time
    EXPIRED = "expired"  # its deadline passed and nobody had answered
    CANCELLED = "cancelled"  # by us
    FAILED = "failed"  # anything else


@dataclass(frozen=True, slots=True)
class Cause:
    """Why there is no embedding: the status code's name, and the ErrorInfo's reason where the server gave one."""

    code: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.code} {self.reason}".rstrip()


class Place(NamedTuple):
    """Which item it was: the request's number, and its place in it."""

    request: int
    position: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """One item's end: when, in seconds since the run began, and how long after its arrival."""

    kind: Kind
    finished_s: float
    latency_ms: float
    place: Place | None = None
    cause: Cause | None = None
    patches: int = 0
    tokens: int = 0
    cached: bool = False
    coalesced: bool = False
    lane: Lane | None = None
    stage_ms: Sequence[tuple[str, float]] = ()


@dataclass(slots=True)
class Tally:
    """`began` is in seconds on the clock that times are given in; `late_ms` tells how late each request went out."""

    began: float
    requests: int = 0
    sent: int = 0
    retried: int = 0
    late_ms: list[float] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    first_messages: dict[Cause, str] = field(default_factory=dict)

    def note_sent(self, items: int, late_ms: float) -> None:
        self.requests += 1
        self.sent += items
        self.late_ms.append(late_ms)

    def note_embedding(self, embedding: Embedding, arrived: float, now: float, place: Place | None = None) -> None:
        times = dataclasses.asdict(embedding.times)
        outcome = Outcome(
            Kind.ANSWERED,
            now - self.began,
            (now - arrived) * 1e3,
            place,
            patches=embedding.grid.patches,
            tokens=embedding.tokens,
            cached=embedding.cached,
            coalesced=embedding.coalesced,
            lane=embedding.lane,
            stage_ms=[(name.removesuffix("_ms"), value) for name, value in times.items()],
        )
        self.outcomes.append(outcome)

    def note_error(
        self, error: ItemError | ClientError, arrived: float, now: float, place: Place | None = None
    ) -> None:
        cause = cause_of(error)
        self.first_messages.setdefault(
            cause, error.message if isinstance(error, ItemError | EncodeError) else str(error)
        )
        kind = Kind.FAILED if isinstance(error, RequestTooLargeError) else kind_of(cause)
        self.outcomes.append(Outcome(kind, now - self.began, (now - arrived) * 1e3, place, cause))

    def note_cancelled(self, arrived: float, now: float, place: Place | None = None) -> None:
        self.outcomes.append(Outcome(Kind.CANCELLED, now - self.began, (now - arrived) * 1e3, place))

    def of(self, kind: Kind) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.kind is kind]

    def counts(self) -> dict[Kind, int]:
        counted = Counter(outcome.kind for outcome in self.outcomes)
        return {kind: counted[kind] for kind in Kind}

    def causes(self, kind: Kind) -> list[tuple[Cause, int]]:
        """The most frequent first."""
        return Counter(outcome.cause for outcome in self.of(kind) if outcome.cause is not None).most_common()

    @property
    def missing(self) -> int:
        """Items that were sent and have no end; below 0: that have more ends than one."""
        return self.sent - len(self.outcomes)

    @property
    def elapsed_s(self) -> float:
        """From the beginning to the last item's end."""
        return max((outcome.finished_s for outcome in self.outcomes), default=0.0)


def cause_of(error: ItemError | ClientError) -> Cause:
    if not isinstance(error, ItemError | EncodeError):
        return Cause("BAD_REPLY")
    reasons = [detail.reason for detail in error.details if isinstance(detail, ErrorInfo)]
    return Cause(error.code, reasons[0] if reasons else "")


def kind_of(cause: Cause) -> Kind:
    """A refusal has its reason with it: without one UNAVAILABLE is a connection that was lost, and the item with it."""
    if cause.code == "DEADLINE_EXCEEDED":
        return Kind.REFUSED if cause.reason else Kind.EXPIRED
    if cause.code == "RESOURCE_EXHAUSTED" or (cause.code == "UNAVAILABLE" and cause.reason):
        return Kind.REFUSED
    return Kind.FAILED


def percentile(values: Iterable[float], percent: float) -> float:
    """The nearest rank: a value that did occur, with at least `percent` of all at or below it. NaN of nothing."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1] if ordered else math.nan
