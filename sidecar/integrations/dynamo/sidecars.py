"""The sidecars behind the worker: how they are reached, which of them serve the model, and what they encode on."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import MutableMapping

from sidecar.credentials import client_credentials, read_token
from sidecar.fleet import Fleet
from sidecar.integrations.dynamo.model import MismatchError, Model
from sidecar.integrations.dynamo.options import Options
from sidecar.pb import encoder_pb2
from sidecar.replies import ClientError

logger = logging.getLogger(__name__)

_INFO_S = 5.0
_LOOK_AGAIN_S = 0.5
_KIND = re.compile("[a-z]+")


def open_fleet(options: Options) -> Fleet:
    """To all sidecars that the options name.

    Raises:
        CredentialsError: if a certificate, key or token will not do.
    """
    return Fleet(
        options.server,
        credentials=client_credentials(options.tls_ca, options.tls_cert, options.tls_key) if options.uses_tls else None,
        token=None if options.token_file is None else read_token(options.token_file),
    )


async def meet(fleet: Fleet, model: Model) -> list[str]:
    """Wait for a sidecar that serves the model.

    Returns:
        The devices of all that do by then, in the runtimes' own words. What keeps the others is logged, once.
    """
    said: set[str] = set()
    while True:
        devices, failures = await _look(fleet, model)
        for failure in failures - said:
            logger.warning("%s", failure)
        said |= failures
        if devices:
            return devices
        await asyncio.sleep(_LOOK_AGAIN_S)


async def _look(fleet: Fleet, model: Model) -> tuple[list[str], set[str]]:
    try:
        answers = await fleet.infos(_INFO_S)
    except ClientError as error:
        return [], {str(error)}
    devices: list[str] = []
    failures: set[str] = set()
    for address, answer in answers.items():
        if not isinstance(answer, encoder_pb2.InfoResponse):
            failures.add(f"sidecar {address}: {answer}")
            continue
        try:
            model.meet(answer)
        except MismatchError as error:
            failures.add(f"sidecar {address}: {error}")
            continue
        devices += [lane.device for lane in answer.lanes]
        lanes = ", ".join(f"{lane.runtime} on {lane.device}" for lane in answer.lanes)
        logger.info("sidecar %s: model %s, %s", address, answer.fingerprint[:16], lanes)
    return devices, failures


def publish_device(devices: list[str], asked: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let Dynamo's runtime say truly what this worker encodes on.

    The runtime takes a process for one on CPU if CUDA_VISIBLE_DEVICES is empty, and for one on GPU otherwise. This one encodes
    where its sidecars do.

    Args:
        asked: what a launcher asked for, such as `cpu` or `cuda:0`; empty, if it did not.
    """
    kinds = sorted({_kind(device) for device in devices})
    if kinds == ["cpu"]:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif environment.get("CUDA_VISIBLE_DEVICES") == "":
        del environment["CUDA_VISIBLE_DEVICES"]
    wanted = sorted({_kind(device) for device in asked.replace(",", " ").split()})
    if wanted and wanted != kinds:
        logger.warning("DYN_ENCODER_DEVICE asks for %s, the sidecars encode on %s", asked, ", ".join(kinds))


def _kind(device: str) -> str:
    """`CPU (AMD EPYC, 2 threads, f32)` → cpu, `cuda:0` → cuda."""
    kind = _KIND.match(device.lower().removeprefix("ov:"))
    return kind[0] if kind else device
