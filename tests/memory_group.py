"""A cgroup with a limit of memory, for servers that are started inside."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_VERSION_1, _VERSION_2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class MemoryGroup:
    def __init__(self, path: Path, home: Path) -> None:
        self.path = path
        self._home = home

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Processes that are started meanwhile are in the group, and stay there."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (self._home / "cgroup.procs").write_text(str(os.getpid()))

    def most_used(self) -> int:
        """Bytes."""
        names = ("memory.max_usage_in_bytes", "memory.peak")
        return max(int((self.path / name).read_text()) for name in names if (self.path / name).exists())


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Make one, or skip the test where that is not allowed."""
    try:
        group = _make(limit_bytes)
    except OSError as error:
        pytest.skip(f"no cgroup with a memory limit can be made here: {error}")
    try:
        yield group
    finally:
        for _ in range(100):  # what has ended may still be on its way out
            with suppress(OSError):
                group.path.rmdir()
                break
            time.sleep(0.05)


def _make(limit_bytes: int) -> MemoryGroup:
    mounted_1 = (_VERSION_1 / "cgroup.procs").exists()
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory" if mounted_1 else not controllers:
            root = _VERSION_1 if mounted_1 else _VERSION_2
            new = root / f"epd-tests-{os.getpid()}"
            new.mkdir(exist_ok=True)
            (new / ("memory.limit_in_bytes" if mounted_1 else "memory.max")).write_text(str(limit_bytes))
            return MemoryGroup(new, root / path.lstrip("/"))
    raise OSError("no memory controller")
