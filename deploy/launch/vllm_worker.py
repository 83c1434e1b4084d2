"""vLLM's part of a chain: the command and the environment of a prefill or a decode worker, by device platform."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from deploy.launch.ports import HOST
from deploy.launch.readiness import answers
from deploy.launch.supervisor import Part

Platform = Literal["cpu", "cuda", "xpu"]
PLATFORMS: tuple[Platform, ...] = get_args(Platform)
Role = Literal["prefill", "decode"]

_KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}
# Which devices of the machine a process sees.
AFFINITY = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}
# Engine and worker in one process (with VLLM_ENABLE_V1_MULTIPROCESSING=0): between two, requests stall for many seconds on few
# cores. Several workers (--tensor-parallel-size) need `--distributed-executor-backend mp` and =1.
CPU_FLAGS = ("--enforce-eager", "--distributed-executor-backend", "uni")
NIXL_IDLE = Path(__file__).parent / "nixl_idle"


def vllm_worker(
    role: Role,
    model: str,
    *,
    program: str,
    port: int,
    side_channel_port: int,
    platform: Platform,
    devices: str,
    arguments: Sequence[str],
    ec_transfer: Mapping[str, Any] | None,
    given: Mapping[str, str],
) -> Part:
    """
    Args:
        program: the `vllm` command.
        port: of its HTTP server.
        side_channel_port: where NIXL's handshake is answered.
        devices: of the platform, as its affinity variable takes them.
        arguments: further flags of `vllm serve`; the last of two counts.
        ec_transfer: `--ec-transfer-config`, where it takes embeddings from sidecars.
        given: the user's environment, which nothing here overrides.
    """
    kv_transfer = {
        "kv_connector": "NixlConnector",
        "kv_role": _KV_ROLES[role],
        "kv_buffer_device": given.get("KV_BUFFER_DEVICE", platform),
    }
    command = [program, "serve", model, "--host", HOST, "--port", str(port)]
    command += ["--kv-transfer-config", json.dumps(kv_transfer)]
    if ec_transfer is not None:
        command += ["--ec-transfer-config", json.dumps(ec_transfer)]
    if platform == "cpu":
        command += CPU_FLAGS
    environment = {"VLLM_NIXL_SIDE_CHANNEL_HOST": HOST, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channel_port)}
    if platform == "cpu":
        environment |= {name: value for name, value in cpu_environment().items() if name not in given}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(NIXL_IDLE), given.get("PYTHONPATH")]))
    else:
        environment[AFFINITY[platform]] = devices
    return Part(
        name=role,
        command=[*command, *arguments],
        environment=environment,
        where=f"http://{HOST}:{port}",
        ready=answers(f"http://{HOST}:{port}/health"),
    )


def cpu_environment() -> dict[str, str]:
    """So that both workers and the encoders run beside each other on the cores of one machine."""
    cores = len(os.sched_getaffinity(0))
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # vLLM would bind each worker's threads to the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, cores // 2)),
        "UCX_TLS": "tcp",
        "NIXL_PTHR_DELAY_US": "1000",
    }
