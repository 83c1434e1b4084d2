"""What Prometheus gets to see, and what the status page is told."""

from __future__ import annotations

import asyncio
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from engine_fakes import engine_status, lane_status
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sidecar.engine.observer import StageTimes
from sidecar.engine.status import EngineStatus
from sidecar.monitoring.metrics import OTHER, Metrics
from sidecar.monitoring.overview import overview
from sidecar.monitoring.recent import WINDOW_S, Recent
from sidecar.monitoring.snapshots import LoopSnapshot

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
TIMES = StageTimes(decode_ms=10.0, preprocess_ms=5.0, queue_ms=20.0, run_ms=400.0)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def full(metrics: Metrics) -> Metrics:
    """Every metric has a value."""
    metrics.watch(engine_status)
    metrics.run("openvino-cpu", 2, 2048, 800.0)
    metrics.run_failed("openvino-cpu")
    metrics.encoded("openvino-cpu", TIMES)
    metrics.answered("embedding", "encoded")
    metrics.answered("ITEM_TOO_LARGE", "encoded")
    metrics.refused("OVERLOADED")
    metrics.request("Encode", "OK", 0.5)
    return metrics


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"epd_encoder_{name}", labels)


def test_docs_and_metrics_agree(full: Metrics) -> None:
    served = {}
    for family in full.registry.collect():
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = {label for found in family.samples for label in found.labels} - {"le"}
        kind = "gauge" if family.type == "info" else family.type
        served[family.name + suffix] = (kind, frozenset(labels))
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\w, ]*)\|", DOCS.read_text(), re.MULTILINE)
    documented = {name: (kind, frozenset(re.findall(r"\w+", labels))) for name, kind, labels in rows}
    assert documented == served


def test_alerts_name_metrics_that_exist(full: Metrics) -> None:
    text = generate_latest(full.registry).decode()
    names = {found.name for family in text_string_to_metric_families(text) for found in family.samples}
    used = set(re.findall(r"(?:epd_encoder|process)_[a-z_]+[a-z]", DOCS.read_text().split("## What to alert on")[1]))
    assert used, "the list is gone"
    assert used <= names


def test_names_and_units_follow_prometheus_conventions(full: Metrics) -> None:
    for family in full.registry.collect():
        assert re.fullmatch(r"(epd_encoder|process)_[a-z_]+", family.name)
        assert not family.name.endswith(("_ms", "_mb")), "base units are seconds and bytes"
        assert family.documentation.endswith(".")


def test_stages_are_in_seconds_and_only_those_that_were_needed(metrics: Metrics) -> None:
    metrics.encoded("openvino-cpu", TIMES)
    metrics.encoded("openvino-cpu", TIMES)
    assert sample(metrics, "stage_seconds_sum", stage="run", lane="openvino-cpu") == pytest.approx(0.8)
    assert sample(metrics, "stage_seconds_count", stage="run", lane="openvino-cpu") == 2
    assert sample(metrics, "stage_seconds_count", stage="publish", lane="openvino-cpu") is None


def test_items_are_counted_by_outcome_and_source(metrics: Metrics) -> None:
    for source in ("encoded", "cache", "cache", "coalesced"):
        metrics.answered("embedding", source)
    metrics.answered("OVERLOADED", "encoded")
    metrics.refused("OVERLOADED")
    assert sample(metrics, "items_total", outcome="embedding", source="cache") == 2
    assert sample(metrics, "items_total", outcome="OVERLOADED", source="none") == 1
    assert sample(metrics, "refusals_total", reason="OVERLOADED", scope="item") == 1
    assert sample(metrics, "refusals_total", reason="OVERLOADED", scope="request") == 1
    assert metrics.refusals_by_reason() == {"OVERLOADED": 2}
    assert metrics.items_by_outcome() == {"embedding": 4, "OVERLOADED": 1}


def test_runs_lookups_and_calls_are_counted(metrics: Metrics) -> None:
    assert sample(metrics, "cache_lookups_total", result="hit") == 0, "rates need a zero to start from"
    metrics.hit()
    metrics.miss()
    metrics.coalesced()
    metrics.run("openvino-cpu", 3, 3072, 900.0)
    metrics.run_failed("openvino-cpu")
    metrics.request("Fetch", "NOT_FOUND", 0.002)
    for result in ("hit", "miss", "coalesced"):
        assert sample(metrics, "cache_lookups_total", result=result) == 1
    assert sample(metrics, "lane_runs_total", lane="openvino-cpu") == 1
    assert sample(metrics, "lane_failures_total", lane="openvino-cpu") == 1
    assert sample(metrics, "run_patches_sum", lane="openvino-cpu") == 3072
    assert sample(metrics, "run_items_sum", lane="openvino-cpu") == 3
    assert sample(metrics, "requests_total", method="Fetch", code="NOT_FOUND") == 1
    assert sample(metrics, "request_seconds_sum", method="Fetch") == pytest.approx(0.002)


def test_gauges_are_of_the_moment_of_the_scrape(metrics: Metrics) -> None:
    status = engine_status()
    metrics.watch(lambda: status)
    assert sample(metrics, "queue_patches") == 5120
    status = engine_status(waiting_patches=1, lanes=(lane_status(), lane_status("onnx-cpu", state="out")))
    assert sample(metrics, "queue_patches") == 1
    assert sample(metrics, "queue_patches_limit") == 65536
    assert sample(metrics, "lane_in_service", lane="openvino-cpu") == 1
    assert sample(metrics, "lane_in_service", lane="onnx-cpu") == 0
    assert sample(metrics, "lane_backlog_seconds", lane="openvino-cpu") == 2.5
    predicted = sample(metrics, "lane_predicted_seconds", lane="openvino-cpu")
    assert predicted == pytest.approx((20 + 0.4 * 1024 + 1e-5 * 1024**2) / 1e3)
    assert sample(metrics, "store_bytes") == 1e9
    assert sample(metrics, "store_expired_leases_total") == 1
    assert sample(metrics, "model_info", fingerprint="sha256:5f0c9a") == 1


def test_a_server_that_still_loads_can_be_scraped(metrics: Metrics) -> None:
    text = generate_latest(metrics.registry).decode()
    assert "epd_encoder_build_info" in text
    assert "epd_encoder_queue_items" not in text


def test_a_server_without_a_store_has_no_store_metrics(metrics: Metrics) -> None:
    metrics.watch(lambda: engine_status(store=None))
    assert "epd_encoder_store" not in generate_latest(metrics.registry).decode()


def test_reasons_that_never_end_do_not_make_series_without_end(metrics: Metrics) -> None:
    for number in range(1000):
        metrics.answered(f"REASON_{number}", "encoded")
        metrics.request(f"Method{number}", f"CODE_{number}", 0.1)
    assert len(metrics.items_by_outcome()) < 60
    assert len(metrics.requests_by_code()) < 60
    assert metrics.items_by_outcome()[OTHER] > 900, "all are counted"


def test_two_servers_in_one_process_count_apart(metrics: Metrics) -> None:
    other = Metrics()
    metrics.hit()
    assert sample(other, "cache_lookups_total", result="hit") == 0


def test_quantiles_are_of_the_last_minute() -> None:
    now = 0.0
    recent = Recent(clock=lambda: now)
    recent.encoded(StageTimes(run_ms=9000.0))
    now = WINDOW_S + 1
    for run_ms in range(1, 101):
        recent.encoded(StageTimes(run_ms=float(run_ms)))
    stages = recent.stages()
    assert set(stages) == {"run"}
    assert (stages["run"].items, stages["run"].p50_ms, stages["run"].p95_ms) == (100, 50.0, 95.0)
    now = 3 * WINDOW_S
    assert recent.stages() == {}


def test_one_item_is_its_own_median() -> None:
    recent = Recent()
    recent.encoded(StageTimes(run_ms=7.0))
    assert (recent.stages()["run"].p50_ms, recent.stages()["run"].p95_ms) == (7.0, 7.0)


def test_the_last_twenty_errors_are_kept_and_repeats_are_counted() -> None:
    recent = Recent()
    for number in range(30):
        recent.error("LANE_FAULT", f"failure {number}")
    for _ in range(1000):
        recent.error("INTERNAL", "again")
    errors = recent.errors()
    assert len(errors) == 20
    assert (errors[0].reason, errors[0].count) == ("INTERNAL", 1000)
    assert [error.message for error in errors[1:3]] == ["failure 29", "failure 28"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", errors[0].time)


def test_an_error_of_any_length_takes_little_room() -> None:
    recent = Recent()
    recent.error("INTERNAL", "x" * 1_000_000)
    assert len(recent.errors()[0].message) == 500


def test_the_loops_lag_shows_while_it_is_stuck(metrics: Metrics) -> None:
    async def stuck() -> tuple[float | None, float | None]:
        watching = asyncio.create_task(metrics.watch_loop(period_s=0.001))
        while not sample(metrics, "event_loop_lag_seconds_count"):
            await asyncio.sleep(0)
        time.sleep(0.1)  # noqa: ASYNC251  # what a stuck loop is
        during = metrics.loop_lag_ms()
        counted = sample(metrics, "event_loop_lag_seconds_count")
        while sample(metrics, "event_loop_lag_seconds_count") == counted:
            await asyncio.sleep(0)
        watching.cancel()
        return during, sample(metrics, "event_loop_lag_seconds_sum")

    assert metrics.loop_lag_ms() is None
    during_ms, lag_s = asyncio.run(stuck())
    assert during_ms is not None and during_ms >= 90
    assert lag_s is not None and lag_s >= 0.09


def test_other_threads_get_the_status_from_the_loop() -> None:
    status = engine_status()

    async def asked_from_a_thread() -> int:
        nonlocal status
        snapshot = LoopSnapshot(asyncio.get_running_loop(), lambda: status, patience_s=60)
        status = engine_status(waiting_items=42)
        return (await asyncio.to_thread(snapshot)).waiting_items

    assert asyncio.run(asked_from_a_thread()) == 42


def test_a_stuck_or_ended_loop_leaves_the_last_status() -> None:
    async def asked_while_stuck(threads: ThreadPoolExecutor) -> LoopSnapshot:
        snapshot = LoopSnapshot(asyncio.get_running_loop(), engine_status, patience_s=0.01)
        assert threads.submit(snapshot).result(60) == engine_status(), "this blocks the loop, and the thread returns"
        return snapshot

    with ThreadPoolExecutor(1) as threads:
        snapshot = asyncio.run(asked_while_stuck(threads))
    assert snapshot() == engine_status()


@pytest.mark.parametrize("fault", [RuntimeError, TimeoutError, KeyError])
def test_a_fault_of_the_engine_is_not_hidden_behind_an_old_status(fault: type[Exception]) -> None:
    broken = False

    def take() -> EngineStatus:
        if broken:
            raise fault("the engine's own")
        return engine_status()

    async def asked() -> None:
        nonlocal broken
        snapshot = LoopSnapshot(asyncio.get_running_loop(), take, patience_s=60)
        broken = True
        await asyncio.to_thread(snapshot)

    with pytest.raises(fault, match="the engine's own"):
        asyncio.run(asked())


def test_figures_that_are_not_finite_make_valid_json(metrics: Metrics) -> None:
    cost = replace(lane_status().cost, fixed_ms=float("nan"), samples=((1024, float("inf")),))
    metrics.watch(lambda: engine_status(lanes=(lane_status(cost=cost),)))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    document = json.loads(overview(metrics, healthy=True), parse_constant=refuse)
    assert document["engine"]["lanes"][0]["cost"]["fixed_ms"] is None
    assert document["engine"]["lanes"][0]["cost"]["samples"] == [[1024, None]]


def test_the_hit_rate_is_the_share_that_needed_no_run(metrics: Metrics) -> None:
    metrics.watch(lambda: engine_status(hits=3, coalesced=1, misses=4))
    assert json.loads(overview(metrics, healthy=True))["engine"]["hit_rate"] == 0.5
    metrics.watch(lambda: engine_status(hits=0, coalesced=0, misses=0))
    assert json.loads(overview(metrics, healthy=True))["engine"]["hit_rate"] is None
