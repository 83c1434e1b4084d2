"""What the worker counts, on Dynamo's own /metrics. Requests and how long they took, Dynamo counts itself."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Gauge(NamedTuple):
    name: str
    help: str
    value: Callable[[], float]


class Tally:
    """
    Attributes:
        requests: by outcome: `answered`, `failed`, or `left` by their callers.
        failures: what they failed for: an `image`, the `sidecars`, a wrong `embedding`, no `room` to hand them over.
    """

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter({"answered": 0, "failed": 0, "left": 0})
        self.failures: Counter[str] = Counter({"image": 0, "sidecars": 0, "embedding": 0, "room": 0})
        self._within = [0] * (len(_BOUNDS_S) + 1)
        self._seconds = 0.0

    @property
    def images(self) -> int:
        """How many were encoded."""
        return sum(self._within)

    def image_took(self, seconds: float) -> None:
        """From the first ask to the checked embedding."""
        self._within[bisect_left(_BOUNDS_S, seconds)] += 1
        self._seconds += seconds

    def text(self, gauges: Iterable[Gauge] = ()) -> str:
        """Prometheus' text format, of `gauges` too."""
        lines = [
            *_head("epd_dynamo_requests_total", "counter", "Requests of prefill workers"),
            *(f'epd_dynamo_requests_total{{outcome="{name}"}} {count}' for name, count in self.requests.items()),
            *_head("epd_dynamo_failures_total", "counter", "What requests failed for"),
            *(f'epd_dynamo_failures_total{{fault="{name}"}} {count}' for name, count in self.failures.items()),
            *_head("epd_dynamo_image_seconds", "histogram", "From the first ask for an image to its checked embedding"),
        ]
        so_far = 0
        for bound, count in zip((*map(str, _BOUNDS_S), "+Inf"), self._within, strict=True):
            so_far += count
            lines.append(f'epd_dynamo_image_seconds_bucket{{le="{bound}"}} {so_far}')
        lines += [f"epd_dynamo_image_seconds_sum {self._seconds:.6f}", f"epd_dynamo_image_seconds_count {so_far}"]
        for gauge in gauges:
            lines += [*_head(gauge.name, "gauge", gauge.help), f"{gauge.name} {gauge.value()}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, what: str) -> tuple[str, str]:
    return f"# HELP {name} {what}", f"# TYPE {name} {kind}"
