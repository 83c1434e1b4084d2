"""What of the machine is ours, read from made-up /proc and /sys trees; and staying on some of it, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.flags import cpu_list
from sidecar.machine import Cores, MachineError, _shown, pin, usable_cores

Tree = Callable[[dict[str, str]], Path]
MINE = sorted(os.sched_getaffinity(0))
TWO = pytest.mark.skipif(len(MINE) < 2, reason="needs two CPUs")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    def make(files: dict[str, str]) -> Path:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


@pytest.fixture
def affinity(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], list[set[int]]]:
    """Say where this process may run; returns the list of what it then asks for."""

    def allow(cpus: set[int]) -> list[set[int]]:
        asked: list[set[int]] = []
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cpus))
        monkeypatch.setattr(os, "sched_setaffinity", lambda _, wanted: asked.append(set(wanted)))
        return asked

    return allow


def siblings(**pairs: str) -> dict[str, str]:
    return {
        f"sys/devices/system/cpu/{cpu}/topology/thread_siblings_list": f"{shared}\n" for cpu, shared in pairs.items()
    }


# For each machine: its files, and the quota that a process there has.
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu"
QUOTAS: dict[str, tuple[dict[str, str], float | None]] = {
    "nothing at all": ({}, None),
    "no cgroups": ({"proc/self/cgroup": ""}, None),
    "v2 without a limit": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/cpu.max": "max 100000\n"}, None),
    "v2 without the controller": ({"proc/self/cgroup": "0::/a\n"}, None),
    "v2": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/cpu.max": "400000 100000\n"}, 4.0),
    "v2, a fraction": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/cpu.max": "250000 100000\n"}, 2.5),
    "v2, another period": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/cpu.max": "75000 50000\n"}, 1.5),
    "v2 in a container's own namespace": ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "300000 100000\n"}, 3.0),
    "v2 of a pod: the inner is less": (
        {
            "proc/self/cgroup": "0::/pods/pod/box\n",
            f"{V2}/pods/pod/cpu.max": "800000 100000",
            f"{V2}/pods/pod/box/cpu.max": "200000 100000",
        },
        2.0,
    ),
    "v2 of a pod: the outer is less": (
        {
            "proc/self/cgroup": "0::/pods/pod/box\n",
            f"{V2}/pods/cpu.max": "max 100000",
            f"{V2}/pods/pod/cpu.max": "150000 100000",
            f"{V2}/pods/pod/box/cpu.max": "max 100000",
        },
        1.5,
    ),
    "v2 with a colon in its path": ({"proc/self/cgroup": "0::/a:b\n", f"{V2}/a:b/cpu.max": "200000 100000"}, 2.0),
    "v2 from outside of its namespace": ({"proc/self/cgroup": "0::/../../x\n", "sys/cpu.max": "100000 100000"}, None),
    "v2, damaged": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/cpu.max": "lots of it\n"}, None),
    "v2, a period of 0": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/cpu.max": "100000 0\n"}, None),
    "v2, empty": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/cpu.max": ""}, None),
    "v1 without a limit": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/a\n",
            f"{V1}/a/cpu.cfs_quota_us": "-1\n",
            f"{V1}/a/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "v1": (
        {
            "proc/self/cgroup": "9:name=systemd:/\n5:cpuset:/b\n4:cpuacct,cpu:/a\n",
            f"{V1}/a/cpu.cfs_quota_us": "600000\n",
            f"{V1}/a/cpu.cfs_period_us": "100000\n",
            f"{V1}/b/cpu.cfs_quota_us": "100000\n",
            f"{V1}/b/cpu.cfs_period_us": "100000\n",
        },
        6.0,
    ),
    "v1 in a container that sees its own group as the root": (
        {
            "proc/self/cgroup": "4:cpu:/docker/0123\n0::/\n",
            f"{V1}/cpu.cfs_quota_us": "50000\n",
            f"{V1}/cpu.cfs_period_us": "100000\n",
        },
        0.5,
    ),
    "v1 without a period": ({"proc/self/cgroup": "4:cpu:/a\n", f"{V1}/a/cpu.cfs_quota_us": "100000\n"}, None),
}


@pytest.mark.parametrize("machine", QUOTAS)
def test_the_least_quota_on_the_way_up_counts(tree: Tree, machine: str) -> None:
    files, quota = QUOTAS[machine]
    assert usable_cores(tree(files)).quota == quota


def test_two_threads_of_a_core_are_one_core(tree: Tree, affinity: Callable[[set[int]], object]) -> None:
    root = tree(
        siblings(cpu0="0,4", cpu1="1,5", cpu2="2,6", cpu3="3,7", cpu4="0,4", cpu5="1,5", cpu6="2,6", cpu7="3,7")
    )
    affinity(set(range(8)))
    assert usable_cores(root) == Cores(8, 4, None)
    affinity({0, 1, 4})
    assert usable_cores(root) == Cores(3, 2, None)
    affinity({6})
    assert usable_cores(root) == Cores(1, 1, None)


def test_without_a_topology_every_cpu_is_a_core(tree: Tree, affinity: Callable[[set[int]], object]) -> None:
    affinity({0, 1, 2})
    assert usable_cores(tree(siblings(cpu0="0"))) == Cores(3, 3, None)


@pytest.mark.parametrize(
    ("physical", "quota", "threads"),
    [(8, None, 8), (8, 4.0, 4), (8, 2.5, 2), (8, 0.5, 1), (8, 0.01, 1), (4, 16.0, 4), (8, 2.999, 3), (1, None, 1)],
)
def test_no_more_threads_than_compute_at_full_speed(physical: int, quota: float | None, threads: int) -> None:
    assert Cores(2 * physical, physical, quota).threads == threads


def test_what_there_is_is_said_for_the_log() -> None:
    assert str(Cores(8, 4, None)) == "8 CPUs on 4 cores"
    assert str(Cores(8, 4, 2.5)) == "8 CPUs on 4 cores, a quota of 2.5"


def test_this_machine_can_be_read() -> None:
    cores = usable_cores()
    assert 1 <= cores.threads <= cores.physical <= cores.cpus == len(MINE)


def nodes(**lists: str) -> dict[str, str]:
    return {f"sys/devices/system/node/{node}/cpulist": f"{cpus}\n" for node, cpus in lists.items()}


TWO_NODES = nodes(node0="0-3,8-11", node1="4-7,12-15", node2="")


@pytest.mark.parametrize(
    ("cpus", "node", "stays_on"),
    [
        ((), -1, None),
        ((1, 2), -1, {1, 2}),
        ((), 1, {4, 5, 6, 7, 12, 13, 14, 15}),
        ((3, 4, 5), 1, {4, 5}),
    ],
)
def test_it_stays_where_it_is_told_to(
    tree: Tree,
    affinity: Callable[[set[int]], list[set[int]]],
    cpus: tuple[int, ...],
    node: int,
    stays_on: set[int] | None,
) -> None:
    asked = affinity(set(range(16)))
    pin(cpus, node, tree(TWO_NODES))
    assert asked == ([] if stays_on is None else [stays_on])


def test_of_a_node_it_takes_what_its_container_was_given(
    tree: Tree, affinity: Callable[[set[int]], list[set[int]]]
) -> None:
    asked = affinity({2, 3, 4})
    pin((), 0, tree(TWO_NODES))
    assert asked == [{2, 3}]


@pytest.mark.parametrize(
    ("cpus", "node", "message"),
    [
        ((2, 16, 17, 99), -1, "--cpus: this process may not run on 16-17,99; name some of 0-7"),
        ((2,), 1, "--cpus: none of them is on --numa-node 1, which has 4-7"),
        ((), 7, "--numa-node 7: this machine has no such node"),
        ((), 2, "--numa-node 2: this process may run on no CPU of it, only on 0-7"),
        ((), 3, "--numa-node 3: this process may run on no CPU of it, only on 0-7"),
    ],
)
def test_what_it_cannot_have_is_told(
    tree: Tree, affinity: Callable[[set[int]], list[set[int]]], cpus: tuple[int, ...], node: int, message: str
) -> None:
    asked = affinity(set(range(8)))
    with pytest.raises(MachineError) as raised:
        pin(cpus, node, tree(TWO_NODES | nodes(node3="20-23")))
    assert str(raised.value) == message
    assert asked == []


@given(st.sets(st.integers(0, 300)))
def test_cpus_are_shown_as_they_are_read(cpus: set[int]) -> None:
    assert set(cpu_list(_shown(cpus))) == cpus


CHILD = """
import os, threading
from pathlib import Path
from sidecar.machine import pin, usable_cores
pin(({cpu},), -1)
seen = []
thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
thread.start()
thread.join()
print(seen == [{{{cpu}}}], usable_cores().cpus)
"""


@TWO
def test_a_process_and_its_threads_stay_on_their_cpu() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(cpu=MINE[-1])], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True 1\n"
    assert sorted(os.sched_getaffinity(0)) == MINE
