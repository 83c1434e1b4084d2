"""The engine's status as Prometheus metrics, taken anew at every scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from platform import python_version

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from sidecar import __version__
from sidecar.engine.status import CostCurve, EngineStatus, LaneStatus, StoreStatus
from sidecar.monitoring.log_writer import dropped

# One picture of 448×448: what the predicted cost is quoted for.
PREDICTED_PATCHES = 1024


def predicted_ms(cost: CostCurve, patches: int) -> float:
    """What a run of one image of so many patches should take, in milliseconds (see `CostCurve`)."""
    return cost.fixed_ms + cost.per_patch_ms * patches + cost.per_pair_ms * patches**2


class EngineCollector(Collector):
    """`status` is called once a scrape, on the scrape's thread, and gives None while there is no engine yet."""

    def __init__(self, status: Callable[[], EngineStatus | None]) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        yield _info("build", "The server's version.", {"version": __version__, "python": python_version()})
        status = self._status()
        if status is None:
            return
        yield _info("model", "Fingerprint of the model that is served.", {"fingerprint": status.fingerprint})
        yield from _queue(status)
        yield from _lanes(status.lanes)
        if status.store is not None:
            yield from _store(status.store)


class LogCollector(Collector):
    """What the log has lost."""

    def collect(self) -> Iterable[Metric]:
        help_text = "Log lines that were not written: the reader was too slow, or a library wrote too many."
        family = CounterMetricFamily("epd_encoder_log_lines_dropped", help_text, labels=["reason"])
        for reason, lines in dropped().items():
            family.add_metric([reason], lines)
        yield family


def _queue(status: EngineStatus) -> Iterator[Metric]:
    yield _gauge("queue_items", "Items under way, from admission to answer.", status.waiting_items)
    yield _gauge("queue_items_limit", "Items that may be under way before new ones are refused.", status.max_items)
    yield _gauge("queue_patches", "Patches of the items that wait.", status.waiting_patches)
    yield _gauge(
        "queue_patches_limit", "Patches that may be under way before new ones are refused.", status.max_patches
    )
    yield _gauge("clients_waiting", "Clients with items that wait.", status.clients)
    yield _gauge("preprocessing_items", "Items being decoded or cut into patches.", status.preprocessing)


def _lanes(lanes: tuple[LaneStatus, ...]) -> Iterator[Metric]:
    names = {lane.name: {"runtime": lane.runtime, "device": lane.device, "precision": lane.precision} for lane in lanes}
    info = InfoMetricFamily("epd_encoder_lane", "What a lane runs on, as its runtime reports it.", labels=["lane"])
    for name, values in names.items():
        info.add_metric([name], values)
    yield info
    columns: tuple[tuple[str, str, Callable[[LaneStatus], float]], ...] = (
        (
            "lane_in_service",
            "1 while a lane takes work, 0 while its runtime fails, does not return, or fails its self-test.",
            lambda x: x.state == "serving",
        ),
        ("lane_streams", "Runs that a lane may have under way at once.", lambda x: x.streams),
        ("lane_waiting_items", "Items in a lane's queue.", lambda x: x.waiting_items),
        ("lane_waiting_patches", "Patches in a lane's queue.", lambda x: x.waiting_patches),
        ("lane_running_items", "Items in a lane's runs under way.", lambda x: x.running_items),
        (
            "lane_backlog_seconds",
            "Predicted time until a lane has run all that it holds.",
            lambda x: x.backlog_ms / 1e3,
        ),
        ("lane_busy_ratio", "Share of the last seconds that a lane spent running.", lambda x: x.busy),
        (
            "lane_predicted_seconds",
            f"Predicted time of a run of one image of {PREDICTED_PATCHES} patches.",
            lambda x: predicted_ms(x.cost, PREDICTED_PATCHES) / 1e3,
        ),
    )
    for name, help_text, value in columns:
        family = GaugeMetricFamily(f"epd_encoder_{name}", help_text, labels=["lane"])
        for lane in lanes:
            family.add_metric([lane.name], float(value(lane)))
        yield family


def _store(store: StoreStatus) -> Iterator[Metric]:
    yield _gauge("store_bytes", "Bytes of the embeddings in the store.", store.used_bytes)
    yield _gauge("store_capacity_bytes", "Bytes that the store may hold.", store.capacity_bytes)
    yield _gauge("store_entries", "Embeddings in the store.", store.entries)
    yield _gauge("store_leases", "Leases that are held.", store.leases)
    yield _counter("store_evictions", "Embeddings removed to make room.", store.evictions)
    yield _counter("store_unkept", "Embeddings that found no room and were sent inline.", store.unkept)
    yield _counter("store_expired_leases", "Leases that nobody released in time.", store.expired)


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"epd_encoder_{name}", help_text, value=value)


def _counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(f"epd_encoder_{name}", help_text, value=value)


def _info(name: str, help_text: str, values: dict[str, str]) -> Metric:
    return InfoMetricFamily(f"epd_encoder_{name}", help_text, value=values)
