"""What the status page shows, as one JSON document: the engine's status, the last minute, and the totals since the start."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from sidecar import __version__
from sidecar.engine.status import EngineStatus
from sidecar.monitoring.metrics import EMBEDDING, Metrics
from sidecar.monitoring.recent import WINDOW_S


def overview(metrics: Metrics, *, healthy: bool) -> bytes:
    """The document, as UTF-8. Figures that are not finite are null: JSON has no word for them."""
    status = metrics.status()
    document = {
        "version": __version__,
        "healthy": healthy,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "uptime_seconds": time.monotonic() - metrics.started,
        "event_loop_lag_ms": metrics.loop_lag_ms(),
        "engine": None if status is None else _engine(status),
        "embeddings": metrics.items_by_outcome().get(EMBEDDING, 0),
        "requests": metrics.requests_by_code(),
        "refusals": metrics.refusals_by_reason(),
        "window_seconds": WINDOW_S,
        "stages": {stage: asdict(summary) for stage, summary in metrics.recent.stages().items()},
        "errors": [asdict(error) for error in metrics.recent.errors()],
    }
    return json.dumps(_finite(document), allow_nan=False, separators=(",", ":")).encode()


def _engine(status: EngineStatus) -> dict[str, Any]:
    """EngineStatus as it is, and the share of items that needed no run of their own (null before the first)."""
    spared = status.hits + status.coalesced
    asked = spared + status.misses
    return {**asdict(status), "hit_rate": spared / asked if asked else None}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
