"""SIGTERM at any moment: the process ends within its drain and a second, with the documented exit code."""

from __future__ import annotations

import random
import shutil
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from load import slow_item, wait_until
from servers import Server, exit_code, spawn, start
from stubs import another, with_stub

from sidecar.client import EncodeError, EncoderClient

pytestmark = pytest.mark.soak

DRAIN_S = 2.0
FLAGS = ("--drain-seconds", f"{DRAIN_S:g}", "--threads", "1", "--precision", "f32")
CUT_SHORT = "stopped with a run still going on"
_TERM = 1 << (signal.SIGTERM - 1)


def handles_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) & _TERM)


def ending(server: Server) -> tuple[int, float]:
    """SIGTERM; the exit code, and the seconds until then."""
    begun = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    return exit_code(server.process), time.monotonic() - begun


def while_it_starts(artifact: Path, directory: Path, after_s: float, *, cold: bool) -> tuple[Server, int, float]:
    """`after_s` counts from where the process handles signals; before, Python itself starts."""
    added = {"XDG_CACHE_HOME": str(directory / "cache")} if cold else None
    process, log = spawn(artifact, directory, *FLAGS, listen="127.0.0.1:0", added=added)
    wait_until("a handler", lambda: handles_sigterm(process.pid))
    time.sleep(after_s)
    server = Server(process, log, "", directory)
    return server, *ending(server)


def while_it_reloads(artifact: Path, directory: Path, after_s: float, order: str = "") -> tuple[Server, int, float]:
    """Beside a caller with one slow item after another. It is another artifact, so that a child process tries it first."""
    said, served = directory / "order", directory / "served"
    said.write_text("")
    shutil.copytree(artifact, served)
    server = start(served, directory, *FLAGS, added=with_stub(said, directory / "cache"))
    said.write_text(order)
    another(artifact, served)
    calling = threading.Thread(target=call_until_it_ends, args=(server.address,))
    calling.start()
    time.sleep(0.2)
    server.process.send_signal(signal.SIGHUP)
    time.sleep(after_s)
    try:
        return server, *ending(server)
    finally:
        calling.join(30)


def call_until_it_ends(address: str) -> None:
    with EncoderClient(address) as client, suppress(EncodeError):
        for number in range(1000):
            client.encode([slow_item(number, 448)], timeout_s=20)


def judge(server: Server, code: int, took_s: float) -> str:
    log = server.log.read_text()
    assert took_s <= DRAIN_S + 1, (took_s, log)
    assert code == (1 if CUT_SHORT in log else 0), (code, log)
    assert "Traceback" not in log and "Fatal" not in log, log
    return "ready" if " ready on " in log else "not ready yet"


def test_sigterm_at_50_random_moments(toy_artifact: Path, tmp_path: Path) -> None:
    chance = random.Random(11)
    assert start(toy_artifact, tmp_path, *FLAGS).terminate() == 0  # from here on, starts with its cache are warm
    kinds: list[tuple[str, Callable[[Path], tuple[Server, int, float]]]] = []
    for _ in range(18):
        after_s = chance.uniform(0, 3.0)
        kinds.append(("cold start", lambda at, s=after_s: while_it_starts(toy_artifact, at, s, cold=True)))
    for _ in range(12):
        after_s = chance.uniform(0, 2.5)
        kinds.append(("warm start", lambda at, s=after_s: while_it_starts(toy_artifact, at, s, cold=False)))
    for _ in range(20):
        after_s = chance.uniform(0, 1.5)
        kinds.append(("reload", lambda at, s=after_s: while_it_reloads(toy_artifact, at, s)))
    seconds: dict[str, list[float]] = {}
    states: Counter[str] = Counter()

    def one(number: int) -> None:
        kind, end = kinds[number]
        directory = tmp_path / str(number)
        directory.mkdir()
        server, code, took_s = end(directory)
        states[f"{kind}, {judge(server, code, took_s)}, code {code}"] += 1
        seconds.setdefault(kind, []).append(took_s)
        shutil.rmtree(directory)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(len(kinds))))
    for kind, took in seconds.items():
        print(f"\n{len(took)} × SIGTERM, {kind}: ended after {statistics.median(took):.2f} s, ", end="")
        print(f"at most {max(took):.2f} s, drain {DRAIN_S:g} s", end="")
    print(f"\n{dict(states)}", end="")
    assert sum(states.values()) == 50


@pytest.mark.parametrize("who", ["child", "server"])
def test_sigterm_while_a_model_takes_minutes_to_load(who: str, toy_artifact: Path, tmp_path: Path) -> None:
    """On a reload, beside calls: the load that is given up does not hold up the end."""
    chance = random.Random(12)
    took: list[float] = []
    for number in range(2):
        directory = tmp_path / str(number)
        directory.mkdir()
        after_s = chance.uniform(0.5, 3)
        server, code, took_s = while_it_reloads(toy_artifact, directory, after_s, f"{who} compile 600")
        judge(server, code, took_s)
        assert server.log.read_text().count("lane cpu: loading") == 2
        took.append(took_s)
    print(f"\n2 × SIGTERM while the {who} loads for minutes: ended after at most {max(took):.2f} s", end="")
