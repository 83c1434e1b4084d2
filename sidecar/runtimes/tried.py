"""What has been loaded and run on this very machine before, and what a process died of: two small files beside the compile cache.

`lane-<hash>.tried`    this combination was loaded and has run here; its content says in words what was combined
`lane-<hash>.loading`  locked by a process that loads it now; without a lock, the process that did has ended in the middle
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sidecar.runtimes.base import Load

SUFFIXES = (_TRIED, _LOADING) = (".tried", ".loading")

_PACKAGES = {"openvino": "openvino", "optimum": "openvino", "onnx": "onnxruntime"}
# Of /proc/cpuinfo: what decides which code a runtime generates. x86's names, then Arm's.
_CPU_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags")
_ARM_FIELDS = ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features")
_ROOT = Path("/")


def combination(runtime: str, content: str, load: Load, root: Path = _ROOT) -> dict[str, str]:
    """Everything that a crash may depend on: what is loaded and how, the runtime's version, and the machine.

    `content`: a hash of the graph's files. `root`: where /proc and /sys are, for tests.
    """
    try:
        release = version(_PACKAGES.get(runtime, runtime))
    except PackageNotFoundError:
        release = ""
    return {
        "files": content,
        "runtime": f"{runtime} {release}",
        "lane": f"{load.precision} on {load.device}, {load.threads} threads, {load.streams} streams, {load.output_dtype}",
        "cpu": _cpu(root),
        "online": _text(root / "sys/devices/system/cpu/online"),
        "possible": _text(root / "sys/devices/system/cpu/possible"),
        "allowed": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "kernel": f"{os.uname().release} {os.uname().machine}",
    }


class Tried:
    """The record of one combination. Without a directory nothing is known and nothing is kept."""

    def __init__(self, directory: Path | None, combination: dict[str, str]) -> None:
        self.name = hashlib.sha256(json.dumps(combination, sort_keys=True).encode()).hexdigest()[:32]
        self._combination = combination
        self._lock: int | None = None
        path = None if directory is None else directory / f"lane-{self.name}"
        self._tried = path and path.with_suffix(_TRIED)
        self._loading = path and path.with_suffix(_LOADING)

    def passed(self) -> bool:
        return self._tried is not None and self._tried.exists()

    def was_cut_short(self) -> str:
        """When a process began to load it and died before it had run; "" if none did, or if one is loading it now."""
        if self._loading is None:
            return ""
        try:
            with self._loading.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file.read() or "a time unknown"
        except OSError:  # there is none, or its lock is held
            return ""

    def begin(self) -> None:
        """Note that this process is about to load it."""
        if self._loading is None:
            return
        with suppress(OSError):  # full, or read-only by now: then nothing is known the next time
            handle = os.open(self._loading, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.truncate(handle, 0)
                os.write(handle, datetime.now(UTC).isoformat(timespec="seconds").encode())
            except OSError:
                os.close(handle)  # another process is loading it
                return
            self._lock = handle

    def end(self) -> None:
        """It ran, or could not be loaded: this process did not crash."""
        if self._lock is None:
            return
        assert self._loading is not None
        with suppress(OSError):
            self._loading.unlink()
        os.close(self._lock)
        self._lock = None

    def pass_(self) -> None:
        """Remember that it was loaded and has run here."""
        if self._tried is not None and not self._tried.exists():
            with suppress(OSError):
                self._tried.write_text(json.dumps(self._combination, indent=1) + "\n")


def _cpu(root: Path) -> str:
    """The first CPU as the kernel describes it; reading all of a large machine's takes long."""
    fields: dict[str, str] = {}
    with suppress(OSError), (root / "proc/cpuinfo").open() as file:
        for line in file:
            if not line.strip():
                break
            name, _, value = line.partition(":")
            fields[name.strip()] = " ".join(value.split())
    return "; ".join(fields[name] for name in (*_CPU_FIELDS, *_ARM_FIELDS) if name in fields)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
