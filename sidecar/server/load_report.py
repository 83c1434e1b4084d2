"""What the trailing metadata of every reply tell clients of many servers: who answers, and a load report, from which gRPC's
weighted_round_robin balances them.

Format: xds.data.orca.v3.OrcaLoadReport (https://github.com/cncf/xds/blob/main/xds/data/orca/v3/orca_load_report.proto), of which
`rps_fractional` (6) and `application_utilization` (9) are read: a server's weight is their quotient, which is what it could do.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Sequence

from sidecar.engine.cost import Work
from sidecar.engine.lane import Lane
from sidecar.vision.grid import Grid

METADATA_KEY = "endpoint-load-metrics-bin"
SERVER_KEY = "epd-server"

# One life of one process, whatever addresses it is reached at.
_SERVER = secrets.token_hex(8)

# Requests are of very unequal size, so rates are counted in patches, as many as a picture of 448×448 pixels has for one.
_PICTURE = Work.of([Grid(1, 32, 32)])
# What was measured in so many runs; the cost model stands in until there are a few.
_LATEST_RUNS, _FEW_RUNS = 32, 4
# A server that does nothing would have no weight at all.
_LEAST_UTILISATION = 0.01
_FIXED64 = 1
_RPS_FRACTIONAL, _APPLICATION_UTILISATION = 6, 9


def trailing_metadata(lanes: Sequence[Lane]) -> tuple[tuple[str, str | bytes], ...]:
    return ((METADATA_KEY, load_report(lanes)), (SERVER_KEY, _SERVER))


def load_report(lanes: Sequence[Lane]) -> bytes:
    """What the lanes in service do now, in pictures a second, and which share of what they could do that is."""
    serving = [lane for lane in lanes if not lane.out_for_s]
    if not serving:
        return b""
    rates = [_rate(lane) for lane in serving]
    busy = sum(rate * lane.busy() for rate, lane in zip(rates, serving, strict=True))
    utilisation = max(_LEAST_UTILISATION, busy / sum(rates))
    return _double(_RPS_FRACTIONAL, sum(rates) * utilisation) + _double(_APPLICATION_UTILISATION, utilisation)


def _rate(lane: Lane) -> float:
    """Pictures a second while it is busy, with items of the sizes that come and in runs as they are shared now.

    The cost model alone will not do: it is fitted to all sizes from the warm-up on, and may be off where the traffic is.
    """
    status = lane.status()
    latest = status.cost.samples[-min(status.runs, _LATEST_RUNS) :] if status.runs >= _FEW_RUNS else ()
    if not latest:
        return 1e3 / max(1e-3, lane.bulk_ms(_PICTURE, 1))
    pictures = sum(patches for patches, _ in latest) / _PICTURE.patches
    ms = sum(ms for _, ms in latest)
    return status.streams * pictures * 1e3 / max(1e-3, ms)


def _double(number: int, value: float) -> bytes:
    return struct.pack("<Bd", number << 3 | _FIXED64, value)
