"""The life of a server: bind, load, become ready, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sidecar.artifact import Artifact
from sidecar.engine.memory import Memory
from sidecar.engine.scheduler import Limits, Scheduler
from sidecar.engine.store import Store, default_capacity
from sidecar.engine.store_directory import StoreDirectory
from sidecar.machine import pin, raise_descriptor_limit, return_freed_memory, share_heap, usable_cores
from sidecar.monitoring.metrics import Metrics
from sidecar.monitoring.monitor import Monitor
from sidecar.monitoring.snapshots import LoopSnapshot
from sidecar.monitoring.tracing import Tracing
from sidecar.runtimes.base import RuntimeFault
from sidecar.runtimes.trial import Trials
from sidecar.server import health
from sidecar.server.arrivals import Arrivals
from sidecar.server.calls import Calls
from sidecar.server.contents import Preprocessor
from sidecar.server.listening import (
    bind,
    remove_sockets,
    server_options,
    warn_of_open_sockets,
    warn_of_plaintext,
)
from sidecar.server.loading import choose_variant, load_lanes, open_for, preprocess_threads
from sidecar.server.model import Model, describe
from sidecar.server.orders import Orders
from sidecar.server.receiving import Receiver
from sidecar.server.reload import Reloader
from sidecar.server.security import BearerTokens, TokenInterceptor, server_credentials
from sidecar.server.service import SERVICE, EncoderService
from sidecar.server.stopping import Stop, on_signal
from sidecar.settings import Settings
from sidecar.urls.fetcher import UrlFetcher

logger = logging.getLogger(__name__)

# What is still open once all work is done: streams of reflection, connections.
_LAST_STREAMS_S = 1.0
# How long a run, or a decoder, may go on once its callers have been sent away.
_LAST_RUN_S = 1.0
_LOOK_S = 0.1
_TRIM_S = 5.0
_PREPROCESS = "preprocess"
# A header that takes long keeps no other waiting.
_OPENING_THREADS = 2
# SHA-256 takes 3 ms for a 1080p picture's patches where the processor has instructions for it, four times as long elsewhere.
_NAMING_THREADS = 2
# A thread that computes in Python gives way to the event loop this often; the interpreter's own 5 ms would show in health checks.
_SWITCH_INTERVAL_S = 0.0005


async def serve(settings: Settings) -> bool:
    """Serve until SIGTERM or SIGINT, then finish what was accepted.

    Returns:
        Whether all of it was finished in time; if not, a run that nothing can stop may still be going on. In either case
        a thread may still be loading a runtime: the process is to be ended without waiting for threads.

    Raises:
        ArtifactError, BindError, MachineError, RuntimeFault, SecurityError, StoreError, UrlsUnavailable: if it cannot start.
    """
    started = time.perf_counter()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    share_heap()
    pin(settings.cpus, settings.numa_node)
    async with AsyncExitStack() as resources:
        app = _App(settings, resources)
        # Before the graph is loaded, which may take a minute: an address in use shows at once.
        server, addresses = app.listen()
        with ExitStack() as unless_it_starts:
            unless_it_starts.callback(remove_sockets, addresses)
            if not await app.load():
                logger.info("stopped before it was ready")
                return True
            app.answer(server)
            await server.start()
            unless_it_starts.pop_all()
        app.tell_ready(addresses, time.perf_counter() - started)
        return await app.run(server)


class _App:
    """What a server is made of, in the order in which it is made."""

    def __init__(self, settings: Settings, resources: AsyncExitStack) -> None:
        self._settings = settings
        self._resources = resources
        self._store: Store | None = None
        self._reloader: Reloader | None = None
        self._reload_asked = False
        self._trials = Trials() if settings.trial == "auto" else None
        self._stop = Stop(settings.drain_seconds, self._stop_at_once)
        on_signal(signal.SIGHUP, self._ask_to_reload)
        # What an operator got wrong is found out before anything is loaded.
        self._artifact = open_for(settings)
        for device in settings.device:
            choose_variant(self._artifact, device, settings)
        self._tokens = BearerTokens(settings.token_file) if settings.token_file else None
        self._metrics = Metrics()
        self._tracing = Tracing.from_environment()
        resources.callback(self._tracing.close)
        self._monitor = self._start_monitor()
        self._fetcher = self._make_fetcher()
        self._memory = Memory(settings.max_held_bytes)
        self._calls = Calls(self._metrics, self._tracing, self._memory, self._tokens.name_of if self._tokens else None)
        self._receiver = Receiver(
            settings.max_held_bytes,
            settings.max_message_bytes,
            settings.message_seconds,
            lambda: self._calls.idle,
            refused=self._metrics.refused,
        )
        self._preprocessing = ThreadPoolExecutor(preprocess_threads(settings), thread_name_prefix=_PREPROCESS)
        self._opening = ThreadPoolExecutor(_OPENING_THREADS, thread_name_prefix=_PREPROCESS + "-open")
        self._naming = ThreadPoolExecutor(_NAMING_THREADS, thread_name_prefix=_PREPROCESS + "-name")
        self._health = health.HealthService([SERVICE])

    def listen(self) -> tuple[grpc.aio.Server, list[str]]:
        settings = self._settings
        interceptors: list[Any] = [Arrivals(self._metrics)]
        if self._tokens:
            interceptors.append(TokenInterceptor(self._tokens, self._calls.turned_away))
        interceptors.append(self._receiver)  # what has no token is not received at all
        server = grpc.aio.server(interceptors=interceptors, options=server_options(settings, raise_descriptor_limit()))
        credentials = None
        if settings.tls_cert and settings.tls_key:
            credentials = server_credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
        warn_of_plaintext(settings, encrypted=credentials is not None)
        warn_of_open_sockets(settings)
        mode = int(settings.socket_mode, 8)
        return server, [bind(server, address, credentials, mode) for address in settings.listen]

    async def load(self) -> bool:
        """Make the store and load the first model. Returns False as soon as it is told to stop: the rest is in vain."""
        settings = self._settings
        if settings.store:
            directory = await asyncio.to_thread(StoreDirectory, settings.store)
            capacity = settings.store_bytes or default_capacity(directory.path)
            self._store = Store(directory, capacity, settings.lease_seconds, self._artifact.manifest.fingerprint)
            self._resources.callback(self._store.close)
            logger.info("store %s of %d MB", directory.path, capacity >> 20)
        logger.info("this process has %s", usable_cores())
        loading = asyncio.ensure_future(asyncio.to_thread(self._load, self._artifact))
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        if self._stop.asked:
            logger.info("told to stop while loading")
            if self._trials:
                self._trials.stop()
            loading.add_done_callback(_take_result)
            return False
        stopping.cancel()
        model = loading.result()
        self._service = EncoderService(model, settings, self._calls)
        self._metrics.watch(LoopSnapshot(asyncio.get_running_loop(), lambda: self._service.model.scheduler.status()))
        return True

    def answer(self, server: grpc.aio.Server) -> None:
        self._health.set_serving(self._service.model.scheduler.in_service)
        self._service.add_to(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE, reflection.SERVICE_NAME), server)

    def tell_ready(self, addresses: list[str], after_s: float) -> None:
        where = ", ".join(addresses)
        if self._service.model.scheduler.in_service:
            logger.info("ready on %s after %.1f s", where, after_s)
        else:
            logger.error("listening on %s after %.1f s, but no lane passes its self-test: NOT_SERVING", where, after_s)

    async def run(self, server: grpc.aio.Server) -> bool:
        """Until told to stop, and the drain after it."""
        settings = self._settings
        self._reloader = Reloader(
            self._service,
            self._calls,
            self._load_again,
            settings.artifact,
            watch=settings.watch_artifact,
            failed=lambda why: self._metrics.error("RELOAD", why),
            patience_s=settings.drain_seconds,
        )
        if self._reload_asked:
            self._reloader.ask()
        watched = [
            self._reloader.run(),
            self._watch_lanes(),
            self._receiver.watch(),
            self._metrics.watch_loop(),
            self._trim(),
        ]
        if self._tokens:
            watched.append(self._tokens.watch())
        async with _background(*watched):
            await self._stop.wait()
        if self._trials:  # a reload is in vain, and its compiler would take the processor from what is drained
            self._trials.stop()
        logger.info("draining for at most %g s", settings.drain_seconds)
        self._health.drain()
        self._service.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(self._stop.drain_left_s):
                await self._finished()
        stop = self._stop
        await self._health.close(stop.left_s(_LAST_STREAMS_S))
        await server.stop(min(_LAST_STREAMS_S, stop.drain_left_s))
        for pool in (self._preprocessing, self._opening, self._naming):
            pool.shutdown(wait=False, cancel_futures=True)
        drained = await asyncio.to_thread(self._service.model.scheduler.close, stop.left_s(_LAST_RUN_S))
        # A decoder cannot be stopped either.
        drained = drained and not await asyncio.to_thread(_lingering, stop.left_s(_LAST_RUN_S))
        logger.info(
            "stopped" if drained else "stopped with a run still going on; its callers were told to go elsewhere"
        )
        return drained

    async def _trim(self) -> None:
        """Give memory back that runtimes hold of large runs, and what was freed and not returned."""
        while True:
            await asyncio.sleep(_TRIM_S)
            for lane in self._service.model.scheduler.lanes:
                try:
                    await asyncio.to_thread(lane.runtime.release_memory)
                except RuntimeFault as error:
                    logger.warning("%s: %s", lane.identity.name, error)
            await asyncio.to_thread(return_freed_memory)

    async def _finished(self) -> None:
        """Return once everything accepted is answered and no lease is held: a lease's holder has yet to map the file."""
        await self._calls.finished()
        if self._store and (leased := self._store.leased()):
            logger.info("waiting for %d leases to be released or to expire", leased)
        while self._store and self._store.leased():  # they end by expiring too, which nothing tells
            await asyncio.sleep(_LOOK_S)
            await self._calls.finished()  # who fetched meanwhile may have been given another

    async def _watch_lanes(self) -> None:
        while True:
            self._health.set_serving(self._service.model.scheduler.in_service)
            await asyncio.sleep(_LOOK_S)

    async def _load_again(self) -> Model:
        """Raises what loading raises, and RuntimeFault if no lane passes its self-test."""
        model = await asyncio.to_thread(lambda: self._load(open_for(self._settings)))
        if not model.scheduler.in_service:
            await asyncio.to_thread(model.scheduler.close, _LAST_RUN_S)
            raise RuntimeFault("no lane of it passes its self-test")
        return model

    def _load(self, artifact: Artifact) -> Model:
        settings = self._settings
        manifest = artifact.manifest
        variants = [choose_variant(artifact, device, settings) for device in settings.device]
        lanes = load_lanes(artifact, variants, settings, self._metrics, self._trials)
        scheduler = Scheduler(
            lanes,
            manifest.tower,
            manifest.fingerprint,
            store=self._store,
            preprocessing=self._preprocessing,
            preprocess_threads=preprocess_threads(settings),
            limits=Limits(items=settings.max_queue_items, patches=settings.max_queue_patches),
            observer=self._metrics,
            memory=self._memory,
        )
        preprocessor = Preprocessor(
            tower=manifest.tower,
            pixels=manifest.pixels,
            max_image_pixels=settings.max_image_pixels,
            max_frames=settings.max_frames,
            max_item_patches=settings.max_item_patches,
        )
        orders = Orders(preprocessor, self._opening, self._naming, self._fetcher, self._memory)
        return Model(artifact, scheduler, orders, describe(artifact, variants, scheduler, settings))

    def _start_monitor(self) -> Monitor | None:
        if self._settings.metrics_listen == "none":
            return None
        monitor = Monitor.start(self._settings.metrics_listen, self._metrics, lambda: self._is_healthy())
        self._resources.callback(monitor.close)
        logger.info("metrics and status page on http://%s", monitor.address)
        return monitor

    def _is_healthy(self) -> bool:
        return self._metrics.status() is not None and self._health.serving

    def _make_fetcher(self) -> UrlFetcher | None:
        settings = self._settings
        if not settings.url_input:
            return None
        fetcher = UrlFetcher(settings.url_hosts, max_bytes=settings.url_bytes, timeout_s=settings.url_seconds)
        self._resources.push_async_callback(fetcher.close)
        return fetcher

    def _ask_to_reload(self) -> None:
        if self._reloader is None:
            logger.info("SIGHUP while loading: the artifact is loaded anew once this one is ready")
            self._reload_asked = True
        else:
            self._reloader.ask()

    def _stop_at_once(self) -> None:
        if self._store:
            self._store.close()


def _take_result(loading: asyncio.Future[Model]) -> None:
    """Nobody wants to know any more why a load failed."""
    if not loading.cancelled():
        loading.exception()


@asynccontextmanager
async def _background(*coroutines: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Run coroutines until the block ends. One that fails is a defect, and is told as soon as it happens."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    for task in tasks:
        task.add_done_callback(_tell_failure)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _tell_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a part of the server has failed", exc_info=error)


def _lingering(timeout_s: float) -> list[threading.Thread]:
    """Preprocessing threads that are still at work after `timeout_s`; idle ones end with their pool."""
    until = time.perf_counter() + timeout_s
    threads = [thread for thread in threading.enumerate() if thread.name.startswith(_PREPROCESS)]
    for thread in threads:
        thread.join(max(0.0, until - time.perf_counter()))
    return [thread for thread in threads if thread.is_alive()]
