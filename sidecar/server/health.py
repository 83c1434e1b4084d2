"""grpc.health.v1: SERVING from the first answer on, since a server starts only when it is warm; NOT_SERVING while no lane is in
service, and once it drains.

gRPC's own servicer never ends the streams of `Watch`, so each of them would hold up every drain until its time is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_Context = grpc.aio.ServicerContext[HealthCheckRequest, HealthCheckResponse]


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # generated without annotations
    """The health of the server as a whole, under "" and under the name of each of its services."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(("", *services))
        self._serving = True
        self._draining = False
        self._closed = False
        self._watchers = 0
        self._changed = asyncio.Event()

    @property
    def serving(self) -> bool:
        return self._serving and not self._draining

    def set_serving(self, serving: bool) -> None:
        """Say whether any lane is in service."""
        if serving != self._serving:
            self._serving = serving
            self._tell()

    def drain(self) -> None:
        """Answer NOT_SERVING from now on, and tell the watchers. They stay: gRPC's own, in clients, would come back at once."""
        self._draining = True
        self._tell()

    async def close(self, seconds: float) -> None:
        """Let the watchers go, and wait until they have."""
        self._closed = True
        self._tell()
        ends = asyncio.get_running_loop().time() + seconds
        while self._watchers and asyncio.get_running_loop().time() < ends:  # noqa: ASYNC110  # the last look before the end
            await asyncio.sleep(0.01)

    async def Check(self, request: HealthCheckRequest, context: _Context) -> HealthCheckResponse:
        if request.service not in self._services:
            known = ", ".join(repr(name) for name in sorted(self._services))
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no such service here; there are {known}")
        return self._health(request.service)

    async def Watch(self, request: HealthCheckRequest, context: _Context) -> AsyncIterator[HealthCheckResponse]:
        told = None
        self._watchers += 1
        try:
            while True:
                changed = self._changed
                if (now := self._health(request.service)) != told:
                    yield now
                    told = now
                if self._closed:
                    return
                await changed.wait()
        finally:
            self._watchers -= 1

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _health(self, service: str) -> HealthCheckResponse:
        if service not in self._services:
            return HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN)
        return HealthCheckResponse(
            status=HealthCheckResponse.SERVING if self.serving else HealthCheckResponse.NOT_SERVING
        )
