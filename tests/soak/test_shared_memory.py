"""The store's promises: within its capacity, leased files stay, lost leases expire, and no room is no failure."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from load import (
    EXACT,
    QUICK,
    closed_loop,
    engine,
    open_clients,
    picture_item,
    store_of,
    wait_until,
)
from safetensors.numpy import load_file
from servers import ROOT, Server, StartServer

from sidecar.client import Embedding, EncoderClient, ItemError
from sidecar.store_file import FILE_NAME

pytestmark = pytest.mark.soak

WRITERS = 8
CAPACITY_BYTES = 1 << 20
SIDES = (56, 112, 224, 448)
LARGEST_BYTES = 256 * 128 * 4 + 2 * 4096  # of 448 × 448 pixels: 256 tokens of 128 float32, header and directory


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """1 MB of shared memory of our own."""
    where = tmp_path / "memory"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(where)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting takes root")
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


class Meter(threading.Thread):
    """The most bytes that a store's files take at a time, drafts included.

    Files come and go while they are counted. Two counts after one another that find the same files are what there was between
    them; no others are taken.
    """

    def __init__(self, store: Path) -> None:
        super().__init__()
        self.most_bytes = self.counts = 0
        self._store = store
        self._enough = threading.Event()

    def run(self) -> None:
        before: dict[str, tuple[int, int]] = {}
        while not self._enough.is_set():
            now = self._count()
            if now == before:
                self.counts += 1
                self.most_bytes = max(self.most_bytes, sum(size for _, size in now.values()))
            before = now

    def stop(self) -> None:
        self._enough.set()
        self.join()

    def _count(self) -> dict[str, tuple[int, int]]:
        found = {}
        for child in self._store.iterdir():
            if child.is_symlink():  # a key, which leads to a file that is counted under its own name
                continue
            with suppress(FileNotFoundError, NotADirectoryError):
                file = (child / FILE_NAME).stat()
                found[child.name] = (file.st_ino, file.st_blocks * 512)
        return found


def load(server: Server, first: int, count: int) -> Counter[str]:
    async def run() -> Counter[str]:
        async with open_clients(server, stored=True) as clients:
            return await closed_loop(clients, (picture_item(first + i, SIDES[i % 4]) for i in range(count)), 32)

    return asyncio.run(run())


def test_a_file_system_smaller_than_the_store_fails_no_request(start_server: StartServer, small_tmpfs: Path) -> None:
    server = start_server(*QUICK, *EXACT, "--store", str(small_tmpfs / "store"), "--store-bytes", "100000000")
    ended = load(server, 0, 200)
    evicted = engine(server)["store"]
    (small_tmpfs / "filler").write_bytes(b"")
    with (small_tmpfs / "filler").open("wb") as filler:  # somebody else takes what is left
        try:
            while True:
                os.write(filler.fileno(), bytes(4096))
        except OSError:
            pass
    full = load(server, 1000, 200)
    store = engine(server)["store"]
    print(f"\n1 MB file system: {dict(ended)}, {evicted['evictions']} evictions; ", end="")
    print(f"filled by another: {dict(full)}, {store['unkept']} sent inline", end="")
    assert ended == full == {"embedding": 200}
    assert evicted["evictions"] > 0
    with server.client() as client:
        assert all(isinstance(result, Embedding) for result in client.encode([picture_item(5)], timeout_s=60))
    assert server.terminate() == 0


def test_a_full_file_system_fails_no_request(start_server: StartServer, small_tmpfs: Path) -> None:
    server = start_server(*QUICK, *EXACT, "--store", str(small_tmpfs / "store"), "--store-bytes", "100000000")
    with (small_tmpfs / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, os.statvfs(small_tmpfs).f_bfree * 4096)
    ended = load(server, 0, 100)
    store = engine(server)["store"]
    print(f"\nfull file system: {dict(ended)}, {store['unkept']} sent inline, {store['entries']} stored", end="")
    assert ended == {"embedding": 100}
    assert store["unkept"] == 100 and store["entries"] == store["used_bytes"] == 0
    assert server.log.read_text().count("could not be stored") == 1  # said once, not a hundred times
    (small_tmpfs / "filler").unlink()
    assert load(server, 500, 20) == {"embedding": 20}
    assert engine(server)["store"]["entries"] > 0  # there is room again
    assert server.terminate() == 0


def test_eight_writers_stay_within_the_capacity(start_server: StartServer) -> None:
    server = start_server(
        *(*QUICK, *EXACT, "--store-bytes", str(CAPACITY_BYTES)),
        *("--streams", str(WRITERS), "--batch-patches", "0"),
    )
    meter = Meter(store_of(server))
    meter.start()
    try:
        ended = load(server, 0, 600)
    finally:
        meter.stop()
    store = engine(server)["store"]
    print(f"\n{WRITERS} writers: {dict(ended)}, {store['evictions']} evictions; most of {meter.counts} counts ", end="")
    print(f"{meter.most_bytes} bytes of {CAPACITY_BYTES}, the largest entry has {LARGEST_BYTES}", end="")
    assert ended == {"embedding": 600} and store["evictions"] > 100
    assert CAPACITY_BYTES / 2 < meter.most_bytes <= CAPACITY_BYTES + LARGEST_BYTES


def test_a_leased_entry_stays_while_others_come_and_go(start_server: StartServer) -> None:
    server = start_server(*QUICK, *EXACT, "--store-bytes", str(CAPACITY_BYTES))
    with EncoderClient(server.address, store=store_of(server)) as client:
        results = client.encode([picture_item(i, 448, key=f"held-{i}") for i in range(3)], timeout_s=60, hold=True)
        held = [result for result in results if isinstance(result, Embedding)]
        assert load(server, 100, 200) == {"embedding": 200}
        for result in held:
            assert result.path is not None and (load_file(result.path)["ec_cache"] == result.data).all()
        assert client.release([result.lease for result in held], timeout_s=30) == 3
        evictions = engine(server)["store"]["evictions"]
        assert load(server, 500, 200) == {"embedding": 200}
        assert all(isinstance(result, ItemError) for result in client.fetch([result.key for result in held], 30))
    assert len(held) == 3 and not any(result.path and result.path.exists() for result in held)
    print(f"\n3 leased entries outlived {evictions} evictions, and went once they were released", end="")


def test_the_lease_of_a_killed_client_expires(start_server: StartServer) -> None:
    server = start_server(*QUICK, *EXACT, "--lease-seconds", "1")
    code = (
        "import sys, time; from sidecar.client import EncoderClient; from sidecar.items import Item\n"
        "client = EncoderClient(sys.argv[1], store=sys.argv[2])\n"
        "client.encode([Item.FromString(sys.stdin.buffer.read())], 60, hold=True)\n"
        "print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, server.address, str(store_of(server))]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdin and client.stdout
        client.stdin.write(picture_item(1).SerializeToString())
        client.stdin.close()
        assert client.stdout.readline() == b"held\n"
        client.kill()
    wait_until("the lease expired", lambda: engine(server)["store"]["leases"] == 0)
    store = engine(server)["store"]
    print(f"\na killed client's lease: {store['expired']} expired, {store['leases']} held", end="")
    assert store["expired"] == 1 and store["entries"] == 1
