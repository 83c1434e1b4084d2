"""What tests of the store need: somewhere in shared memory to put one, embeddings of a wanted size, and what it really takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from sidecar.engine.status import LaneIdentity
from sidecar.engine.store import Entry, Store
from sidecar.store_file import Description
from sidecar.vision.dtypes import DType
from sidecar.vision.grid import Grid

LANE = LaneIdentity("cpu", "fake", "nowhere", "f32")


def description(
    tokens: int = 4, width: int = 8, fingerprint: str = "model", dtype: DType = DType.FLOAT32
) -> Description:
    return Description(grid=Grid(1, 2, 2 * tokens), tokens=tokens, width=width, dtype=dtype, fingerprint=fingerprint)


def keep(store: Store, name: str, value: int = 1, what: Description | None = None) -> Entry | None:
    """Write an embedding full of `value`."""
    what = what or description()
    draft = store.write(name, what)
    draft.rows[:] = value
    return draft.publish(LANE)


def kept(store: Store, name: str, value: int = 1, what: Description | None = None) -> Entry:
    entry = keep(store, name, value, what)
    assert entry is not None
    return entry


def holds(store: Store, entry: Entry, value: int = 1) -> bool:
    rows = store.read(entry)
    return rows is not None and bool(np.all(rows == value))


def taken_bytes(directory: Path) -> int:
    """What the files and directories below take of the file system, without the lock's page."""
    found = 0
    for parent, directories, files in os.walk(directory):
        for name in (*directories, *(file for file in files if file != ".lock")):
            try:
                found += os.lstat(os.path.join(parent, name)).st_blocks * 512  # noqa: PTH118
            except FileNotFoundError:
                continue
    return found


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def mappings(directory: Path) -> list[str]:
    """What this process has mapped of a directory's files, those that were removed too."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{directory}/" in line]


@contextmanager
def shared_memory() -> Iterator[Path]:
    """A directory in shared memory, where there is any."""
    where = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="epd-test-", dir=where if os.access(where, os.W_OK) else None) as directory:
        yield Path(directory)


@contextmanager
def small_file_system(at: Path, size: str = "1m") -> Iterator[Path]:
    """A tmpfs of its own. Skips the test where this process may not mount one."""
    at.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield at
    finally:
        # Lazily: what failed may still hold a file.
        subprocess.run(["umount", "-l", str(at)], check=True)
