"""Encoder sidecars as parts of a chain, one for each device."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.launch.ports import HOST, Ports
from deploy.launch.readiness import answers
from deploy.launch.settings import flags
from deploy.launch.supervisor import Part


def encoders(
    artifact: Path, devices: Sequence[str], given: Mapping[str, str], ports: Ports, scratch: Path
) -> list[Part]:
    parts = []
    count = len(devices)
    listen, metrics = (ports.take_many(name, count) for name in ("ENCODER_PORTS", "ENCODER_METRICS_PORTS"))
    for number, (device, port, metrics_port) in enumerate(zip(devices, listen, metrics, strict=True)):
        name = f"encoder-{number}"
        where, page = f"{HOST}:{port}", f"{HOST}:{metrics_port}"
        command = [given.get("PYTHON") or sys.executable, "-P", "-m", "sidecar", "serve", "--artifact", str(artifact)]
        command += ["--device", device, "--listen", where, "--metrics-listen", page]
        if "EPD_STORE" not in given:
            command += ["--store", str(scratch / name)]
        elif count > 1 and given["EPD_STORE"] != "none":  # each needs one of its own
            command += ["--store", str(Path(given["EPD_STORE"]) / name)]
        command += flags(given, "ENCODER_ARGS")
        parts.append(Part(name=name, command=command, where=where, ready=answers(f"http://{page}/healthz")))
    return parts
