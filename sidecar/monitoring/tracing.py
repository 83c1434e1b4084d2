"""W3C trace context, and a span for each call where OpenTelemetry is installed and an OTLP endpoint is set.

Without them the trace id of the caller is still read, for the request log. Spans are never the current span of a task: an
answer is streamed, and the generator that streams it may be closed in another context than it was started in.

Formats: https://www.w3.org/TR/trace-context/. Attributes: OpenTelemetry's semantic conventions for gRPC.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

import grpc

from sidecar import __version__
from sidecar.engine.observer import StageTimes
from sidecar.monitoring.recent import STAGES

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)

Metadata = Iterable[tuple[str, str | bytes]]

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_TRACEPARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<parent>[0-9a-f]{16})-[0-9a-f]{2}(?P<more>-.*)?"
)
# The rest are the caller's own doing: the conventions leave a server's span without an error status for them.
_SERVER_FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}


def trace_id_of(metadata: Metadata) -> str:
    """The trace id that `traceparent` names, 32 hexadecimal digits; empty where there is none or it is not valid."""
    values = [value for name, value in metadata if name == "traceparent"]
    if len(values) != 1 or not isinstance(values[0], str):
        return ""
    matched = _TRACEPARENT.fullmatch(values[0])
    if not matched or matched["version"] == "ff" or not int(matched["trace"], 16) or not int(matched["parent"], 16):
        return ""
    if matched["version"] == "00" and matched["more"]:  # later versions may append fields
        return ""
    return matched["trace"]


class RequestSpan:
    """One call, of which nothing is kept but the trace id."""

    def __init__(self, trace_id: str) -> None:
        self.trace_id = trace_id

    def item(self, index: int, outcome: str, times: StageTimes) -> None:
        """An item has been answered. `outcome`: `embedding`, or its error's reason."""

    def failed(self, code: grpc.StatusCode, message: str) -> None:
        """The call as a whole ends with an error. `message` must be one that the caller may see."""

    def end(self) -> None:
        """Nothing follows."""


class Tracing:
    """Makes spans. `provider` None: only trace ids."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = None if provider is None else provider.get_tracer("sidecar", __version__)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """With an exporter where OTEL_EXPORTER_OTLP_ENDPOINT (or …_TRACES_ENDPOINT) is set; its other `OTEL_…` variables
        hold as OpenTelemetry documents them."""
        if not any(environment.get(name) for name in _ENDPOINTS):
            return cls()
        try:
            return cls(_exporting_provider())
        except ImportError:
            logger.warning("no traces: %s needs pip install 'epd-encoder-sidecar[otel]'", _ENDPOINTS[0])
            return cls()

    @contextmanager
    def request(self, metadata: Metadata, method: str) -> Iterator[RequestSpan]:
        """One call of `method`, as in `epd.encoder.v1.Encoder/Encode`, from its start to its end."""
        span = self._start(list(metadata), method)
        try:
            yield span
        except (asyncio.CancelledError, GeneratorExit):
            span.failed(grpc.StatusCode.CANCELLED, "the caller has gone")
            raise
        except BaseException as error:
            span.failed(grpc.StatusCode.UNKNOWN, type(error).__name__)
            raise
        finally:
            span.end()

    def close(self, timeout_s: float = 2.0) -> None:
        """Send what has not been sent, but not for longer than this."""
        if self._provider is None:
            return
        # A collector that does not answer would hold up the shutdown for as long as its exporter cares to try.
        flushing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        flushing.start()
        flushing.join(timeout_s)

    def _start(self, metadata: list[tuple[str, str | bytes]], method: str) -> RequestSpan:
        trace_id = trace_id_of(metadata)
        if self._tracer is None:
            return RequestSpan(trace_id)
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(
            method,
            context=_context(metadata) if trace_id else None,
            kind=SpanKind.SERVER,
            attributes={"rpc.system.name": "grpc", "rpc.method": method},
        )
        return _RecordedSpan(span, trace_id)


class _RecordedSpan(RequestSpan):
    def __init__(self, span: Span, trace_id: str) -> None:
        own = span.get_span_context()
        super().__init__(f"{own.trace_id:032x}" if own.is_valid else trace_id)
        self._span = span
        self._code: str | None = None

    def item(self, index: int, outcome: str, times: StageTimes) -> None:
        """An event rather than a child: stages of items overlap, and a run belongs to many of them."""
        stages = {f"epd.item.{stage}_ms": float(getattr(times, f"{stage}_ms")) for stage in STAGES}
        self._span.add_event("item", {"epd.item.index": index, "epd.item.outcome": outcome, **stages})

    def failed(self, code: grpc.StatusCode, message: str) -> None:
        """The first failure is the call's: what follows from it, such as gRPC's own abort, says less."""
        from opentelemetry.trace import Status, StatusCode

        if self._code is not None:
            return
        self._code = code.name
        if code.name in _SERVER_FAULTS:
            self._span.set_status(Status(StatusCode.ERROR, message))
            self._span.set_attribute("error.type", code.name)

    def end(self) -> None:
        self._span.set_attribute("rpc.response.status_code", self._code or "OK")
        self._span.end()


def _context(metadata: list[tuple[str, str | bytes]]) -> Context:
    """The caller's span as OpenTelemetry's context, from a `traceparent` that was found valid."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    fields = {name: value for name, value in metadata if name == "traceparent" and isinstance(value, str)}
    states = [value for name, value in metadata if name == "tracestate" and isinstance(value, str)]
    return TraceContextTextMapPropagator().extract({**fields, "tracestate": ",".join(states)}, Context())


def _exporting_provider() -> TracerProvider:
    """Raises:
    ImportError: if the `otel` extra is not installed.
    """
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    ours = Resource({"service.name": "epd-encoder-sidecar", "service.version": __version__})
    # Ours first: OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES have the last word.
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
