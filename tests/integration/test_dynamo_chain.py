"""The real chain inside Dynamo on CPU: frontend, our encode component over two sidecars, prefill and decode by `dynamo.vllm`."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chains import all_ended, started
from dynamo_chains import DYNAMO_ENVIRONMENT, DynamoChain
from faulty_sidecar import Fault, FaultySidecar
from servers import Server
from slow_sidecar import SlowSidecar, start
from vllm_servers import Answer, VllmServer, noise_png, vllm_server

from deploy.launch.chain import STOPPED
from sidecar.client import EncoderClient

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
]

EXACT = ("--precision", "f32", "--embedding-dtype", "float32", "--metrics-listen", "127.0.0.1:0")
# A run of one small picture; the other sidecar needs four times as long.
FAST_MS, SLOW_MS = 20.0, 80.0


@pytest.fixture(scope="module")
def sidecars(toy_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SlowSidecar, SlowSidecar]]:
    """A fast one and a slow one, of right embeddings both."""
    both = [
        start(toy_artifact, tmp_path_factory.mktemp("sidecar"), ms, 0.0, *EXACT, "--batch-patches", "0")
        for ms in (FAST_MS, SLOW_MS)
    ]
    yield both[0], both[1]
    for sidecar in both:
        sidecar.end()


@pytest.fixture(scope="module")
def chain(
    toy_checkpoint: Path,
    toy_artifact: Path,
    sidecars: tuple[SlowSidecar, SlowSidecar],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[DynamoChain]:
    """One for this module; the last test ends it."""
    addresses = ",".join(sidecar.address for sidecar in sidecars)
    launched = DynamoChain(toy_checkpoint, toy_artifact, tmp_path_factory.mktemp("dynamo"), [], SIDECARS=addresses)
    with started(launched):
        yield launched


class Load:
    """Requests of one picture each, from so many callers at a time, until `stop`."""

    def __init__(self, server: VllmServer, callers: int) -> None:
        self.answers: list[Answer] = []
        self._server = server
        self._over = threading.Event()
        self._numbers = iter(range(10_000, 1_000_000))
        self._pool = ThreadPoolExecutor(callers)
        self._callers = [self._pool.submit(self._call) for _ in range(callers)]

    def stop(self) -> list[Answer]:
        self._over.set()
        for caller in self._callers:
            caller.result()
        self._pool.shutdown()
        return self.answers

    def _call(self) -> None:
        while not self._over.is_set():
            self.answers.append(self._server.ask("load", noise_png(next(self._numbers), 84, 84), tokens=1))


def items(sidecar: SlowSidecar) -> int:
    """Encoded so far."""
    with EncoderClient(sidecar.address) as client:
        client.info(timeout_s=10)
    return sidecar.log.read_text().count(" answered=1 ")


def shown(answer: Answer) -> list[str]:
    """Its tokens without what Dynamo's frontend tells in other words: special ones, and those of half a character."""
    return [re.sub(r"<\|\w+\|>|\ufffd", "", token) for token in answer.tokens]


def cancelled_by_dynamo(log: Path) -> int:
    """Requests that its router had sent to a worker, and cancels because that one leaves the list before it has begun to answer.
    Nothing that the worker does can keep it from that."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    return sum(map(int, re.findall(r"Cancelled stream registrations for removed instance .*cancelled=(\d+)", text)))


def test_answers_are_those_of_a_plain_vllm(chain: DynamoChain, toy_checkpoint: Path, tmp_path: Path) -> None:
    sizes = ((84, 112), (56, 196), (224, 224), (140, 84), (308, 84), (56, 56), (140, 336), (112, 112))
    pictures = [noise_png(500 + number, *size) for number, size in enumerate(sizes)]
    requests = [
        (f"picture {first}, {count} of them", pictures[first : first + count])
        for first in range(5)
        for count in range(5)
    ]
    frontend = chain.vllm("frontend")
    through_dynamo = [frontend.ask(text, *images, tokens=6) for text, images in requests]
    with vllm_server(toy_checkpoint, tmp_path / "plain.log", installed=DYNAMO_ENVIRONMENT) as plain:
        by_itself = [plain.ask(text, *images, tokens=6) for text, images in requests]
    apart = 0.0
    for request, ours, theirs in zip(requests, through_dynamo, by_itself, strict=True):
        assert ours.ok and theirs.ok and shown(ours) == shown(theirs), (request[0], ours, theirs)
        # Plain vLLM keeps back half a character at the end; Dynamo's frontend tells it as U+FFFD.
        assert ours.text.removesuffix("\ufffd") == theirs.text.removesuffix("\ufffd"), (request[0], ours, theirs)
        apart = max(apart, *(abs(a - b) for a, b in zip(ours.logprobs, theirs.logprobs, strict=True)))
    print(f"\n{len(requests)} answers through Dynamo: tokens equal, logprobs at most {apart:.1e} apart", end="")
    assert apart <= 1e-3


def test_a_bad_image_fails_its_request_and_says_which_and_why(chain: DynamoChain) -> None:
    frontend = chain.vllm("frontend")
    answer = frontend.ask("and this?", noise_png(1), b"no picture at all")
    assert answer.status == 400 and "image" in answer.text and "are not an image in a format taken here" in answer.text
    assert frontend.ask("and this?", noise_png(1)).ok


def test_a_row_short_fails_that_request_clearly_and_prefill_lives(
    chain: DynamoChain, toy_checkpoint: Path, start_server: Callable[..., Server], tmp_path: Path
) -> None:
    right = start_server(*EXACT)
    frontend = chain.vllm("frontend")
    # Its own instance in the chain: prefill asks the two in turn.
    with (
        FaultySidecar(right.address) as faulty,
        chain.worker(toy_checkpoint, [faulty.address], tmp_path / "worker.log"),
    ):
        faulty.always = Fault.ROWS_MERGED
        answers = [frontend.ask("short?", noise_png(number)) for number in range(700, 706)]
        statuses = Counter(answer.status for answer in answers)
        wrong = next(answer for answer in answers if not answer.ok)
        print(f"\none of two encoders a row short: {dict(statuses)}, {wrong.text}", end="")
        assert statuses[400] >= 2 and statuses[200] >= 2
        assert "image 1: the encoder's answer was refused: item 0: 3 tokens cannot come from grid" in wrong.text
        faulty.always = Fault.ROWS_SHORT
        assert {frontend.ask("short?", noise_png(number)).status for number in range(710, 714)} == {200, 400}
        faulty.always = None
        assert all(frontend.ask("right?", noise_png(number)).ok for number in range(720, 724))


def test_no_file_is_left_after_a_thousand_images(chain: DynamoChain) -> None:
    frontend = chain.vllm("frontend")

    def ask(number: int) -> bool:
        return frontend.ask("four", *(noise_png(number * 4 + part, 56, 56) for part in range(4)), tokens=1).ok

    with ThreadPoolExecutor(4) as callers:
        began = time.monotonic()
        assert all(callers.map(ask, range(1000, 1250)))
        took_s = time.monotonic() - began
    most = len(chain.files())
    ends = time.monotonic() + 20
    while chain.files() and time.monotonic() < ends:
        time.sleep(0.2)
    left = len(chain.files())
    print(
        f"\n1,000 images in 250 requests, {took_s:.0f} s: {most} files at the end of it, {left} a moment later", end=""
    )
    assert most and not left  # those of the last requests lay there, where this looks


def test_two_unequal_sidecars_share_by_speed(chain: DynamoChain, sidecars: tuple[SlowSidecar, SlowSidecar]) -> None:
    frontend = chain.vllm("frontend")
    load = Load(frontend, 4)
    time.sleep(5)  # for the first reports to be believed
    before = [items(sidecar) for sidecar in sidecars]
    time.sleep(10)
    counts = [items(sidecar) - earlier for sidecar, earlier in zip(sidecars, before, strict=True)]
    answers = load.stop()
    print(f"\nruns of {FAST_MS:g} and {SLOW_MS:g} ms: {counts[0]} and {counts[1]} items in 10 s", end="")
    assert all(answer.ok for answer in answers)
    assert 2.5 * counts[1] < counts[0] < 6 * counts[1]


def test_a_worker_is_replaced_under_load_and_loses_no_request(
    chain: DynamoChain, toy_checkpoint: Path, sidecars: tuple[SlowSidecar, SlowSidecar], tmp_path: Path
) -> None:
    frontend = chain.vllm("frontend")
    load = Load(frontend, 4)
    servers = [sidecar.address for sidecar in sidecars]
    with (
        chain.worker(toy_checkpoint, servers, tmp_path / "first.log") as first,
        chain.worker(toy_checkpoint, servers, tmp_path / "second.log"),
    ):
        time.sleep(3)
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 0
        time.sleep(2)
        answers = load.stop()
    failed = [answer for answer in answers if not answer.ok]
    cancelled = cancelled_by_dynamo(chain.logs / "prefill.log")
    said = f"{len(answers)} requests, {len(failed)} failed, {cancelled} cancelled by Dynamo's router"
    print(f"\na worker ended by SIGTERM under load: {said}", end="")
    assert len(answers) > 20 and len(failed) <= cancelled
    log = (tmp_path / "first.log").read_text()
    assert "finishing what is under way" in log and "request completed" in log


def test_a_sidecar_is_killed_under_load_and_no_request_fails(
    chain: DynamoChain, sidecars: tuple[SlowSidecar, SlowSidecar]
) -> None:
    load = Load(chain.vllm("frontend"), 4)
    time.sleep(3)
    sidecars[0].process.kill()
    time.sleep(6)
    answers = load.stop()
    failed = [answer for answer in answers if not answer.ok]
    print(f"\none of two sidecars killed under load: {len(answers)} requests, {len(failed)} failed", end="")
    assert len(answers) > 20 and not failed


def test_ctrl_c_leaves_no_process_and_no_file(chain: DynamoChain) -> None:
    scratch, handles = chain.scratch(), chain.handles()
    assert len(handles) >= 6  # front, guard, encode, prefill, decode, frontend
    chain.front.send_signal(signal.SIGINT)
    assert chain.wait_end() == STOPPED
    assert all_ended(handles)
    assert not scratch.exists()
