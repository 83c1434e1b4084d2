"""Counts calls as they reach the server, before their requests have.

A call that is reset before its request is whole leaves no other trace: gRPC drops it without telling any handler. Thousands of
them a second take the event loop's time all the same (HTTP/2 rapid reset, CVE-2023-44487).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from sidecar.monitoring.metrics import Metrics

logger = logging.getLogger(__name__)

_WINDOW_S = 10.0
# Calls without a request in one window that are worth a line in the log: 2000 a second.
_MANY = 20_000
_SERVICES = {"epd.encoder.v1.Encoder": "encoder", "grpc.health.v1.Health": "health"}


class Arrivals(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Comes before every other interceptor."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._window_began = clock()
        self._arrived = 0
        self._ended_before = metrics.ended

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:  # a handler, or None for a method that is not known
        self.count(handler_call_details.method)
        return await continuation(handler_call_details)

    def count(self, method: str) -> None:
        """A call to `method`, `/package.Service/Method`, has arrived."""
        self._metrics.arrived(_SERVICES.get(method[1:].partition("/")[0], "other"))
        self._arrived += 1
        if (now := self._clock()) - self._window_began < _WINDOW_S:
            return
        lost = self._arrived - (self._metrics.ended - self._ended_before)
        if lost > _MANY:
            logger.warning(
                "%d of %d calls in %.0f s ended before their request arrived: a caller opens and resets calls, or probes very "
                "often; look at epd_encoder_calls_arrived_total and at the connections to this port",
                *(lost, self._arrived, now - self._window_began),
            )
        self._window_began, self._arrived, self._ended_before = now, 0, self._metrics.ended
