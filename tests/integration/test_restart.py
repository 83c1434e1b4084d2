"""Sidecars die and come back under load; vLLM's workers do not, and no request hangs."""

from __future__ import annotations

import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from servers import spawn
from vllm_servers import Answer, VllmServer, noise_png, vllm_server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

REQUESTS, AT_ONCE = 50, 8
ITEMS = "vllm:ec_sidecar_items_total"


class RestartableSidecar:
    """At one address for all its lives."""

    def __init__(self, artifact: Path, directory: Path) -> None:
        directory.mkdir()
        self._artifact, self._directory = artifact, directory
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        flags = ("--precision", "f32", "--embedding-dtype", "float32", "--warm-up-seconds", "0")
        store = self._directory / "store"
        self._process, log = spawn(self._artifact, self._directory, *flags, "--store", str(store), listen=self.address)
        ends = time.monotonic() + 60
        while " ready on " not in log.read_text():
            assert self._process.poll() is None and time.monotonic() < ends, log.read_text()
            time.sleep(0.02)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def sidecars(toy_artifact: Path, tmp_path: Path) -> Iterator[Callable[[], RestartableSidecar]]:
    made: list[RestartableSidecar] = []

    def begin() -> RestartableSidecar:
        made.append(RestartableSidecar(toy_artifact, tmp_path / f"sidecar-{len(made)}"))
        made[-1].begin()
        return made[-1]

    yield begin
    for sidecar in made:
        sidecar.kill()


@contextmanager
def fifty_requests(server: VllmServer, first: int) -> Iterator[list[Future[tuple[Answer, float]]]]:
    """Under way while the block runs, and all answered after it."""

    def timed(number: int) -> tuple[Answer, float]:
        begun = time.monotonic()
        answer = server.ask(f"picture {number}?", noise_png(number), tokens=2)
        return answer, time.monotonic() - begun

    with ThreadPoolExecutor(AT_ONCE) as pool:
        asked = [pool.submit(timed, first + number) for number in range(REQUESTS)]
        yield asked


def wait_for_answers(asked: list[Future[tuple[Answer, float]]], count: int) -> None:
    while sum(future.done() for future in asked) < count:
        time.sleep(0.005)


def tell(what: str, asked: list[Future[tuple[Answer, float]]]) -> Counter[int]:
    statuses = Counter(future.result()[0].status for future in asked)
    seconds = sorted(future.result()[1] for future in asked)
    print(f"\n{what}: {dict(statuses)}; median {seconds[len(seconds) // 2]:.2f} s, longest {seconds[-1]:.2f} s", end="")
    return statuses


def test_tensor_parallel_workers_read_the_same_file(
    toy_checkpoint: Path, sidecars: Callable[[], RestartableSidecar], tmp_path: Path
) -> None:
    sidecar = sidecars()
    options = {"address": sidecar.address, "on_failure": "fail", "directory": str(tmp_path)}
    parallel = ("--tensor-parallel-size", "2")
    with vllm_server(toy_checkpoint, tmp_path / "vllm.log", *parallel, connector=options) as server:
        answers = [server.ask("which?", noise_png(number), noise_png(number + 1)) for number in range(10, 14)]
        assert all(answer.ok for answer in answers), answers
        assert server.metric(ITEMS, outcome="linked") == 5


def test_one_sidecar_killed_and_restarted(
    toy_checkpoint: Path, sidecars: Callable[[], RestartableSidecar], tmp_path: Path
) -> None:
    sidecar = sidecars()
    options = {"address": sidecar.address, "on_failure": "fail", "directory": str(tmp_path), "timeout_s": 100}
    with vllm_server(toy_checkpoint, tmp_path / "vllm.log", connector=options) as server:
        assert server.ask("warm?", noise_png(1)).ok
        with fifty_requests(server, 1000) as asked:
            wait_for_answers(asked, 10)
            sidecar.kill()
            killed_at = sum(future.done() for future in asked)
            sidecar.begin()
        statuses = tell(f"killed after {killed_at} of {REQUESTS}, restarted", asked)
        assert statuses == {200: REQUESTS}
        assert server.metric(ITEMS, outcome="encoded_locally") == server.metric(ITEMS, outcome="failed") == 0
        assert server.ask("and one more?", noise_png(2)).ok


def test_of_two_sidecars_one_is_killed_then_both(
    toy_checkpoint: Path, sidecars: Callable[[], RestartableSidecar], tmp_path: Path
) -> None:
    first, second = sidecars(), sidecars()
    options = {"address": [first.address, second.address], "directory": str(tmp_path), "unreachable_s": 1.0}
    with vllm_server(toy_checkpoint, tmp_path / "vllm.log", connector=options) as server:
        assert server.ask("warm?", noise_png(1)).ok
        with fifty_requests(server, 2000) as asked:
            wait_for_answers(asked, 10)
            first.kill()
        assert tell("one of two killed", asked) == {200: REQUESTS}
        assert server.metric(ITEMS, outcome="encoded_locally") == 0
        with fifty_requests(server, 3000) as asked:
            wait_for_answers(asked, 10)
            second.kill()
        assert tell("the other killed too", asked) == {200: REQUESTS}
        local = server.metric(ITEMS, outcome="encoded_locally")
        print(f", {local:.0f} encoded by vLLM", end="")
        assert 0 < local < REQUESTS
        first.begin()
        before = server.metric(ITEMS, outcome="sent")
        deadline = time.monotonic() + 30
        number = 4000
        while server.metric(ITEMS, outcome="sent") == before:
            assert time.monotonic() < deadline, "a sidecar that came back is not used again"
            assert server.ask("back?", noise_png(number)).ok
            number += 1
