"""A lane that computes something wrong, or never returns, serves no wrong embedding and loses nothing."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from load import EXACT, Outcome, all_at_once, picture_item, tally, wait_until
from servers import Server, serve_environment

from sidecar.client import AsyncEncoderClient, Embedding, EncodeError, ItemError
from sidecar.commands.health import check

pytestmark = pytest.mark.soak

FAULTS = ("zeros", "permuted", "noise", "scaled", "nan-later", "hang-later")
LATER = ("nan-later", "hang-later")
ITEMS = 60
SIDE = 252  # 324 patches, more than any self-test item


@pytest.fixture(scope="module")
def expected(server: Server) -> dict[int, np.ndarray]:
    """What a lane that is right makes of the items."""
    with server.client() as client:
        results = [client.encode([picture_item(number, SIDE)])[0] for number in range(ITEMS + 1)]
    return {number: result.float32() for number, result in enumerate(results) if isinstance(result, Embedding)}


@contextmanager
def wrong_server(fault: str, lanes: int, artifact: Path, directory: Path) -> Iterator[tuple[str, Path]]:
    """Its address, once it listens, and its log."""
    log = directory / "log"
    command = [sys.executable, str(Path(__file__).parents[1] / "wrong_sidecar.py"), fault, "serve", *EXACT]
    command += ["--artifact", str(artifact), "--listen", "127.0.0.1:0", "--store", "none", "--warm-up-seconds", "0"]
    command += ["--threads", "1", "--trial", "never", "--batch-patches", "0", *("--device", "cpu") * lanes]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=directory, env=serve_environment(), stderr=output)
    try:
        wait_until("listening", lambda: re.search(r"(ready|listening) on (\S+) after", log.read_text()) is not None)
        found = re.search(r"(?:ready|listening) on (\S+) after", log.read_text())
        assert found
        yield found[1], log
    finally:
        process.terminate()
        assert process.wait(20) in (0, 1), log.read_text()


def ask(address: str, numbers: range) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with AsyncEncoderClient(address) as client:
            return await all_at_once([client], [picture_item(number, SIDE) for number in numbers])

    return asyncio.run(run())


def assert_right(outcomes: list[Outcome], expected: dict[int, np.ndarray]) -> None:
    """Every embedding is that of its item; a lane of another number of threads may round otherwise."""
    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, Embedding):
            np.testing.assert_allclose(outcome.float32(), expected[number], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fault", FAULTS)
def test_beside_a_good_lane_a_wrong_one_costs_nothing(
    fault: str, expected: dict[int, np.ndarray], toy_artifact: Path, tmp_path: Path
) -> None:
    with wrong_server(fault, 2, toy_artifact, tmp_path) as (address, log):
        outcomes = ask(address, range(ITEMS))
        assert tally(outcomes) == {"embedding": ITEMS}
        assert_right(outcomes, expected)
        wait_until("out", lambda: "lane cpu is out of service" in log.read_text(), 10)
        assert check(address, "", 5) == "SERVING"
        ran = [outcome.lane.device.startswith("wrong") for outcome in outcomes if isinstance(outcome, Embedding)]
    print(f"\n{fault}: {sum(ran)} of {ITEMS} by the lane before it was found wrong, all right", end="")
    assert (sum(ran) > 0) == (fault in LATER)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_lane_alone_answers_unavailable_and_health_says_so(
    fault: str, expected: dict[int, np.ndarray], toy_artifact: Path, tmp_path: Path
) -> None:
    with wrong_server(fault, 1, toy_artifact, tmp_path) as (address, log):
        began = time.monotonic()
        outcomes = ask(address, range(ITEMS if fault in LATER else 1))
        wait_until("not serving", lambda: check(address, "", 5) == "NOT_SERVING", 10)
        took_s = time.monotonic() - began
        outcomes += ask(address, range(ITEMS, ITEMS + 1))
        assert_right(outcomes, expected)
        refused = [outcome for outcome in outcomes if isinstance(outcome, (ItemError, EncodeError))]
        assert len(outcomes) - len(refused) == (10 if fault in LATER else 0)
        assert {outcome.code for outcome in refused} == {"UNAVAILABLE"}
        assert all(any(isinstance(detail, RetryInfo) for detail in outcome.details) for outcome in refused)
        line = re.search(r"lane cpu is out of service, .*", log.read_text())
    assert line
    print(f"\n{fault}: NOT_SERVING after {took_s:.1f} s; {line[0]}", end="")
    if fault != "hang-later":
        assert re.search(r"openvino [\d.]+ on wrong CPU .* cosine ", line[0])
    assert took_s < 10
