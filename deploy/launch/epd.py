"""The EPD chain of stock vLLM: encoder sidecars, a prefill and a decode worker with NIXL between them, vLLM's router in front.

deploy/launch/epd.sh MODEL [ARTIFACT] [--device DEVICE]…
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.launch.chain import BAD_SETTINGS, EXIT_CODES, STOPPED, Chain, run
from deploy.launch.encoder import encoders as encoders_of
from deploy.launch.ports import HOST, PortError, Ports
from deploy.launch.readiness import answers
from deploy.launch.settings import SettingsError, artifact_of, example, flags, program, seconds
from deploy.launch.supervisor import Part
from deploy.launch.vllm_worker import AFFINITY, PLATFORMS, Role, vllm_worker

_ENVIRONMENT = f"""
environment, all of it optional:
  PYTHON                   python of the sidecars, and of this launcher (.venv/bin/python, else python3)
  VLLM, VLLM_ROUTER        vLLM's commands, maybe of another environment (vllm; vllm-router beside it, else on PATH)
  DEVICE_PLATFORM          cpu, cuda or xpu: what prefill and decode run on (cpu)
  PREFILL_DEVICES, DECODE_DEVICES
                           their devices, as CUDA_VISIBLE_DEVICES or ZE_AFFINITY_MASK names them (the first
                           and the second of that variable, else 0 and 1)
  KV_BUFFER_DEVICE         where NIXL moves the KV cache from and to (the platform)
  ENCODER_DEVICES          as --device, with spaces or commas between: one sidecar each (cpu)
  ENCODER_ARGS             further flags of `python -m sidecar serve`; EPD_… variables work too
  VLLM_ARGS, PREFILL_ARGS, DECODE_ARGS
                           further flags of `vllm serve`, for both or for one
  ROUTER_ARGS              further flags of vllm-router
  CONNECTOR                off: prefill runs its own vision tower, and no encoder is started
  CONNECTOR_OPTIONS        JSON object of the connector's options, such as {{"on_failure": "fail"}}
  HOST                     what the router listens on (127.0.0.1); everything else stays on loopback
  ROUTER_PORT, PREFILL_PORT, DECODE_PORT, ENCODER_PORTS, PREFILL_NIXL_PORT, DECODE_NIXL_PORT, ROUTER_METRICS_PORT,
  ENCODER_METRICS_PORTS    each a free one unless named; lists have one for each encoder
  LOG_DIR                  where each part's log is kept (a temporary directory, removed after a clean end)
  READY_SECONDS            how long the parts may take to be ready (600)

{EXIT_CODES}
"""


def plan(
    model: str, artifact: Path | None, devices: Sequence[str], given: Mapping[str, str], ports: Ports, scratch: Path
) -> Chain:
    """What to start.

    Args:
        artifact: what the encoders serve; None where none are wanted.
        devices: of the encoders, one each.
        given: the environment.
        scratch: a directory in shared memory for stores and embeddings.

    Raises:
        PortError, SettingsError
    """
    platform = next((known for known in PLATFORMS if known == given.get("DEVICE_PLATFORM", "cpu")), None)
    if platform is None:
        raise SettingsError(f"DEVICE_PLATFORM must be one of {', '.join(PLATFORMS)}, got {given['DEVICE_PLATFORM']!r}")
    vllm = program(given.get("VLLM", "vllm"), "VLLM", "epd.sh")
    beside = Path(vllm).with_name("vllm-router")
    router = program(
        given.get("VLLM_ROUTER") or (str(beside) if beside.exists() else "vllm-router"), "VLLM_ROUTER", "epd.sh"
    )
    encoders = [] if artifact is None else encoders_of(artifact, devices, given, ports, scratch)

    visible = given.get(AFFINITY.get(platform, ""), "0,1").split(",")

    def worker(role: Role, device: str, ec_transfer: Mapping[str, Any] | None) -> Part:
        upper = role.upper()
        return vllm_worker(
            role,
            model,
            program=vllm,
            port=ports.take(f"{upper}_PORT"),
            side_channel_port=ports.take(f"{upper}_NIXL_PORT"),
            platform=platform,
            devices=given.get(f"{upper}_DEVICES", device),
            arguments=[*flags(given, "VLLM_ARGS"), *flags(given, f"{upper}_ARGS")],
            ec_transfer=ec_transfer,
            given=given,
        )

    addresses = [encoder.where for encoder in encoders]
    prefill = worker("prefill", visible[0], _connector(addresses, scratch, given) if encoders else None)
    decode = worker("decode", visible[:2][-1], None)
    host, port = given.get("HOST", HOST), ports.take("ROUTER_PORT")
    url = f"http://{HOST if host == '0.0.0.0' else host}:{port}"
    command = [router, "--vllm-pd-disaggregation", "--prefill", prefill.where, "--decode", decode.where]
    command += ["--host", host, "--port", str(port)]
    command += ["--prometheus-host", HOST, "--prometheus-port", str(ports.take("ROUTER_METRICS_PORT"))]
    command += flags(given, "ROUTER_ARGS")
    return Chain(
        name="epd",
        # The router looks for its workers only every 30 seconds.
        stages=[
            [*encoders, prefill, decode],
            [Part(name="router", command=command, where=url, ready=answers(f"{url}/v1/models"))],
        ],
        url=url,
        hint=f"try: {example(url)}",
        ready_s=seconds(given, "READY_SECONDS", "600"),
    )


def _connector(addresses: Sequence[str], directory: Path, given: Mapping[str, str]) -> dict[str, Any]:
    try:
        options = json.loads(given.get("CONNECTOR_OPTIONS") or "{}")
    except json.JSONDecodeError as error:
        raise SettingsError(f"CONNECTOR_OPTIONS is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise SettingsError(f"CONNECTOR_OPTIONS must be a JSON object, got {given['CONNECTOR_OPTIONS']}")
    return {
        "ec_connector": "EncoderSidecarConnector",
        "ec_connector_module_path": "sidecar.integrations.vllm",
        "ec_role": "ec_consumer",
        # What a killed prefill leaves there goes with the rest of the chain.
        "ec_connector_extra_config": {"address": list(addresses), "directory": str(directory), **options},
    }


def _artifact(options: argparse.Namespace, given: Mapping[str, str]) -> Path | None:
    connector = given.get("CONNECTOR", "on")
    if connector not in ("on", "off"):
        raise SettingsError(f"CONNECTOR must be on or off, got {connector!r}")
    return artifact_of(options.model, options.artifact) if connector == "on" else None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="epd.sh",
        description=__doc__,
        epilog=_ENVIRONMENT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="as `vllm serve` takes it")
    parser.add_argument("artifact", metavar="ARTIFACT", nargs="?", type=Path, help="artifacts/… of MODEL unless given")
    parser.add_argument("--device", action="append", metavar="DEVICE", help="cpu, cuda:0, …: an encoder on each")
    options = parser.parse_args()
    given = dict(os.environ)
    devices = options.device or given.get("ENCODER_DEVICES", "").replace(",", " ").split() or ["cpu"]
    shared_memory = Path("/dev/shm")
    scratch = Path(tempfile.mkdtemp(prefix="epd-chain-", dir=shared_memory if shared_memory.is_dir() else None))
    ports = Ports(given)
    try:
        chain = plan(options.model, _artifact(options, given), devices, given, ports, scratch)
        logs = Path(given.get("LOG_DIR") or tempfile.mkdtemp(prefix="epd-logs-")).absolute()
        logs.mkdir(parents=True, exist_ok=True)
    except (OSError, PortError, SettingsError) as error:
        sys.stderr.write(f"epd.sh: {error}\n")
        shutil.rmtree(scratch, ignore_errors=True)
        return BAD_SETTINGS
    code = run(chain, logs, scratch)
    if code == STOPPED and not given.get("LOG_DIR"):
        shutil.rmtree(logs, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
