"""The 3B tower at its real size with random weights: made and exported once, the export watched for memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from export.checkpoint import Checkpoint, open_checkpoint
from export.synthetic import make_checkpoint

# Exports in a process of its own and reports its peak resident memory (VmHWM, mapped files included) before and after.
_EXPORT = """
import json, re, sys
import onnxruntime, openvino, torch
import export.__main__, export.openvino, export.torch, sidecar.runtimes.openvino

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024

own = peak()
code = export.__main__.main(sys.argv[1:])
print(json.dumps({"code": code, "own": own, "peak": peak()}))
"""


@dataclass(frozen=True)
class RealExport:
    checkpoint: Checkpoint
    artifact: Path
    own_bytes: int
    peak_bytes: int


@pytest.fixture(scope="session")
def real_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("real") / "random-3b"
    make_checkpoint("3b", directory)
    return directory


@pytest.fixture(scope="session")
def real_export(real_checkpoint: Path) -> RealExport:
    artifact = real_checkpoint.parent / "artifact"
    command = [sys.executable, "-c", _EXPORT, "--model", str(real_checkpoint), "--out", str(artifact)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["code"] == 0, done.stdout
    print(done.stdout)
    return RealExport(open_checkpoint(str(real_checkpoint)), artifact, report["own"], report["peak"])
