"""What the connector counts, as vLLM's connector stats: in its log and on its /metrics."""

from __future__ import annotations

from collections import Counter as Sum
from statistics import median
from typing import Any

from prometheus_client import Counter, Histogram
from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorPromMetrics, ECConnectorStats

from sidecar.integrations.vllm.tally import OUTCOMES

_NOTHING: dict[str, Any] = {"items": {}, "errors": {}, "seconds": [], "bytes": 0}
_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class SidecarStats(ECConnectorStats):
    """`data` is what `Tally.take` gives."""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: ECConnectorStats) -> SidecarStats:
        if other.data:
            ours, theirs = self.data or _NOTHING, other.data
            self.data = {
                "items": dict(Sum(ours["items"]) + Sum(theirs["items"])),
                "errors": dict(Sum(ours["errors"]) + Sum(theirs["errors"])),
                "seconds": [*ours["seconds"], *theirs["seconds"]],
                "bytes": ours["bytes"] + theirs["bytes"],
            }
        return self

    def reduce(self) -> dict[str, int | float]:
        if not self.data:
            return {}
        line: dict[str, int | float] = {f"embeddings {name}": self.data["items"].get(name, 0) for name in OUTCOMES}
        if seconds := self.data["seconds"]:
            line["median wait (ms)"] = round(median(seconds) * 1e3, 1)
            line["longest wait (ms)"] = round(max(seconds) * 1e3, 1)
        line["MB"] = round(self.data["bytes"] / 1e6, 1)
        return line


class SidecarPromMetrics(ECConnectorPromMetrics):
    """vllm:ec_sidecar_…, with vLLM's own labels."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, histogram = metric_types[Counter], metric_types[Histogram]
        self._items = counter(
            name="vllm:ec_sidecar_items",
            documentation="Images and videos: linked, sent or fetched from a sidecar, encoded_locally, or failed.",
            labelnames=[*labelnames, "outcome"],
        )
        self._errors = counter(
            name="vllm:ec_sidecar_errors",
            documentation="Asks that a sidecar did not answer with the right embedding, by reason; most are tried again.",
            labelnames=[*labelnames, "reason"],
        )
        self._bytes = counter(
            name="vllm:ec_sidecar_bytes", documentation="Bytes of embeddings from sidecars.", labelnames=labelnames
        )
        self._seconds = histogram(
            name="vllm:ec_sidecar_wait_seconds",
            documentation="From the first ask for an embedding to its checked file.",
            buckets=_BUCKETS_S,
            labelnames=labelnames,
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        if not transfer_stats_data:
            return
        labels = self.per_engine_labelvalues[engine_idx]
        for outcome, count in transfer_stats_data["items"].items():
            self._items.labels(*labels, outcome).inc(count)
        for reason, count in transfer_stats_data["errors"].items():
            self._errors.labels(*labels, reason).inc(count)
        self._bytes.labels(*labels).inc(transfer_stats_data["bytes"])
        for seconds in transfer_stats_data["seconds"]:
            self._seconds.labels(*labels).observe(seconds)
