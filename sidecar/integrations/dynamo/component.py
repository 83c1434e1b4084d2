"""The worker as Dynamo sees it: an instance of dyn://NAMESPACE.encode.generate, from its registration to its leaving."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from dynamo.llm import ModelInput, ModelType, WorkerType, register_model
from dynamo.llm.exceptions import InvalidArgument
from dynamo.runtime import Context, DistributedRuntime

from sidecar.integrations.dynamo.ending import Ending
from sidecar.integrations.dynamo.options import Options, SettingsError
from sidecar.integrations.dynamo.worker import FailedError, Worker

logger = logging.getLogger("sidecar.integrations.dynamo")

# Where Dynamo's prefill workers look (MultimodalEncodeWorker of dynamo/vllm/worker_factory.py).
_COMPONENT, _ENDPOINT = "encode", "generate"
# What Dynamo waits between taking itself off the list and ending, for those who have read the list already.
_GRACE_VARIABLE, _GRACE_S = "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", 5.0


async def serve(worker: Worker, options: Options, metrics: Callable[[], str], ending: Ending) -> float:
    """Register, answer requests until `ending`, leave the list, and finish what is under way.

    Returns:
        What is left of the time for that, in seconds.

    Raises:
        SettingsError: if Dynamo's runtime does not start as it is told, or does not take the registration.
    """
    if ending.told.is_set():
        return 0.0
    with ending.without_handlers():  # it may try for minutes to reach etcd or NATS
        runtime = _runtime(options)
    endpoint = runtime.endpoint(f"{options.namespace}.{_COMPONENT}.{_ENDPOINT}")
    endpoint.metrics.register_prometheus_expfmt_callback(metrics)
    await ending.unless_told(_register(endpoint, options))
    if ending.told.is_set():
        runtime.shutdown()
        return 0.0
    labels = [("model", options.served_name)]
    serving = asyncio.ensure_future(
        endpoint.serve_endpoint(_handler(worker), graceful_shutdown=True, metrics_labels=labels)
    )
    logger.info("serving dyn://%s.%s.%s for %s", options.namespace, _COMPONENT, _ENDPOINT, options.served_name)
    # Without a health check of the endpoint's own, Dynamo's /health says what it is told.
    runtime.set_health_status(True)
    told = asyncio.ensure_future(ending.told.wait())
    await asyncio.wait({serving, told}, return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    ends = time.monotonic() + options.drain_seconds
    if not serving.done():
        runtime.set_health_status(False)
        await endpoint.unregister_endpoint_instance()
        grace_s = _grace_s()
        logger.info("no longer listed; finishing what is under way")
        await asyncio.sleep(grace_s)
        ends = time.monotonic() + options.drain_seconds
        if not await worker.drain(options.drain_seconds):
            logger.warning("requests were still under way after %g s", options.drain_seconds)
    runtime.shutdown()
    await serving
    return max(0.0, ends - time.monotonic())


def _runtime(options: Options) -> DistributedRuntime:
    try:
        return DistributedRuntime(
            asyncio.get_running_loop(),
            options.discovery_backend,
            options.request_plane,
            event_plane=options.event_plane or None,
            response_plane=options.response_plane or None,
        )
    except Exception as error:  # Dynamo has no kind of its own for what will not do
        raise SettingsError(f"Dynamo's runtime does not start: {error}") from error


async def _register(endpoint: Any, options: Options) -> None:
    try:
        await register_model(
            ModelInput.Tokens,
            ModelType.Empty,
            endpoint,
            options.model,
            model_name=options.served_name,
            worker_type=WorkerType.Encode,
            needs=[[WorkerType.Prefill, WorkerType.Decode], [WorkerType.Aggregated]],
            skip_model_assets=True,
        )
    except Exception as error:
        raise SettingsError(f"Dynamo does not take the registration: {error}") from error


def _handler(worker: Worker) -> Callable[[Any, Context], AsyncGenerator[str, None]]:
    async def generate(request: Any, context: Context) -> AsyncGenerator[str, None]:
        try:
            answer = await worker.answer(request, context.id(), context.async_killed_or_stopped)
        except FailedError as error:
            # Of all that may be raised, prefill passes on the words of this kind alone, and its status is the same for all.
            raise InvalidArgument(str(error)) from None
        if answer is not None:
            yield answer

    return generate


def _grace_s() -> float:
    try:
        grace_s = float(os.environ.get(_GRACE_VARIABLE) or _GRACE_S)
    except ValueError:
        return _GRACE_S
    return max(0.0, grace_s) if math.isfinite(grace_s) else _GRACE_S
