"""`python -m sidecar.integrations.dynamo`: a process of Dynamo's, from its options to its end."""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import AsyncExitStack

from sidecar.addresses import AddressError
from sidecar.credentials import CredentialsError
from sidecar.integrations.dynamo.ending import Ending
from sidecar.integrations.dynamo.handover import HandOver, LocalHandOver
from sidecar.integrations.dynamo.local_files import LocalFiles
from sidecar.integrations.dynamo.metrics import Gauge
from sidecar.integrations.dynamo.model import Model
from sidecar.integrations.dynamo.options import Options, SettingsError
from sidecar.integrations.dynamo.sidecars import meet, open_fleet, publish_device
from sidecar.integrations.dynamo.worker import Worker

logger = logging.getLogger("sidecar.integrations.dynamo")


async def run(options: Options) -> None:
    """Serve until told to end.

    Raises:
        AddressError, CredentialsError, ImportError, OSError, SettingsError: if what the options name will not do.
    """
    from sidecar.integrations.dynamo.component import serve  # first: to say at once that Dynamo is not installed

    ending = Ending()
    async with AsyncExitStack() as resources:
        model = await asyncio.to_thread(Model.of, options.model, options.fingerprint)
        fleet = await resources.enter_async_context(open_fleet(options))
        way, gauges = _hand_over(options, ending)
        left_s = 0.0
        try:
            if (devices := await ending.unless_told(meet(fleet, model))) is None:
                return
            publish_device(devices, options.encoder_device)
            worker = Worker(fleet, model, way, options.mm_processor_kwargs, options.request_seconds)
            left_s = await serve(worker, options, lambda: worker.tally.text(gauges), ending)
        finally:
            await way.close(left_s)


def _hand_over(options: Options, ending: Ending) -> tuple[HandOver, list[Gauge]]:
    if options.embedding_transfer_mode != "local":
        from sidecar.integrations.dynamo.nixl import NixlHandOver

        return NixlHandOver(options.embedding_transfer_mode), []
    files = LocalFiles(options.local_directory, capacity_bytes=options.local_bytes, unread_s=options.unread_seconds)
    ending.at_once = files.discard
    logger.info("embeddings are handed over in %s", files.path)
    return LocalHandOver(files), [
        Gauge("epd_dynamo_files", "Embeddings that lie in files", lambda: files.count),
        Gauge("epd_dynamo_file_bytes", "Bytes of embeddings in files", lambda: files.bytes),
        Gauge(
            "epd_dynamo_unread_files", "Files that were removed without having been read, so far", lambda: files.unread
        ),
    ]


def main() -> int:
    try:
        options = Options.parse()
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("sidecar").setLevel(options.log_level.upper())
        asyncio.run(run(options))
        return 0
    except (SettingsError, AddressError, CredentialsError) as error:
        return _refused(error, 2)
    except ModuleNotFoundError as error:
        extra = "pip install 'epd-encoder-sidecar[dynamo]'; NIXL's modes need ai-dynamo[vllm] and nixl too"
        return _refused(f"{error.name} is not installed: {extra}", 2)
    except OSError as error:
        return _refused(error, 1)


def _refused(why: object, code: int) -> int:
    print(f"epd-dynamo: {why}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
