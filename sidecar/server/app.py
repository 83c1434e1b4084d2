"""The life of a server: bind, load, become ready, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sidecar.engine.scheduler import Scheduler
from sidecar.server import health
from sidecar.server.loading import choose_variant, load_lane, open_for
from sidecar.server.service import SERVICE, EncoderService
from sidecar.settings import Settings

logger = logging.getLogger(__name__)

# How long a run may go on once its callers have been sent away.
_LAST_RUN_S = 1.0
_PREPROCESS = "preprocess"


class BindError(OSError):
    """An address cannot be listened on."""


async def serve(settings: Settings) -> bool:
    """Serve until SIGTERM or SIGINT, then finish what was accepted.

    Returns:
        Whether all of it was finished in time; if not, a run that nothing can stop may still be going on.

    Raises:
        ArtifactError, RuntimeFault, BindError: if the server cannot start.
    """
    started = time.perf_counter()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    artifact = open_for(settings)
    variant = choose_variant(artifact, settings)
    server = grpc.aio.server(options=_options(settings))
    # Before the graph is loaded, which may take a minute: an address in use shows at once.
    addresses = [_bind(server, address) for address in settings.listen]
    lane = await asyncio.to_thread(load_lane, artifact, variant, settings)
    scheduler = Scheduler([lane], settings.max_queue_patches)
    preprocessing = ThreadPoolExecutor(settings.preprocess_threads, thread_name_prefix=_PREPROCESS)
    EncoderService(artifact.manifest, variant, scheduler, preprocessing, settings).add_to(server)
    health_service = health.HealthService([SERVICE])
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE, reflection.SERVICE_NAME), server)
    await server.start()
    logger.info("ready on %s after %.1f s", ", ".join(addresses), time.perf_counter() - started)

    await stopping.wait()
    logger.info("draining for at most %g s", settings.drain_seconds)
    health_service.drain()
    await server.stop(settings.drain_seconds)
    preprocessing.shutdown(wait=False, cancel_futures=True)
    drained = await asyncio.to_thread(scheduler.close, _LAST_RUN_S)
    # A decoder cannot be stopped either, and the interpreter would wait for it at its end.
    drained = drained and not await asyncio.to_thread(_lingering, _LAST_RUN_S)
    logger.info("stopped" if drained else "stopped with a run still going on; its callers were told to go elsewhere")
    return drained


def _lingering(timeout_s: float) -> list[threading.Thread]:
    """Preprocessing threads that are still at work after `timeout_s`; idle ones end with their pool."""
    until = time.perf_counter() + timeout_s
    threads = [thread for thread in threading.enumerate() if thread.name.startswith(_PREPROCESS)]
    for thread in threads:
        thread.join(max(0.0, until - time.perf_counter()))
    return [thread for thread in threads if thread.is_alive()]


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
        reason = "it is in use, or not an address of this machine"
        if address.startswith("unix:"):
            reason = "a file is in its place, its directory does not exist, or its path has over 107 bytes"
        raise BindError(f"cannot listen on {address}: {reason}") from error
    if address.startswith(("unix:", "unix-abstract:")):
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
