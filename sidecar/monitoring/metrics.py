"""What the server counts, for Prometheus and for the status page. docs/metrics.md lists every metric.

Label values are few by construction: keys, client names and messages never become labels.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

from sidecar.engine.observer import Observer, StageTimes
from sidecar.engine.status import EngineStatus
from sidecar.monitoring.gauges import EngineCollector, LogCollector
from sidecar.monitoring.recent import STAGES, Recent

EMBEDDING = "embedding"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_PATCHES = (64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_ITEMS = (1, 2, 4, 8, 16, 32, 64)

# Reasons, methods and codes come from small tables; if one ever came from a caller, this is where it would stop.
_MOST_VALUES = 48
OTHER = "other"


class Metrics(Observer):
    """Counts in a registry of its own. Every method returns at once; the engine's and the server's are for the event loop."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.recent = Recent()
        self.started = time.monotonic()
        self._snapshot: Callable[[], EngineStatus | None] = lambda: None
        self._labels: dict[str, set[str]] = {}
        self._loop_period_s = 0.0
        self._loop_ticked: float | None = None
        self._loop_lag_s = 0.0
        self.ended = 0

        self._stage_seconds = self._histogram("stage_seconds", "Time of an item in a stage.", _SECONDS, "stage", "lane")
        self._run_patches = self._histogram("run_patches", "Patches in a run.", _PATCHES, "lane")
        self._run_items = self._histogram("run_items", "Items in a run.", _ITEMS, "lane")
        self._runs = self._counter("lane_runs", "Runs that a lane has finished.", "lane")
        self._lane_failures = self._counter("lane_failures", "Runs on which a lane's runtime failed.", "lane")
        self._lookups = self._counter("cache_lookups", "Items by what the cache had: hit, miss, coalesced.", "result")
        self._items = self._counter("items", "Items answered, by outcome and source.", "outcome", "source")
        self._refusals = self._counter(
            "refusals", "Items and whole requests that got an error for an answer.", "reason", "scope"
        )
        self._requests = self._counter("requests", "Calls that have ended.", "method", "code")
        self._arrived = self._counter(
            "calls_arrived",
            "Calls that have reached the server, also those that are reset before their request has arrived.",
            "service",
        )
        self._request_seconds = self._histogram("request_seconds", "Time of a call.", _SECONDS, "method")
        self._lag_seconds = self._histogram("event_loop_lag_seconds", "How late the event loop wakes.", _LAG_SECONDS)

        for result in ("hit", "miss", "coalesced"):
            self._lookups.labels(result)  # from the first scrape on, so that rates have a zero to start from
        for service in ("encoder", "health", "other"):
            self._arrived.labels(service)
        self.registry.register(EngineCollector(self.status))
        self.registry.register(LogCollector())
        ProcessCollector(registry=self.registry)

    def watch(self, snapshot: Callable[[], EngineStatus]) -> None:
        """The engine is there. `snapshot` is called from any thread: see `sidecar.monitoring.snapshots.LoopSnapshot`."""
        self._snapshot = snapshot

    def status(self) -> EngineStatus | None:
        """The engine now; None while the server is still loading. From any thread."""
        return self._snapshot()

    # What the engine tells.

    def run(self, lane: str, items: int, patches: int, run_ms: float) -> None:
        self._runs.labels(lane).inc()
        self._run_items.labels(lane).observe(items)
        self._run_patches.labels(lane).observe(patches)

    def run_failed(self, lane: str) -> None:
        self._lane_failures.labels(lane).inc()

    def encoded(self, lane: str, times: StageTimes) -> None:
        """A stage that the item did not need is not counted as one that took no time."""
        for stage in STAGES:
            if (stage_ms := getattr(times, f"{stage}_ms")) > 0:
                self._stage_seconds.labels(stage, lane).observe(stage_ms / 1e3)
        self.recent.encoded(times)

    def hit(self) -> None:
        self._lookups.labels("hit").inc()

    def miss(self) -> None:
        self._lookups.labels("miss").inc()

    def coalesced(self) -> None:
        self._lookups.labels("coalesced").inc()

    # What the server tells.

    def answered(self, outcome: str, source: str) -> None:
        """An item has been answered. `outcome`: `embedding`, or its error's reason. `source`: `encoded`, `cache` or
        `coalesced`; of no meaning for an error."""
        self._items.labels(self._known("outcome", outcome), source if outcome == EMBEDDING else "none").inc()
        if outcome != EMBEDDING:
            self._refusals.labels(self._known("reason", outcome), "item").inc()

    def refused(self, reason: str) -> None:
        """A request was turned away as a whole."""
        self._refusals.labels(self._known("reason", reason), "request").inc()

    def arrived(self, service: str) -> None:
        """A call has reached the server. `service`: encoder, health or other."""
        self._arrived.labels(service).inc()

    def request(self, method: str, code: str, seconds: float) -> None:
        """A call has ended. `method` without its service (`Encode`), `code` as gRPC names it (`OK`, `CANCELLED`)."""
        self.ended += 1
        method = self._known("method", method)
        self._requests.labels(method, self._known("code", code)).inc()
        self._request_seconds.labels(method).observe(seconds)

    def error(self, reason: str, message: str) -> None:
        """Something that a person who looks at the status page should see."""
        self.recent.error(reason, message)

    async def watch_loop(self, period_s: float = 0.25) -> None:
        """Measure the event loop's lag until cancelled."""
        loop = asyncio.get_running_loop()
        self._loop_period_s = period_s
        while True:
            asleep = loop.time()
            self._loop_ticked = time.monotonic()
            await asyncio.sleep(period_s)
            self._loop_lag_s = max(0.0, loop.time() - asleep - period_s)
            self._lag_seconds.observe(self._loop_lag_s)

    # What the status page shows.

    def loop_lag_ms(self) -> float | None:
        """The last measured lag, or the present one if the loop is stuck; None where nobody measures. From any thread."""
        if self._loop_ticked is None:
            return None
        silent_s = time.monotonic() - self._loop_ticked - self._loop_period_s
        return max(self._loop_lag_s, silent_s) * 1e3

    def items_by_outcome(self) -> dict[str, int]:
        return _totals(self._items, "outcome")

    def refusals_by_reason(self) -> dict[str, int]:
        return _totals(self._refusals, "reason")

    def requests_by_code(self) -> dict[str, int]:
        return _totals(self._requests, "code")

    def _known(self, label: str, value: str) -> str:
        known = self._labels.setdefault(label, set())
        if value not in known:
            if len(known) >= _MOST_VALUES:
                return OTHER
            known.add(value)
        return value

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"epd_encoder_{name}", help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"epd_encoder_{name}", help_text, labels, registry=self.registry, buckets=buckets)


def _totals(counter: Counter, label: str) -> dict[str, int]:
    """A counter's values, summed over its other labels, the largest first."""
    sums: dict[str, int] = {}
    for metric in counter.collect():
        for sample in metric.samples:
            if sample.name.endswith("_total"):
                sums[sample.labels[label]] = sums.get(sample.labels[label], 0) + int(sample.value)
    return dict(sorted(sums.items(), key=lambda entry: -entry[1]))
