"""A model's lanes together: which are in service, which finishes first, how long they all need for so much.

Lives on the event loop.
"""

from __future__ import annotations

from collections.abc import Sequence

from sidecar.engine.cost import Work
from sidecar.engine.lane import Lane
from sidecar.errors import NoLane

_UNKNOWN_WAIT_S = 1.0


class Lanes:
    """Asked for every order; keeps nothing but the lanes."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.all = tuple(lanes)

    @property
    def serving(self) -> list[Lane]:
        """Those that are in service."""
        return [lane for lane in self.all if not lane.out_for_s]

    def check_in_service(self) -> None:
        """Raises:
        NoLane: if none is.
        """
        if not self.serving:
            raise self._none()

    def soonest(self, work: Work, failed: Sequence[Lane] = ()) -> Lane:
        """The one that would have it done first, of those that have not failed on it.

        Raises:
            NoLane: if there is none.
        """
        serving = [lane for lane in self.serving if lane not in failed]
        if not serving:
            raise self._none()
        return min(serving, key=lambda lane: lane.backlog_ms() + lane.cost.ms(work))

    def own_ms(self, work: Work) -> float:
        """What a run of it takes where it is shortest."""
        return min((lane.cost.ms(work) for lane in self.serving), default=0.0)

    def wait_s(self, work: Work, items: int, lanes: Sequence[Lane] | None = None) -> float:
        """Until so much has run, on these lanes together or on all that are in service."""
        if not items or not work.patches:
            return 0.0
        serving = self.serving if lanes is None else lanes
        rate = sum(1.0 / max(1e-3, lane.bulk_ms(work, items)) for lane in serving)
        return 1e-3 / rate if rate else _UNKNOWN_WAIT_S

    def _none(self) -> NoLane:
        retry_after_s = min(lane.out_for_s for lane in self.all)
        return NoLane("every lane of this server is out of service and being tried again", retry_after_s)
