"""The life of a server: bind, load, become ready, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sidecar.engine.scheduler import Scheduler
from sidecar.pb import encoder_pb2, encoder_pb2_grpc
from sidecar.server.loading import choose_variant, load_lane, open_for
from sidecar.server.service import EncoderService
from sidecar.settings import Settings

logger = logging.getLogger(__name__)

SERVICE = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"].full_name


class BindError(OSError):
    """An address cannot be listened on."""


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was accepted.

    Raises:
        ArtifactError, RuntimeFault, BindError: if the server cannot start.
    """
    started = time.perf_counter()
    artifact = open_for(settings)
    variant = choose_variant(artifact, settings)
    lane = await asyncio.to_thread(load_lane, artifact, variant, settings)
    scheduler = Scheduler([lane], settings.max_queue_patches)
    preprocessing = ThreadPoolExecutor(settings.preprocess_threads, thread_name_prefix="preprocess")
    server = grpc.aio.server(options=_options(settings))
    encoder_pb2_grpc.add_EncoderServicer_to_server(
        EncoderService(artifact.manifest, variant, scheduler, preprocessing, settings), server
    )
    health_service = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    addresses = [_bind(server, address) for address in settings.listen]
    await server.start()
    for name in ("", SERVICE):
        await health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
    logger.info("ready on %s after %.1f s", ", ".join(addresses), time.perf_counter() - started)

    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await stopping.wait()
    logger.info("draining for at most %.0f s", settings.drain_seconds)
    await health_service.enter_graceful_shutdown()
    await server.stop(settings.drain_seconds)
    preprocessing.shutdown(wait=False, cancel_futures=True)
    await asyncio.to_thread(scheduler.close)
    logger.info("stopped")


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        # Without this a second server on the same port would share its connections instead of failing to start.
        ("grpc.so_reuseport", 0),
        # Clients may ping once in 10 s to notice a dead connection early.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def _bind(server: grpc.aio.Server, address: str) -> str:
    """Listen on an address and return it with the port that was really taken."""
    if address.startswith("unix:"):
        _refuse_living_socket(Path(address.removeprefix("unix:").removeprefix("//")))
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise BindError(f"cannot listen on {address}; is it in use, or not an address of this machine?") from error
    if address.startswith("unix:"):
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def _refuse_living_socket(path: Path) -> None:
    """gRPC replaces a socket file without asking; one that still answers belongs to somebody."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return
    raise BindError(f"another server is listening on unix:{path}")
