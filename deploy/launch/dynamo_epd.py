"""The EPD chain inside NVIDIA Dynamo: encoder sidecars, Dynamo's encode component over them, prefill, decode, its frontend.

deploy/launch/dynamo_epd.sh MODEL [ARTIFACT] [--device DEVICE]… [--encoders COUNT]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from deploy.launch.chain import BAD_SETTINGS, EXIT_CODES, STOPPED, Chain, run
from deploy.launch.encoder import encoders
from deploy.launch.ports import HOST, PortError, Ports
from deploy.launch.readiness import answers, lists_a_model
from deploy.launch.settings import SettingsError, artifact_of, example, flags, program, seconds
from deploy.launch.supervisor import Part
from deploy.launch.vllm_worker import AFFINITY, CPU_FLAGS, NIXL_IDLE, PLATFORMS, cpu_environment

SCRIPT = "dynamo_epd.sh"
_ENVIRONMENT = f"""
environment, all of it optional:
  PYTHON                   python of the sidecars, and of this launcher (.venv/bin/python, else python3)
  DYNAMO_PYTHON            python that has ai-dynamo[vllm] and this project's client (PYTHON)
  DEVICE_PLATFORM          cpu, cuda or xpu: what prefill and decode run on (cpu)
  PREFILL_DEVICES, DECODE_DEVICES
                           their devices, as CUDA_VISIBLE_DEVICES or ZE_AFFINITY_MASK names them (the first
                           and the second of that variable, else 0 and 1)
  KV_BUFFER_DEVICE         where NIXL moves the KV cache from and to (the platform)
  DYN_ENCODER_DEVICE, ENCODER_DEVICES
                           as --device, with spaces or commas between (cpu)
  SIDECARS                 addresses of sidecars that run already, instead of starting any
  ENCODER_ARGS             further flags of `python -m sidecar serve`; EPD_… variables work too
  WORKER_ARGS              further flags of `python -m sidecar.integrations.dynamo`
  VLLM_ARGS, PREFILL_ARGS, DECODE_ARGS
                           further flags of `python -m dynamo.vllm`, for both or for one
  FRONTEND_ARGS            further flags of `python -m dynamo.frontend`
  TRANSFER_MODE            local, nixl-write or nixl-read: how prefill gets embeddings (local)
  HOST                     what the frontend listens on (127.0.0.1); everything else stays on loopback
  FRONTEND_PORT, WORKER_SYSTEM_PORT, PREFILL_SYSTEM_PORT, DECODE_SYSTEM_PORT, PREFILL_NIXL_PORT, DECODE_NIXL_PORT,
  ENCODER_PORTS, ENCODER_METRICS_PORTS
                           each a free one unless named; lists have one for each encoder
  LOG_DIR                  where each part's log is kept (a temporary directory, removed after a clean end)
  READY_SECONDS            how long the parts may take to be ready (600)
  DYN_…                    Dynamo's own; discovery by files, TCP and ZMQ unless they say otherwise: no etcd, no NATS

{EXIT_CODES}
"""
_MODES = ("local", "nixl-write", "nixl-read")
# ai-dynamo-runtime alone has a `dynamo` too, without workers.
_MISSING = """
from importlib.util import find_spec
missing = [name for name in ("dynamo", "vllm", "grpc") if find_spec(name) is None]
print(*missing or [name for name in ("dynamo.frontend", "dynamo.vllm") if find_spec(name) is None])
"""


def plan(
    model: str, artifact: Path | None, devices: Sequence[str], given: Mapping[str, str], ports: Ports, scratch: Path
) -> Chain:
    """What to start.

    Args:
        artifact: what the encoders serve; None where they run already.
        devices: of the encoders, one each.
        given: the environment.
        scratch: a directory in shared memory for stores, embeddings and discovery.

    Raises:
        PortError, SettingsError
    """
    platform = given.get("DEVICE_PLATFORM", "cpu")
    if platform not in PLATFORMS:
        raise SettingsError(f"DEVICE_PLATFORM must be one of {', '.join(PLATFORMS)}, got {platform!r}")
    mode = given.get("TRANSFER_MODE", "local")
    if mode not in _MODES:
        raise SettingsError(f"TRANSFER_MODE must be one of {', '.join(_MODES)}, got {mode!r}")
    python = program(given.get("DYNAMO_PYTHON") or given.get("PYTHON") or sys.executable, "DYNAMO_PYTHON", SCRIPT)
    _check_dynamo(python)
    common = _discovery(given, scratch)
    sidecars = [] if artifact is None else encoders(artifact, devices, given, ports, scratch)
    servers = [part.where for part in sidecars] or given["SIDECARS"].replace(",", " ").split()
    worker = _encode_worker(python, model, servers, mode, common, given, ports, scratch)
    visible = given.get(AFFINITY.get(platform, ""), "0,1").split(",")
    roles: tuple[tuple[Literal["prefill", "decode"], str], ...] = (("prefill", visible[0]), ("decode", visible[:2][-1]))
    workers = [_vllm(python, role, model, platform, device, mode, common, given, ports) for role, device in roles]
    host, port = given.get("HOST", HOST), ports.take("FRONTEND_PORT")
    url = f"http://{HOST if host == '0.0.0.0' else host}:{port}"
    command = [
        python,
        "-m",
        "dynamo.frontend",
        "--http-host",
        host,
        "--http-port",
        str(port),
        *flags(given, "FRONTEND_ARGS"),
    ]
    frontend = Part(name="frontend", command=command, environment=common, where=url, ready=lists_a_model(url))
    return Chain(
        name="dynamo-epd",
        # Sidecars first: a wrong device is told before anything large is loaded.
        stages=[sidecars, [worker, *workers], [frontend]],
        url=url,
        hint=f"try: {example(url, model)}",
        ready_s=seconds(given, "READY_SECONDS", "600"),
    )


def _discovery(given: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """Variables of every part of Dynamo's. A namespace of this chain's own keeps it from another's workers."""
    files = scratch / "discovery"
    files.mkdir()
    wanted = {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(files),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        "DYN_TCP_RPC_HOST": HOST,
        "DYN_SYSTEM_HOST": HOST,
        "DYN_NAMESPACE": f"epd-{uuid.uuid4().hex[:8]}",
    }
    return {name: given.get(name) or value for name, value in wanted.items()}


def _encode_worker(
    python: str,
    model: str,
    servers: Sequence[str],
    mode: str,
    common: Mapping[str, str],
    given: Mapping[str, str],
    ports: Ports,
    scratch: Path,
) -> Part:
    system = ports.take("WORKER_SYSTEM_PORT", low=True)  # Dynamo reads it as 16 bits with a sign
    command = [python, "-P", "-m", "sidecar.integrations.dynamo", "--server", ",".join(servers), "--model", model]
    command += ["--embedding-transfer-mode", mode, "--local-directory", str(scratch), *flags(given, "WORKER_ARGS")]
    return Part(
        name="encode",
        command=command,
        environment={**common, "DYN_SYSTEM_PORT": str(system)},
        where=f"dyn://{common['DYN_NAMESPACE']}.encode.generate",
        ready=answers(f"http://{HOST}:{system}/health"),
    )


def _vllm(
    python: str,
    role: Literal["prefill", "decode"],
    model: str,
    platform: str,
    device: str,
    mode: str,
    common: Mapping[str, str],
    given: Mapping[str, str],
    ports: Ports,
) -> Part:
    upper = role.upper()
    system = ports.take(f"{upper}_SYSTEM_PORT", low=True)
    kv_transfer = {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_both",
        "kv_buffer_device": given.get("KV_BUFFER_DEVICE", platform),
    }
    command = [python, "-m", "dynamo.vllm", "--model", model, "--disaggregation-mode", role]
    command += ["--enable-multimodal", "--enable-mm-embeds", "--kv-transfer-config", json.dumps(kv_transfer)]
    if role == "prefill":
        command += ["--route-to-encoder", "--embedding-transfer-mode", mode]
    environment = {
        **common,
        "DYN_SYSTEM_PORT": str(system),
        "VLLM_NIXL_SIDE_CHANNEL_HOST": HOST,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(ports.take(f"{upper}_NIXL_PORT")),
    }
    if platform == "cpu":
        command += CPU_FLAGS
        environment |= {name: value for name, value in cpu_environment().items() if name not in given}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(NIXL_IDLE), given.get("PYTHONPATH")]))
    else:
        environment[AFFINITY[platform]] = given.get(f"{upper}_DEVICES", device)
    return Part(
        name=role,
        command=[*command, *flags(given, "VLLM_ARGS"), *flags(given, f"{upper}_ARGS")],
        environment=environment,
        where=f"http://{HOST}:{system}",
        ready=answers(f"http://{HOST}:{system}/health"),
    )


def _check_dynamo(python: str) -> None:
    """Now, and not when a part that needs it dies."""
    looked = subprocess.run([python, "-P", "-c", _MISSING], capture_output=True, text=True, check=False)
    if looked.returncode != 0:
        raise SettingsError(
            f"{python} is no Python that runs: {(looked.stderr.strip() or 'it says nothing').splitlines()[-1]}"
        )
    if missing := looked.stdout.split():
        raise SettingsError(
            f"{python} lacks {', '.join(missing)}: say which python has ai-dynamo[vllm] and this project, "
            f"DYNAMO_PYTHON=/path/to/python {SCRIPT} …"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=SCRIPT,
        description=__doc__,
        epilog=_ENVIRONMENT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="as `python -m dynamo.vllm --model` takes it")
    parser.add_argument("artifact", metavar="ARTIFACT", nargs="?", type=Path, help="artifacts/… of MODEL unless given")
    parser.add_argument("--device", action="append", metavar="DEVICE", help="cpu, cuda:0, …: an encoder on each")
    parser.add_argument("--encoders", type=int, default=1, metavar="COUNT", help="so many on each device (%(default)s)")
    options = parser.parse_args()
    if options.encoders < 1:
        parser.error(f"--encoders must be at least 1, got {options.encoders}")
    given = dict(os.environ)
    named = given.get("DYN_ENCODER_DEVICE") or given.get("ENCODER_DEVICES") or "cpu"
    devices = [device for device in options.device or named.replace(",", " ").split() for _ in range(options.encoders)]
    given.pop("DYN_ENCODER_DEVICE", None)  # said to each sidecar by its flag
    shared_memory = Path("/dev/shm")
    scratch = Path(tempfile.mkdtemp(prefix="epd-dynamo-chain-", dir=shared_memory if shared_memory.is_dir() else None))
    try:
        if not devices:
            raise SettingsError("no device is named: give --device cpu, or leave ENCODER_DEVICES empty")
        if given.get("SIDECARS") and not given["SIDECARS"].replace(",", " ").split():
            raise SettingsError("SIDECARS names none: write host:port, or leave it empty")
        artifact = None if given.get("SIDECARS") else artifact_of(options.model, options.artifact)
        chain = plan(options.model, artifact, devices, given, Ports(given), scratch)
        logs = Path(given.get("LOG_DIR") or tempfile.mkdtemp(prefix="epd-logs-")).absolute()
        logs.mkdir(parents=True, exist_ok=True)
    except (OSError, PortError, SettingsError) as error:
        sys.stderr.write(f"{SCRIPT}: {error}\n")
        shutil.rmtree(scratch, ignore_errors=True)
        return BAD_SETTINGS
    code = run(chain, logs, scratch)
    if code == STOPPED and not given.get("LOG_DIR"):
        shutil.rmtree(logs, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
