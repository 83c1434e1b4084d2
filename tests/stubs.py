"""Servers in which OpenVINO does what `tests/stub_runtime` is told, and artifacts for them to reload."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from servers import ROOT

from sidecar.artifact import MANIFEST, SEAL

_STUB = Path(__file__).parent / "stub_runtime"


def with_stub(order: str | Path, cache: Path) -> dict[str, str]:
    """A server's environment: what the stub is told, or the file that says so, and a compile cache."""
    path = os.pathsep.join((str(_STUB), str(ROOT)))
    return {"PYTHONPATH": path, "STUB_OPENVINO": str(order), "XDG_CACHE_HOME": str(cache)}


def another(artifact: Path, served: Path) -> None:
    """Put a copy in the served one's place, whose graph's file has one more space at its end and is another to everybody."""
    copy = served.with_name("arriving")
    shutil.copytree(artifact, copy)
    (graph,) = copy.rglob("*.xml")
    with graph.open("a") as file:
        file.write(" ")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][str(graph.relative_to(copy))] = {
        "sha256": hashlib.sha256(graph.read_bytes()).hexdigest(),
        "bytes": graph.stat().st_size,
    }
    text = json.dumps(manifest)
    (copy / MANIFEST).write_text(text)
    (copy / SEAL).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  {MANIFEST}\n")
    served.rename(served.with_name("gone"))
    copy.rename(served)
