"""Another artifact takes the served one's place under load: no request is lost, and no embedding goes under another's name."""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from load import (
    EXACT,
    QUICK,
    Outcome,
    memory_bytes,
    open_clients,
    outcome_of,
    picture_item,
    threads,
    wait_until,
)
from servers import Server, StartServer

from sidecar.client import AsyncEncoderClient, Embedding
from sidecar.pb import encoder_pb2 as pb
from sidecar.pb import encoder_pb2_grpc
from sidecar.vision.dtypes import Array

pytestmark = pytest.mark.soak

KEYS, WIDTH = 12, 8
ITEMS = [picture_item(number, 56 << number % 3, key=f"photo-{number}") for number in range(KEYS)]

# Of each model, by its fingerprint, the right rows of each key.
Right = dict[str, dict[str, Array]]


@pytest.fixture(scope="module")
def other_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with other random weights."""
    from rich.console import Console

    from export.pipeline import Job, export
    from export.synthetic import make_checkpoint

    directory = tmp_path_factory.mktemp("other")
    checkpoint = make_checkpoint("toy", directory / "checkpoint", dtype="bfloat16", seed=1)
    job = Job(model=str(checkpoint), out=directory / "toy", formats=("openvino",), precisions=("f32",))
    return export(job, Console(quiet=True)).directory


@pytest.fixture(scope="module")
def right(start_server: StartServer, toy_artifact: Path, other_artifact: Path) -> Right:
    """As servers answer that serve one artifact alone."""
    rows: Right = {}
    for artifact in (toy_artifact, other_artifact):
        server = start_server(*QUICK, *EXACT, artifact=artifact)
        with server.client() as client:
            for result in client.encode(ITEMS, timeout_s=60):
                assert isinstance(result, Embedding)
                rows.setdefault(result.fingerprint, {})[result.key] = result.data
        assert server.terminate() == 0
    assert len(rows) == 2
    return rows


@dataclass
class Load:
    """Every item again and again, until told that it is enough."""

    right: Right
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    enough: bool = False

    async def run(self, server: Server) -> None:
        async with open_clients(server, stored=True) as clients:
            await asyncio.gather(*(self._worker(clients[number % 4], number) for number in range(WIDTH)))

    async def _worker(self, client: AsyncEncoderClient, number: int) -> None:
        while not self.enough:
            number += 1
            self._judge(ITEMS[number % KEYS].key, await outcome_of(client, ITEMS[number % KEYS]))

    def _judge(self, key: str, outcome: Outcome) -> None:
        if not isinstance(outcome, Embedding):
            self.wrong.append(f"{outcome.code}: {outcome.message}")
            return
        self.counts[outcome.fingerprint] += 1
        if not np.allclose(outcome.data, self.right[outcome.fingerprint][key], atol=1e-2):
            self.wrong.append(f"{key} under {outcome.fingerprint[:8]} has another model's rows")


def put(artifact: Path, served: Path) -> None:
    """By rename, as export does."""
    arriving, gone = served.with_name("arriving"), served.with_name("gone")
    shutil.copytree(artifact, arriving)
    if served.exists():
        served.rename(gone)
    arriving.rename(served)
    shutil.rmtree(gone, ignore_errors=True)


async def serves(server: Server, fingerprint: str, times: int) -> None:
    """Return once the log has said so many times that this model is served and the one before it closed."""

    def is_said() -> bool:
        log = server.log.read_text()
        return log.count(f"serving {fingerprint[:16]} in the place") == times <= log.count(" are closed")

    await asyncio.to_thread(wait_until, f"serving {fingerprint[:16]}", is_said)


async def answered(load: Load, count: int) -> None:
    """Return once there were so many more answers."""
    goal = load.counts.total() + count
    await asyncio.to_thread(wait_until, "answers", lambda: load.counts.total() >= goal or bool(load.wrong))


@pytest.mark.parametrize("asked_by", ["SIGHUP", "--watch-artifact"])
def test_another_artifact_is_served_without_a_lost_request(
    asked_by: str, start_server: StartServer, toy_artifact: Path, other_artifact: Path, right: Right, tmp_path: Path
) -> None:
    served = tmp_path / "served"
    put(toy_artifact, served)
    watch = ("--watch-artifact",) if asked_by == "--watch-artifact" else ()
    server = start_server(*QUICK, *EXACT, *watch, artifact=served)
    first, second = right
    load = Load(right)
    held: list[tuple[int, int]] = []

    async def run() -> None:
        loading = asyncio.create_task(load.run(server))
        await answered(load, 200)
        for number, (artifact, fingerprint) in enumerate([(other_artifact, second), (toy_artifact, first)] * 2):
            put(artifact, served)
            if not watch:
                server.process.send_signal(signal.SIGHUP)
            await serves(server, fingerprint, number // 2 + 1)
            replaced = first if fingerprint == second else second
            before = load.counts[replaced]
            await answered(load, 200)
            assert load.counts[replaced] <= before + WIDTH  # calls that were under way
            held.append((threads(server), memory_bytes(server)[0]))
        load.enough = True
        await loading

    try:
        asyncio.run(asyncio.wait_for(run(), 200))
    finally:
        load.enough = True
    sizes = ", ".join(f"{count} threads {size / 1e6:.0f} MB" for count, size in held)
    print(f"\nreloaded by {asked_by} 4 times under load: {load.counts.total()} answers, ", end="")
    print(f"{len(load.wrong)} wrong or lost; after each {sizes}", end="")
    assert not load.wrong, load.wrong[:3]
    # A model's lanes end with it: a leak adds threads with every reload, a pool that is still filling with one or two of them.
    assert any(later <= earlier for (earlier, _), (later, _) in pairwise(held)), held
    assert held[-1][0] <= held[0][0] + 6
    assert server.terminate() == 0


def damaged(artifact: Path, directory: Path) -> Path:
    """A copy of which one file of weights has lost its end."""
    copy = directory / "damaged"
    shutil.copytree(artifact, copy)
    largest = max((path for path in copy.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    return copy


def unsealed(artifact: Path, directory: Path) -> Path:
    """A copy whose manifest is not what its seal says."""
    copy = directory / "unsealed"
    shutil.copytree(artifact, copy)
    with (copy / "manifest.json").open("ab") as manifest:
        manifest.write(b" ")
    return copy


@pytest.mark.parametrize("broken", [damaged, unsealed])
def test_a_broken_artifact_leaves_the_old_one_serving(
    broken: Callable[[Path, Path], Path],
    start_server: StartServer,
    toy_artifact: Path,
    other_artifact: Path,
    right: Right,
    tmp_path: Path,
) -> None:
    served = tmp_path / "served"
    put(toy_artifact, served)
    server = start_server(*QUICK, *EXACT, artifact=served)
    first, _ = right
    load = Load(right)

    async def run() -> None:
        loading = asyncio.create_task(load.run(server))
        await answered(load, 100)
        put(broken(other_artifact, tmp_path), served)
        server.process.send_signal(signal.SIGHUP)
        await asyncio.to_thread(
            wait_until, "refused", lambda: "the new artifact is not served" in server.log.read_text()
        )
        await answered(load, 100)
        load.enough = True
        await loading

    try:
        asyncio.run(asyncio.wait_for(run(), 120))
    finally:
        load.enough = True
    print(f"\na new artifact that is {broken.__name__}: {dict(load.counts)}, {len(load.wrong)} wrong or lost", end="")
    assert not load.wrong, load.wrong[:3]
    assert set(load.counts) == {first}


def test_callers_who_do_not_read_hold_one_old_model_at_most(start_server: StartServer) -> None:
    server = start_server("--threads", "1", "--drain-seconds", "1", "--warm-up-seconds", "0", "--store", "none")
    items = [picture_item(number, 224) for number in range(256)]
    windows = [
        ("grpc.http2.lookahead_bytes", 65536),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    before = most = threads(server)
    with grpc.insecure_channel(server.address, windows) as channel:
        new_stub: Any = encoder_pb2_grpc.EncoderStub
        calls = []
        for number in range(6):
            # Each begins with the model that is served, and then reads no further.
            calls.append(new_stub(channel).Encode(pb.EncodeRequest(items=items)))
            next(calls[-1])
            server.process.send_signal(signal.SIGHUP)
            ends = time.monotonic() + 20
            while server.log.read_text().count(" anew: equal weights") <= number:
                most = max(most, threads(server))
                assert time.monotonic() < ends, server.log.read_text()
                time.sleep(0.02)
        log = server.log.read_text()
        assert log.count(" are closed") >= 5 and "were ended with UNAVAILABLE for a reload" in log
        # What was on its way is read first.
        with pytest.raises(grpc.RpcError) as told:
            for _ in calls[0]:
                pass
        assert told.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "has been replaced" in told.value.details()
    print(f"\n6 reloads under 6 callers who do not read: at most {most} threads, {before} before", end="")
    # A second model, and pools that fill as they are used; six old models had 20 more.
    assert most <= before + 14, "threads of more than two models"
