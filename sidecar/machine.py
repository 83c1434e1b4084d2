"""What of this machine the process really has: affinity, cgroup quota, physical cores, NUMA nodes.

A container sees all of the host's CPUs, and a runtime that starts a thread for each of them is throttled by its quota: some
threads then wait for a whole scheduler period in the middle of every parallel loop.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sidecar.flags import cpu_list

_ROOT = Path("/")
_M_ARENA_MAX = -8
# More than this server can use, and still cheap for code that walks over all possible descriptors.
_MOST_DESCRIPTORS = 65_536


class MachineError(ValueError):
    """CPUs or a NUMA node that this process cannot have."""


@dataclass(frozen=True, slots=True)
class Cores:
    """`cpus` that the process may run on, the `physical` cores under them, and the cgroup's `quota` in CPUs, if it has one."""

    cpus: int
    physical: int
    quota: float | None

    @property
    def threads(self) -> int:
        """How many threads compute at full speed here: one a physical core, and none that the quota would stop."""
        return max(1, min(self.physical, self.physical if self.quota is None else math.floor(self.quota + 0.01)))

    def __str__(self) -> str:
        quota = "" if self.quota is None else f", a quota of {self.quota:g}"
        return f"{self.cpus} CPUs on {self.physical} cores{quota}"


def usable_cores(root: Path = _ROOT) -> Cores:
    """Read what is so now. `root`: where /proc and /sys are, for tests."""
    cpus = os.sched_getaffinity(0)
    return Cores(len(cpus), _physical(cpus, root), _quota(root))


def pin(cpus: Iterable[int], numa_node: int, root: Path = _ROOT) -> None:
    """Stay on these CPUs, and on those of a NUMA node unless it is -1: its memory follows, since pages come from the node of
    the thread that first writes to them. Threads inherit it, so it must come before they do.

    Raises:
        MachineError: if one of `cpus`, or every CPU of the node, is not for this process.
    """
    wanted, allowed = set(cpus), os.sched_getaffinity(0)
    if missing := wanted - allowed:
        raise MachineError(f"--cpus: this process may not run on {_shown(missing)}; name some of {_shown(allowed)}")
    if numa_node >= 0:
        # A container may have been given a part of the node.
        if not (node := _node(numa_node, root) & allowed):
            raise MachineError(
                f"--numa-node {numa_node}: this process may run on no CPU of it, only on {_shown(allowed)}"
            )
        if wanted and not wanted & node:
            raise MachineError(f"--cpus: none of them is on --numa-node {numa_node}, which has {_shown(node)}")
        wanted = wanted & node or node
    if wanted:
        os.sched_setaffinity(0, wanted)


def _node(number: int, root: Path) -> set[int]:
    try:
        return set(cpu_list((root / f"sys/devices/system/node/node{number}/cpulist").read_text().strip()))
    except OSError:
        raise MachineError(f"--numa-node {number}: this machine has no such node") from None


def _shown(cpus: Iterable[int]) -> str:
    """As `cpu_list` reads it: {0, 1, 2, 8} → 0-2,8."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][-1] == cpu - 1:
            runs[-1][1:] = [cpu]
        else:
            runs.append([cpu])
    return ",".join("-".join(map(str, run)) for run in runs)


def share_heap() -> None:
    """One heap for all threads instead of one for each: what one thread frees, the next run can have (mallopt(3)). To be called
    before there are threads."""
    with suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def raise_descriptor_limit() -> int:
    """Raise the soft limit on open files to the hard limit, at most 65,536, and return the limit that holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return _MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # a sandbox may forbid it
        return soft
    return wanted


def return_freed_memory() -> None:
    """Give back what was freed and lies in holes between what was not: glibc keeps it, and runs of every size leave many."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class _Mallinfo2(ctypes.Structure):
    """mallinfo(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def memory_in_use() -> int:
    """Bytes that C code has allocated and not freed: what grpc and decoders hold, without what glibc keeps for later. Without
    glibc 2.33, the resident set. Takes microseconds."""
    with suppress(OSError, AttributeError):
        mallinfo2 = ctypes.CDLL(None).mallinfo2
        mallinfo2.restype = _Mallinfo2
        information = mallinfo2()
        return int(information.uordblks) + int(information.hblkhd)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _physical(cpus: Iterable[int], root: Path) -> int:
    cores = set()
    for cpu in cpus:
        siblings = str(cpu)
        with suppress(OSError):
            siblings = (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
        cores.add(siblings)
    return len(cores)


def _quota(root: Path) -> float | None:
    """The least quota on the way up from this process's cgroup, in CPUs (cgroups(7); cpu.max of version 2, cfs of version 1)."""
    quotas = []
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mount, version = root / "sys/fs/cgroup", 2
        elif "cpu" in controllers.split(","):
            mount, version = root / "sys/fs/cgroup/cpu", 1
        else:
            continue
        group = Path(path.strip().lstrip("/"))
        for level in (group, *group.parents):
            quotas += _quota_at(mount / level, version)
    return min(quotas, default=None)


def _quota_at(group: Path, version: int) -> list[float]:
    if version == 2:
        words = [word for line in _lines(group / "cpu.max") for word in line.split()]
    else:
        words = [line.strip() for name in ("quota", "period") for line in _lines(group / f"cpu.cfs_{name}_us")]
    if len(words) != 2 or not all(word.isdecimal() for word in words):  # "max", -1, or not there: no quota
        return []
    return [int(words[0]) / int(words[1])] if int(words[1]) else []


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
