"""One run on a runtime: its items together in, each item's rows out, into the store, and to whoever waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from sidecar.engine.status import LaneIdentity
from sidecar.engine.store import Draft
from sidecar.engine.ticket import Ran, Ticket
from sidecar.engine.watchdog import Run
from sidecar.errors import EncoderError, LaneFault
from sidecar.runtimes.base import Runtime
from sidecar.vision.dtypes import all_finite
from sidecar.vision.spec import TowerSpec


def carry_out(
    run: Run,
    tickets: list[Ticket],
    runtime: Runtime,
    tower: TowerSpec,
    identity: LaneIdentity,
    count: Callable[[Sequence[Ticket], float, float], None],
) -> dict[Ticket, EncoderError]:
    """Run some of a run's items, and answer those that come out well; none if the run is abandoned meanwhile.

    Args:
        identity: what is named as the encoder of what is stored.
        count: is told the items, and when the runtime began and ended, in `time.monotonic` seconds.

    Returns:
        The items whose rows are not finite, and what their callers are to be told.

    Raises:
        BaseException: whatever the runtime raises; no item has been answered then.
    """
    started = time.monotonic()
    # A caller may go in any moment, and take the patches along.
    wanted = [(ticket, given) for ticket in tickets if (given := ticket.patches) is not None]
    if not wanted:
        return {}
    tickets, patches = [ticket for ticket, _ in wanted], [given for _, given in wanted]
    grids = [ticket.grid for ticket in tickets]
    drafts: list[Draft] = []
    try:
        if len(tickets) == 1:
            # Straight into the store's file.
            drafts.append(tickets[0].draft())
            runtime.run(patches[0].values, grids, drafts[0].rows)
            rows = [drafts[0].rows]
        else:
            together = np.concatenate([item.values for item in patches])
            whole = runtime.encode(together, grids, tower)
            ends = np.cumsum([grid.tokens(tower) for grid in grids])
            rows = np.split(whole, ends[:-1])
        if run.abandoned:
            return {}
        ran_at = time.monotonic()
        count(tickets, started, ran_at)
        failed: dict[Ticket, EncoderError] = {}
        for number, ticket in enumerate(tickets):
            if not all_finite(rows[number], runtime.output_dtype):
                failed[ticket] = LaneFault(
                    "the embedding is not finite; the input or the artifact's precision is out of range"
                )
                continue
            if len(tickets) > 1:
                drafts.append(ticket.draft())
                drafts[-1].rows[:] = rows[number]
            _deliver(ticket, drafts[-1], identity, started, ran_at)
        return failed
    finally:
        for draft in drafts:
            draft.discard()


def _deliver(ticket: Ticket, draft: Draft, identity: LaneIdentity, started: float, ran_at: float) -> None:
    begun = time.monotonic()
    entry = draft.publish(identity)
    took_ms = (time.monotonic() - begun) * 1e3
    queue_ms = (started - ticket.queued_at) * 1e3
    ticket.answer(Ran(draft.rows, entry, queue_ms, (ran_at - started) * 1e3, took_ms))
