"""What happens in the engine, told as it happens. Whoever counts or traces it derives from `Observer`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Where one item's time went, in milliseconds; a stage that it did not need is 0.

    decode: bytes to RGB. preprocess: RGB to patches. queue: waiting for its turn, a preprocessing thread and the lane.
    run: the run that it was part of, which other items may have shared. publish: into the store.
    """

    decode_ms: float = 0.0
    preprocess_ms: float = 0.0
    queue_ms: float = 0.0
    run_ms: float = 0.0
    publish_ms: float = 0.0


class Observer:
    """Listens to nothing. Every method is called on the event loop's thread and must return at once."""

    def run(self, lane: str, items: int, patches: int, run_ms: float) -> None:
        """A lane has finished a run of so many items and patches."""

    def run_failed(self, lane: str) -> None:
        """A lane's runtime has failed on a run."""

    def encoded(self, lane: str, times: StageTimes) -> None:
        """An item has been encoded."""

    def hit(self) -> None:
        """An item was answered from the store."""

    def miss(self) -> None:
        """An item has to be encoded."""

    def coalesced(self) -> None:
        """An item was joined to an equal one that is being encoded."""
