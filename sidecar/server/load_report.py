"""The load report in the trailing metadata of every reply, from which gRPC's weighted_round_robin balances servers.

Format: xds.data.orca.v3.OrcaLoadReport (https://github.com/cncf/xds/blob/main/xds/data/orca/v3/orca_load_report.proto), of which
`rps_fractional` (6) and `application_utilization` (9) are read: a server's weight is their quotient, which is what it could do.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from sidecar.engine.cost import Work
from sidecar.engine.lane import Lane
from sidecar.vision.grid import Grid

METADATA_KEY = "endpoint-load-metrics-bin"

# Requests are of very unequal size, so rates are counted in pictures of 448×448 pixels.
_PICTURE = Work.of([Grid(1, 32, 32)])
# A server that does nothing would have no weight at all.
_LEAST_UTILISATION = 0.01
_FIXED64 = 1
_RPS_FRACTIONAL, _APPLICATION_UTILISATION = 6, 9


def load_report(lanes: Sequence[Lane]) -> bytes:
    """What the lanes in service do now, in pictures a second, and which share of what they could do that is."""
    serving = [lane for lane in lanes if not lane.out_for_s]
    if not serving:
        return b""
    rates = [1e3 / max(1e-3, lane.bulk_ms(_PICTURE, 1)) for lane in serving]
    busy = sum(rate * lane.busy() for rate, lane in zip(rates, serving, strict=True))
    utilisation = max(_LEAST_UTILISATION, busy / sum(rates))
    return _double(_RPS_FRACTIONAL, sum(rates) * utilisation) + _double(_APPLICATION_UTILISATION, utilisation)


def _double(number: int, value: float) -> bytes:
    return struct.pack("<Bd", number << 3 | _FIXED64, value)
