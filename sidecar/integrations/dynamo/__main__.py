"""`python -m sidecar.integrations.dynamo`: a process of Dynamo's, from its options to its end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

from sidecar.addresses import AddressError
from sidecar.credentials import CredentialsError, client_credentials, read_token
from sidecar.fleet import Fleet
from sidecar.integrations.dynamo.handover import hand_over
from sidecar.integrations.dynamo.local_files import LocalFiles
from sidecar.integrations.dynamo.model import MismatchError, Model
from sidecar.integrations.dynamo.options import Options, OptionsError, parse
from sidecar.integrations.dynamo.worker import FailedError, Worker
from sidecar.pb import encoder_pb2

logger = logging.getLogger("sidecar.integrations.dynamo")

_INFO_S = 5.0
_LOOK_S = 1.0
# What Dynamo waits between taking itself off the list and ending, for those who have read the list already.
_GRACE_VARIABLE, _GRACE_S = "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", 5.0


async def run(options: Options) -> int:
    """Serve until told to end. Returns the exit code.

    Raises:
        AddressError, CredentialsError, OSError, ImportError: if what the options name will not do.
    """
    ending = _signals()
    async with AsyncExitStack() as resources:
        model = await asyncio.to_thread(Model.of, options.model, options.fingerprint)
        fleet = await resources.enter_async_context(_open_fleet(options))
        if (lanes := await _meet(fleet, model, ending)) is None:
            return 0
        _publish_device(lanes, options.device)
        files = None
        if options.mode == "local":
            files = LocalFiles(options.directory, capacity_bytes=options.directory_bytes, unread_s=options.unread_s)
            logger.info("embeddings are handed over in %s", files.path)
        way = hand_over(options.mode, files)
        worker = Worker(fleet, model, way, options.bounds, options.request_s)
        try:
            await _serve(worker, options, ending)
        finally:
            await way.close(options.drain_s)
    return 0


async def _serve(worker: Worker, options: Options, ending: asyncio.Event) -> None:
    from dynamo.llm import ModelInput, ModelType, WorkerType, register_model
    from dynamo.llm.exceptions import InvalidArgument
    from dynamo.runtime import Context, DistributedRuntime

    try:
        runtime = DistributedRuntime(
            asyncio.get_running_loop(),
            os.environ.get("DYN_DISCOVERY_BACKEND", "etcd"),
            os.environ.get("DYN_REQUEST_PLANE", "tcp"),
            event_plane=os.environ.get("DYN_EVENT_PLANE"),
        )
    except Exception as error:  # Dynamo has no kind of its own for a variable that will not do
        raise OptionsError(f"Dynamo's runtime does not start: {error}") from error
    endpoint = runtime.endpoint(f"{options.namespace}.{options.component}.{options.endpoint}")
    endpoint.metrics.register_prometheus_expfmt_callback(lambda: _metrics(worker))

    async def generate(request: Any, context: Context) -> AsyncGenerator[str, None]:
        try:
            answer = await worker.answer(request, context.async_killed_or_stopped)
        except FailedError as error:
            # Of all that may be raised, prefill passes on the words of this kind alone, and its status is the same for all.
            raise InvalidArgument(str(error)) from None
        if answer is not None:
            yield answer

    await register_model(
        ModelInput.Tokens,
        ModelType.Empty,
        endpoint,
        options.model,
        model_name=options.model_name,
        worker_type=WorkerType.Encode,
        needs=[[WorkerType.Prefill, WorkerType.Decode], [WorkerType.Aggregated]],
        skip_model_assets=True,
    )
    labels = [("model", options.model_name)]
    serving = asyncio.ensure_future(endpoint.serve_endpoint(generate, graceful_shutdown=True, metrics_labels=labels))
    logger.info(
        "serving dyn://%s.%s.%s for %s", options.namespace, options.component, options.endpoint, options.model_name
    )
    # Without a health check of the endpoint's own, Dynamo's /health says what it is told.
    runtime.set_health_status(True)
    told = asyncio.ensure_future(ending.wait())
    await asyncio.wait({serving, told}, return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        runtime.set_health_status(False)
        await endpoint.unregister_endpoint_instance()
        logger.info("no longer listed; finishing what is under way")
        await asyncio.sleep(_grace_s())
        if not await worker.drain(options.drain_s):
            logger.warning("requests were still under way after %g s", options.drain_s)
    told.cancel()
    runtime.shutdown()
    await serving


def _open_fleet(options: Options) -> Fleet:
    over_tls = options.tls or any((options.tls_ca, options.tls_cert, options.tls_key))
    return Fleet(
        options.servers,
        credentials=client_credentials(options.tls_ca, options.tls_cert, options.tls_key) if over_tls else None,
        token=None if options.token_file is None else read_token(options.token_file),
    )


async def _meet(fleet: Fleet, model: Model, ending: asyncio.Event) -> list[str] | None:
    """Wait for the first sidecar that serves the model; the devices that sidecars encode on. None: told to end meanwhile."""
    said = ""
    while not ending.is_set():
        devices: list[str] = []
        failures: list[str] = []
        try:
            answers = await fleet.infos(_INFO_S)
        except Exception as error:  # of the network's many kinds, and each may pass
            answers, failures = {}, [str(error)]
        for address, answer in answers.items():
            if not isinstance(answer, encoder_pb2.InfoResponse):
                failures.append(f"{address}: {answer}")
                continue
            try:
                model.meet(answer)
            except MismatchError as error:
                failures.append(f"{address}: {error}")
                continue
            devices += [lane.device for lane in answer.lanes]
            lanes = ", ".join(f"{lane.runtime} on {lane.device}" for lane in answer.lanes)
            logger.info("sidecar %s: model %s, %s", address, answer.fingerprint[:16], lanes)
        if (now := "; ".join(failures)) and now != said:
            logger.warning("%s", now)
            said = now
        if devices:
            return devices
        try:
            async with asyncio.timeout(_LOOK_S):
                await ending.wait()
        except TimeoutError:
            pass
    return None


def _publish_device(devices: list[str], asked: str) -> None:
    """Dynamo lists a worker by the GPUs that its process sees; this one encodes where its sidecars do."""
    kinds = sorted({device.split("(")[0].strip().split(":")[0].lower() for device in devices})
    if kinds == ["cpu"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    wanted = asked.split(",")[0].split(":")[0].lower()
    if wanted and wanted not in kinds:
        logger.warning("DYN_ENCODER_DEVICE asks for %s, the sidecars encode on %s", asked, ", ".join(kinds))


def _metrics(worker: Worker) -> str:
    """Prometheus' text format, for Dynamo's own /metrics."""
    lines = []
    for name, what in (
        ("requests", "Requests of prefill workers"),
        ("images", "Images that were handed over"),
        ("failed", "Requests that failed"),
    ):
        metric = f"epd_dynamo_{name}_total"
        lines += [f"# HELP {metric} {what}", f"# TYPE {metric} counter", f"{metric} {worker.tally[name]}"]
    return "\n".join(lines) + "\n"


def _signals() -> asyncio.Event:
    """Set at the first SIGTERM or Ctrl-C; a second one, a moment later, ends the process at once."""
    ending = asyncio.Event()
    first = [0.0]

    def told() -> None:
        if ending.is_set() and time.monotonic() - first[0] > 0.5:
            os._exit(1)
        first[0] = first[0] or time.monotonic()
        ending.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told)
    return ending


def _grace_s() -> float:
    try:
        return max(0.0, float(os.environ.get(_GRACE_VARIABLE) or _GRACE_S))
    except ValueError:
        return _GRACE_S


def main() -> int:
    try:
        options = parse()
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("sidecar").setLevel(options.log_level.upper())
        return asyncio.run(run(options))
    except (OptionsError, AddressError, CredentialsError) as error:
        print(f"epd-dynamo: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"epd-dynamo: {error.name} is not installed: pip install 'epd-encoder-sidecar[dynamo]', and for NIXL ai-dynamo[vllm]",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        print(f"epd-dynamo: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
