"""Whose trace a call belongs to, and the span that it becomes."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections.abc import AsyncIterator

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from sidecar.engine.observer import StageTimes
from sidecar.monitoring.tracing import Tracing, trace_id_of

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
TRACEPARENT = ("traceparent", f"00-{TRACE}-{PARENT}-01")
METHOD = "epd.encoder.v1.Encoder/Encode"


class Collector:
    """Tracing whose spans stay here."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(provider)

    @property
    def span(self) -> ReadableSpan:
        (span,) = self._exporter.get_finished_spans()
        return span


@pytest.fixture
def collector() -> Collector:
    return Collector()


def test_the_callers_trace_id_is_found() -> None:
    assert trace_id_of([("user-agent", "x"), TRACEPARENT]) == TRACE


@pytest.mark.parametrize(
    "value",
    [
        *("", "00", f"00-{TRACE}", f"00-{TRACE}-{PARENT}", f"00-{TRACE.upper()}-{PARENT}-01", f"00-{TRACE}-{PARENT}-1"),
        *(f"ff-{TRACE}-{PARENT}-01", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01"),
        *(f"00-{TRACE}-{PARENT}-01-more", f"00-{TRACE}-{PARENT}-01\n", f" 00-{TRACE}-{PARENT}-01", "x" * 100_000),
        f"00-{TRACE}-{PARENT}-01".encode(),
    ],
)
def test_a_traceparent_that_is_not_valid_is_ignored(value: str | bytes, collector: Collector) -> None:
    assert trace_id_of([("traceparent", value)]) == ""
    with collector.tracing.request([("traceparent", value)], METHOD) as span:
        assert span.trace_id != TRACE
    assert collector.span.parent is None


def test_two_traceparents_are_none() -> None:
    assert trace_id_of([TRACEPARENT, TRACEPARENT]) == ""


def test_later_versions_may_say_more() -> None:
    assert trace_id_of([("traceparent", f"01-{TRACE}-{PARENT}-01-what-later-versions-add")]) == TRACE


def test_without_opentelemetry_the_trace_id_is_known() -> None:
    tracing = Tracing.from_environment({})
    with tracing.request([TRACEPARENT], METHOD) as span:
        span.item(0, "embedding", StageTimes())
        span.failed(grpc.StatusCode.INTERNAL, "no")
    with tracing.request([], METHOD) as alone:
        pass
    tracing.close()
    assert (span.trace_id, alone.trace_id) == (TRACE, "")


def test_an_endpoint_without_the_extra_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with caplog.at_level(logging.WARNING):
        tracing = Tracing.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"})
    assert "pip install 'epd-encoder-sidecar[otel]'" in caplog.text
    with tracing.request([TRACEPARENT], METHOD) as span:
        assert span.trace_id == TRACE


def test_a_call_is_a_server_span_in_the_callers_trace(collector: Collector) -> None:
    with collector.tracing.request([TRACEPARENT, ("tracestate", "a=1"), ("tracestate", "b=2")], METHOD) as span:
        assert span.trace_id == TRACE
    made = collector.span
    assert made.name == METHOD
    assert made.kind is SpanKind.SERVER
    assert made.parent is not None and f"{made.parent.span_id:016x}" == PARENT
    assert made.context.trace_state.to_header() == "a=1,b=2"
    assert dict(made.attributes or {}) == {
        "rpc.system.name": "grpc",
        "rpc.method": METHOD,
        "rpc.response.status_code": "OK",
    }
    assert made.status.status_code is StatusCode.UNSET


def test_a_call_without_a_trace_starts_one(collector: Collector) -> None:
    with collector.tracing.request([], METHOD) as span:
        pass
    assert span.trace_id == f"{collector.span.context.trace_id:032x}"
    assert collector.span.parent is None


def test_a_caller_that_is_not_sampled_is_not_exported(collector: Collector) -> None:
    with collector.tracing.request([("traceparent", f"00-{TRACE}-{PARENT}-00")], METHOD) as span:
        assert span.trace_id == TRACE
    with pytest.raises(ValueError, match="not enough values"):
        _ = collector.span


def test_every_item_is_an_event_with_its_stage_times(collector: Collector) -> None:
    with collector.tracing.request([], METHOD) as span:
        span.item(0, "embedding", StageTimes(decode_ms=1.0, run_ms=400.0))
        span.item(1, "ITEM_TOO_LARGE", StageTimes())
    first, second = collector.span.events
    assert first.attributes == {
        "epd.item.index": 0,
        "epd.item.outcome": "embedding",
        "epd.item.decode_ms": 1.0,
        "epd.item.preprocess_ms": 0.0,
        "epd.item.queue_ms": 0.0,
        "epd.item.run_ms": 400.0,
        "epd.item.publish_ms": 0.0,
    }
    assert second.attributes is not None and second.attributes["epd.item.outcome"] == "ITEM_TOO_LARGE"


def test_a_servers_fault_is_an_error_and_a_callers_is_not() -> None:
    for code, status in (
        (grpc.StatusCode.INTERNAL, StatusCode.ERROR),
        (grpc.StatusCode.INVALID_ARGUMENT, StatusCode.UNSET),
    ):
        collector = Collector()
        with collector.tracing.request([], METHOD) as span:
            span.failed(code, "what was wrong")
        made = collector.span
        assert made.attributes is not None and made.attributes["rpc.response.status_code"] == code.name
        assert made.status.status_code is status


def test_the_first_failure_is_the_calls(collector: Collector) -> None:
    with pytest.raises(RuntimeError), collector.tracing.request([], METHOD) as span:
        span.failed(grpc.StatusCode.UNAVAILABLE, "no lane is in service")
        raise RuntimeError("the abort that follows")
    assert collector.span.status.description == "no lane is in service"


def test_an_unforeseen_error_ends_the_span_and_keeps_its_text_inside(collector: Collector) -> None:
    with pytest.raises(RuntimeError), collector.tracing.request([], METHOD):
        raise RuntimeError("/secret/path")
    made = collector.span
    assert made.attributes is not None and made.attributes["error.type"] == "UNKNOWN"
    assert "/secret/path" not in made.to_json()


def test_a_stream_that_its_caller_leaves_is_cancelled(collector: Collector, caplog: pytest.LogCaptureFixture) -> None:
    async def answer() -> AsyncIterator[int]:
        with collector.tracing.request([], METHOD):
            yield 1
            yield 2

    async def leave() -> None:
        stream = answer()
        await anext(stream)
        await asyncio.create_task(stream.aclose())  # type: ignore[attr-defined]  # as gRPC does: another context

    asyncio.run(leave())
    assert collector.span.attributes is not None
    assert collector.span.attributes["rpc.response.status_code"] == "CANCELLED"
    assert caplog.text == ""


def test_the_operator_names_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "encoder-of-team-a")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    tracing = Tracing.from_environment()
    provider = tracing._provider
    assert provider is not None
    assert provider.resource.attributes["service.name"] == "encoder-of-team-a"
    monkeypatch.delenv("OTEL_SERVICE_NAME")
    unnamed = Tracing.from_environment()._provider
    assert unnamed is not None
    assert unnamed.resource.attributes["service.name"] == "epd-encoder-sidecar"
    tracing.close()
    unnamed.shutdown()


def test_a_collector_that_does_not_answer_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")
        tracing = Tracing.from_environment()
        with tracing.request([], METHOD):
            pass
        started = time.monotonic()
        tracing.close(timeout_s=0.2)
        assert time.monotonic() - started < 30, "the exporter would try for ten minutes"
