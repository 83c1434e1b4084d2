"""One item's way round a fleet: how much time it has, who has refused it and what they said, and when to go round again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from google.rpc import error_details_pb2

from sidecar.replies import ClientError, Embedding, EncodeError, RequestTooLargeError

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.05, 1.0
# Those who were told the same time do not all come back in one moment.
_SPREAD = 0.2
# Something broke. Another sidecar may do better, but what breaks each of them must not go round for ever.
_FAULTS = {"INTERNAL", "UNKNOWN", "DATA_LOSS", "ABORTED"}
_MOST_FAULTS = 3
_PASSING = {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", *_FAULTS}
# UNAVAILABLE, but of the picture's own server, whichever sidecar asks it.
_UNREACHABLE_URL = "URL_UNREACHABLE"


class Errand:
    """
    Attributes:
        check: raises a ClientError for an embedding that will not do.
        lost: the last ask ended with its connection, or found none: no sidecar has refused.
    """

    def __init__(
        self,
        timeout_s: float,
        unreachable_s: float | None,
        clock: Callable[[], float],
        check: Callable[[Embedding], None] = lambda embedding: None,
    ) -> None:
        self.check = check
        self.lost = False
        self._clock = clock
        self._ends = clock() + timeout_s
        self._unreachable_s = timeout_s if unreachable_s is None else unreachable_s
        self._unreachable_since: float | None = None
        self._faults = 0
        self._untrusted: set[str] = set()
        self._pause_s = _FIRST_PAUSE_S
        self.begin_round()

    def left_s(self) -> float:
        return max(0.001, self._ends - self._clock())

    def begin_round(self) -> None:
        self._round_began = self._clock()
        self._refused_by: set[str] = set()
        self._again = False
        self._failures: list[ClientError] = []
        self._back_in: list[float] = []

    def note(self, failure: ClientError, server: str = "") -> None:
        """An ask has failed; `server` says so itself, where it is known.

        Raises:
            ClientError: the failure, if the item is at fault or has broken too much.
        """
        reasons = {detail.reason for detail in _details(failure) if isinstance(detail, error_details_pb2.ErrorInfo)}
        code = failure.code if isinstance(failure, EncodeError) else "DATA_LOSS"
        if code not in _PASSING or isinstance(failure, RequestTooLargeError):
            raise failure
        is_untrusted = bool(server) and not isinstance(failure, EncodeError)
        if is_untrusted and server in self._untrusted:
            self._again = True  # picked again, for its rate: no new fault as long as another may take the item
        elif code in _FAULTS or _UNREACHABLE_URL in reasons:
            self._count_fault(failure)
        if is_untrusted:
            self._untrusted.add(server)
        self.lost = code == "UNAVAILABLE" and not _details(failure)
        self._failures.append(failure)
        if server:
            self._refused_by.add(server)
        if isinstance(failure, EncodeError) and failure.retry_delay_s is not None:
            self.may_come_back_in(failure.retry_delay_s)

    def may_come_back_in(self, seconds: float) -> None:
        """A sidecar wants to be asked again so soon."""
        self._back_in.append(seconds)

    def was_refused_by(self, server: str) -> bool:
        """In this round, or with an answer that could not be trusted in any."""
        return server in self._refused_by or server in self._untrusted

    def _count_fault(self, failure: ClientError) -> None:
        self._faults += 1
        if self._faults >= _MOST_FAULTS:
            raise failure

    async def wait(self) -> None:
        """All have refused: sleep until one wants to be asked again.

        Raises:
            ClientError: what was said, if the time is over by then.
        """
        if (
            self._again
            and not self._back_in
            and not any(isinstance(failure, EncodeError) for failure in self._failures)
        ):
            self._count_fault(self._failures[-1])
        codes = {failure.code if isinstance(failure, EncodeError) else "" for failure in self._failures}
        said = [failure for failure in self._failures if _details(failure)] or self._failures
        # Whoever says "at once" and refuses again is not to be asked a thousand times a second.
        wait_s = max(self._pause_s, min(self._back_in, default=0.0)) * random.uniform(1, 1 + _SPREAD)
        self._pause_s = min(2 * self._pause_s, _LAST_PAUSE_S)
        last = self._ends
        if codes != {"UNAVAILABLE"}:
            self._unreachable_since = None
        elif self._unreachable_since is None:
            self._unreachable_since = self._round_began
        if self._unreachable_since is not None:
            last = min(last, self._unreachable_since + self._unreachable_s)
        # Who says that the time will not do will not do with less.
        hopeless = codes == {"DEADLINE_EXCEEDED"} and all(map(_details, self._failures))
        if hopeless or self._clock() + wait_s >= last:
            raise said[-1]
        await asyncio.sleep(wait_s)


def _details(failure: ClientError) -> tuple[object, ...]:
    return failure.details if isinstance(failure, EncodeError) else ()
