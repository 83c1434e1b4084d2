"""From what vLLM's scheduler wants to a checked file: real sidecars, and one that answers wrongly."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_sidecar import Fault, FaultySidecar
from servers import Server, StartServer, spawn

from sidecar.artifact import open_artifact
from sidecar.client import Embedding, EncoderClient
from sidecar.integrations.vllm.features import Wanted
from sidecar.integrations.vllm.fetcher import Fetch, Fetcher
from sidecar.integrations.vllm.files import LocalFile, LocalFiles
from sidecar.integrations.vllm.identity import Identity
from sidecar.integrations.vllm.options import Options, OptionsError
from sidecar.integrations.vllm.tally import Tally
from sidecar.store_file import FILE_NAME, Description, read
from sidecar.vision.dtypes import Array
from sidecar.vision.grid import Grid
from sidecar.vision.spec import TowerSpec

# Long enough for any machine: a test that waits this long has failed.
LONG_S = 60.0
GRID = Grid(1, 8, 12)

_numbers = itertools.count()

WRONG = [
    Fault.ROWS_SHORT,
    Fault.ROWS_MERGED,
    Fault.WIDTH_WRONG,
    Fault.NAN,
    Fault.OTHER_FINGERPRINT,
    Fault.OTHER_GRID,
    Fault.FILE_CUT_SHORT,
]


def title(fault: Fault) -> str:
    return fault.name.replace("_", " ").lower()


def wait(fetch: Fetch) -> Fetch:
    assert fetch.future is not None
    fetch.future.result(LONG_S)
    assert fetch.done
    return fetch


class HeldFiles(LocalFiles):
    """Files that are not added before `go`, and tell when one is removed."""

    def __init__(self, parent: Path) -> None:
        super().__init__(parent)
        self.adding, self.go, self.removed = threading.Event(), threading.Event(), threading.Event()

    def add(self, rows: Array, description: Description, linkable: Path | None) -> LocalFile:
        self.adding.set()
        assert self.go.wait(LONG_S)
        return super().add(rows, description, linkable)

    def remove(self, name: str) -> None:
        super().remove(name)
        self.removed.set()


@dataclass
class Vllm:
    """What the connector has in vLLM's scheduler, as far as fetching goes."""

    tower: TowerSpec
    files: LocalFiles
    fetcher: Fetcher
    tally: Tally

    def image(self, key: str | None = None, grid: Grid = GRID) -> Wanted:
        """An image that no sidecar has seen, unless its key is given."""
        number = next(_numbers)
        values = np.random.default_rng(number).integers(0, 256, (grid.patches, self.tower.patch_width), np.uint8)
        return Wanted(key or f"image-{number}", grid, grid.tokens(self.tower), torch.from_numpy(values))

    def known(self, key: str, grid: Grid = GRID) -> Wanted:
        """A metadata-only item."""
        return Wanted(key, grid, grid.tokens(self.tower), None)

    def obtain(self, wanted: Wanted) -> Fetch:
        return wait(self.fetcher.start(wanted))

    def rows(self, fetch: Fetch) -> Array:
        assert fetch.file is not None, fetch.failure
        return read(self.files.path, fetch.file.name, fetch.file.description)

    def outcomes(self) -> dict[str, int]:
        items: dict[str, int] = self.tally.take().get("items", {})
        return items

    def left(self) -> list[str]:
        return [entry.name for entry in self.files.path.iterdir() if entry.name != ".lock"]


StartVllm = Callable[..., Vllm]


@pytest.fixture(scope="module")
def tower(toy_artifact: Path) -> TowerSpec:
    return open_artifact(toy_artifact).manifest.tower


@pytest.fixture(scope="module")
def store(server: Server) -> Path:
    with server.client() as client:
        return Path(client.info(LONG_S).store.directory)


@pytest.fixture
def vllm(toy_checkpoint: Path, tower: TowerSpec, store: Path) -> Iterator[StartVllm]:
    """vllm(addresses, **options): its files lie on the file system of the server's store. Closed at the end of the test."""
    started: list[Vllm] = []

    def start(address: str | list[str], kind: type[LocalFiles] = LocalFiles, **options: Any) -> Vllm:
        options = {"timeout_s": LONG_S, "unreachable_s": LONG_S, **options}
        identity = Identity(tower, str(toy_checkpoint), None, options.get("fingerprint"), loads=True)
        files, tally = kind(store.parent), Tally()
        fetcher = Fetcher(Options.from_config({"address": address, **options}), identity, files, tally)
        started.append(Vllm(tower, files, fetcher, tally))
        return started[-1]

    yield start
    for each in started:
        if each.fetcher._thread.is_alive():
            each.fetcher.close()
        each.files.close()
        assert not each.files.path.exists()


@pytest.fixture
def faulty(server: Server) -> Iterator[FaultySidecar]:
    with FaultySidecar(server.address) as sidecar:
        yield sidecar


def encoded(address: str, image: Wanted, tower: TowerSpec, key: str = "") -> Embedding:
    """What a sidecar gives for the same pixels; under a key, as a proxy in front of vLLM stores it for metadata-only items."""
    item = image.item(tower, None)
    item.key = key
    with EncoderClient(address) as client:
        (result,) = client.encode([item], LONG_S)
    assert isinstance(result, Embedding)
    return result


def test_on_the_sidecars_host_the_file_is_a_link_to_its_own(server: Server, store: Path, vllm: StartVllm) -> None:
    worker = vllm(server.address)
    worker.fetcher._meeting.result(LONG_S)
    fetch = worker.obtain(image := worker.image())
    known = encoded(server.address, image, worker.tower)
    assert known.cached and np.array_equal(worker.rows(fetch), known.data)
    assert fetch.file is not None
    assert (worker.files.path / fetch.file.name / FILE_NAME).samefile(store / known.key / FILE_NAME)
    assert worker.outcomes() == {"linked": 1}


def test_from_another_host_it_is_written_here(server: Server, store: Path, vllm: StartVllm) -> None:
    worker = vllm(server.address, store="off")
    fetch = worker.obtain(image := worker.image())
    assert np.array_equal(worker.rows(fetch), encoded(server.address, image, worker.tower).data)
    assert worker.outcomes() == {"sent": 1}


def test_vllms_identifier_does_not_name_what_its_pixels_say(server: Server, vllm: StartVllm) -> None:
    """Two vLLMs, or one before and after a restart, or a client who sends another picture's hash: one name, other pixels."""
    one, other = vllm(server.address), vllm(server.address, store="off")
    first, second = one.image("the same"), other.image("the same")
    rows = [one.rows(one.obtain(first)), other.rows(other.obtain(second))]
    assert not np.array_equal(*rows)
    for image, its_rows in zip((first, second), rows, strict=True):
        assert np.array_equal(encoded(server.address, image, one.tower).data, its_rows)
    # And it names nothing for those who ask by key, whom it would otherwise give what any client of a vLLM has sent.
    assert (one.obtain(one.known("the same")).failure or "").startswith("NOT_FOUND")


def test_a_metadata_only_item_is_fetched_by_its_key(server: Server, vllm: StartVllm) -> None:
    worker = vllm(server.address)
    image = worker.image()
    stored = encoded(server.address, image, worker.tower, key=image.key)
    fetch = worker.obtain(worker.known(image.key))
    assert np.array_equal(worker.rows(fetch), stored.data)
    assert worker.outcomes() == {"fetched": 1}


def test_a_key_is_found_at_whichever_sidecar_has_it(server: Server, start_server: StartServer, vllm: StartVllm) -> None:
    other = start_server("--threads", "1", "--precision", "f32", "--embedding-dtype", "float32")
    worker = vllm([server.address, other.address])
    image = worker.image()
    stored = encoded(other.address, image, worker.tower, key=image.key)
    fetch = worker.obtain(worker.known(image.key))
    assert np.array_equal(worker.rows(fetch), stored.data)
    unknown = worker.obtain(worker.known("nobody-has-it"))
    assert unknown.failure is not None and unknown.failure.startswith("NOT_FOUND")


@pytest.mark.parametrize("fault", WRONG, ids=title)
@pytest.mark.parametrize("linked", [True, False], ids=["as files", "over the wire"])
def test_a_wrong_answer_is_asked_for_again(faulty: FaultySidecar, vllm: StartVllm, fault: Fault, linked: bool) -> None:
    worker = vllm(faulty.address, store="auto" if linked else "off")
    worker.fetcher._meeting.result(LONG_S)
    faulty.answer(fault, fault)
    fetch = worker.obtain(image := worker.image())
    assert worker.rows(fetch).shape == (image.tokens, worker.tower.out_hidden_size)
    assert np.isfinite(worker.rows(fetch)).all()
    taken = worker.tally.take()
    assert taken["items"] == {"linked" if linked else "sent": 1}
    assert taken["errors"] == {"wrong embedding": 2}
    assert len(worker.left()) == 1


@pytest.mark.parametrize("fault", WRONG, ids=title)
def test_a_sidecar_that_is_always_wrong_is_given_up(faulty: FaultySidecar, vllm: StartVllm, fault: Fault) -> None:
    worker = vllm(faulty.address, attempts=2)
    worker.fetcher._meeting.result(LONG_S)
    faulty.always = fault
    fetch = worker.obtain(worker.image())
    assert fetch.file is None and fetch.failure
    assert "\n" not in fetch.failure
    assert faulty.calls.count("Encode") == 2
    assert worker.left() == []


@pytest.mark.parametrize("fault", WRONG, ids=title)
def test_what_a_key_stands_for_is_checked_as_well(faulty: FaultySidecar, vllm: StartVllm, fault: Fault) -> None:
    """Here the client has sent no grid that it could compare."""
    worker = vllm(faulty.address, attempts=1)
    image = worker.image()
    encoded(faulty.address, image, worker.tower, key=image.key)
    faulty.answer(fault)
    assert worker.obtain(worker.known(image.key)).failure
    assert worker.obtain(worker.known(image.key)).file is not None


def test_what_is_wrong_is_said(faulty: FaultySidecar, vllm: StartVllm) -> None:
    worker = vllm(faulty.address, attempts=1)
    image = worker.image()
    encoded(faulty.address, image, worker.tower, key=image.key)
    said = {}
    for fault in (Fault.WIDTH_WRONG, Fault.NAN, Fault.OTHER_FINGERPRINT, Fault.OTHER_GRID):
        faulty.answer(fault)
        said[fault] = worker.obtain(worker.known(image.key)).failure or ""
    width = worker.tower.out_hidden_size
    assert (
        f"24 × {width - 1} for grid (1, 8, 12), 24 × {width} for grid (1, 8, 12) was asked for"
        in said[Fault.WIDTH_WRONG]
    )
    assert said[Fault.NAN].startswith(f"the embedding holds NaN or infinite values ({faulty.address}, after ")
    assert "fingerprint 0000000000000000…" in said[Fault.OTHER_FINGERPRINT]
    assert "for grid (1, 12, 8)" in said[Fault.OTHER_GRID]


def test_an_internal_error_is_tried_again_as_often_as_was_said(faulty: FaultySidecar, vllm: StartVllm) -> None:
    worker = vllm(faulty.address, attempts=3)
    faulty.answer(Fault.INTERNAL, Fault.INTERNAL)
    assert worker.obtain(worker.image()).file is not None
    faulty.answer(Fault.INTERNAL, Fault.INTERNAL, Fault.INTERNAL)
    assert (worker.obtain(worker.image()).failure or "").startswith("INTERNAL: something broke")
    assert worker.tally.take()["errors"] == {"INTERNAL": 5}


def test_a_busy_sidecar_is_waited_for_longer_than_that(faulty: FaultySidecar, vllm: StartVllm) -> None:
    worker = vllm(faulty.address, attempts=1)
    faulty.answer(Fault.BUSY, Fault.BUSY, Fault.BUSY)
    assert worker.obtain(worker.image()).file is not None
    assert worker.tally.take()["errors"] == {"RESOURCE_EXHAUSTED": 3}


def test_a_sidecar_that_stays_busy_is_given_up_in_time(faulty: FaultySidecar, vllm: StartVllm) -> None:
    worker = vllm(faulty.address, timeout_s=0.5)
    faulty.always = Fault.BUSY
    assert (worker.obtain(worker.image()).failure or "").startswith("RESOURCE_EXHAUSTED: too much is under way")


def test_an_item_that_the_sidecar_refuses_is_not_sent_again(server: Server, vllm: StartVllm) -> None:
    """Over the server's --max-item-patches."""
    worker = vllm(server.address)
    fetch = worker.obtain(worker.image(grid=Grid(1, 130, 130)))
    assert fetch.failure is not None and fetch.failure.startswith("INVALID_ARGUMENT")
    assert worker.tally.take()["errors"] == {"INVALID_ARGUMENT": 1}


def test_patches_that_do_not_fit_their_grid_fail_here(server: Server, vllm: StartVllm) -> None:
    worker = vllm(server.address)
    image = worker.image()
    assert image.pixels is not None
    short = Wanted(image.key, image.grid, image.tokens, image.pixels[:-1])
    assert "grid (1, 8, 12) needs patches" in (worker.obtain(short).failure or "")


def test_an_answer_after_the_deadline_is_no_answer(faulty: FaultySidecar, vllm: StartVllm) -> None:
    worker = vllm(faulty.address, timeout_s=0.5)
    faulty.always = Fault.HANG
    fetch = worker.obtain(worker.image())
    assert fetch.failure is not None and fetch.failure.startswith("DEADLINE_EXCEEDED")
    assert faulty.left.wait(LONG_S)


def test_a_sidecar_that_hangs_leaves_time_for_another(server: Server, faulty: FaultySidecar, vllm: StartVllm) -> None:
    worker = vllm([faulty.address, server.address], timeout_s=4.0)
    faulty.always = Fault.HANG
    while not faulty.hanging.is_set():
        assert worker.obtain(worker.image()).file is not None
    assert worker.tally.take()["errors"]["DEADLINE_EXCEEDED"] >= 1


def test_what_one_of_several_refuses_another_does(server: Server, faulty: FaultySidecar, vllm: StartVllm) -> None:
    worker = vllm([faulty.address, server.address], attempts=1)
    faulty.always = Fault.INTERNAL
    while "Encode" not in faulty.calls:
        assert worker.obtain(worker.image()).file is not None
    assert worker.tally.take()["errors"] == {"INTERNAL": faulty.calls.count("Encode")}


def test_what_breaks_each_of_several_is_given_up(faulty: FaultySidecar, server: Server, vllm: StartVllm) -> None:
    with FaultySidecar(server.address) as other:
        faulty.always = other.always = Fault.INTERNAL
        worker = vllm([faulty.address, other.address])
        assert (worker.obtain(worker.image()).failure or "").startswith("INTERNAL: something broke")
        assert (faulty.calls + other.calls).count("Encode") == 3
    assert worker.tally.take()["errors"] == {"INTERNAL": 3}


def test_a_sidecar_that_dies_under_way_and_comes_back_costs_time_only(faulty: FaultySidecar, vllm: StartVllm) -> None:
    worker = vllm(faulty.address)
    worker.fetcher._meeting.result(LONG_S)
    faulty.answer(Fault.DIE)
    fetch = worker.fetcher.start(worker.image())
    assert faulty.left.wait(LONG_S)
    faulty.die().wait()
    faulty.revive()
    assert wait(fetch).file is not None, fetch.failure


def test_a_sidecar_that_cannot_be_reached_is_given_up_when_patience_ends(vllm: StartVllm) -> None:
    worker = vllm("127.0.0.1:1", unreachable_s=0.3)
    fetch = worker.obtain(worker.image())
    assert fetch.failure is not None and fetch.failure.startswith("UNAVAILABLE")


def test_a_sidecar_that_is_killed_and_restarted_is_found_again(
    toy_artifact: Path, tmp_path: Path, vllm: StartVllm
) -> None:
    """Requests arrive before, while it is gone, and after."""
    flags = ("--threads", "1", "--precision", "f32")
    address = f"unix:{tmp_path / 'socket'}"
    process, _ = spawn(toy_artifact, tmp_path, *flags, listen=address)
    try:
        worker = vllm(address)
        assert worker.obtain(worker.image()).file is not None
        process.send_signal(signal.SIGKILL)
        process.wait()
        meanwhile = worker.fetcher.start(worker.image())
        assert not meanwhile.done
        process, _ = spawn(toy_artifact, tmp_path, *flags, listen=address)
        assert wait(meanwhile).file is not None, meanwhile.failure
        assert worker.obtain(worker.image()).file is not None
    finally:
        process.kill()
        process.wait()


def test_who_is_cancelled_tells_the_sidecar_and_leaves_nothing(faulty: FaultySidecar, vllm: StartVllm) -> None:
    worker = vllm(faulty.address)
    faulty.always = Fault.HANG
    fetch = worker.fetcher.start(worker.image())
    assert faulty.hanging.wait(LONG_S)
    worker.fetcher.cancel(fetch)
    assert faulty.left.wait(LONG_S)
    assert worker.left() == []


def test_a_file_that_is_ready_goes_with_its_fetch(server: Server, vllm: StartVllm) -> None:
    worker = vllm(server.address)
    fetch = worker.obtain(worker.image())
    assert len(worker.left()) == 1
    worker.fetcher.cancel(fetch)
    assert worker.left() == []


def test_a_file_that_is_being_written_goes_when_it_is_written(server: Server, vllm: StartVllm) -> None:
    worker = vllm(server.address, HeldFiles)
    files = worker.files
    assert isinstance(files, HeldFiles)
    fetch = worker.fetcher.start(worker.image())
    assert files.adding.wait(LONG_S)
    worker.fetcher.cancel(fetch)
    files.go.set()
    assert files.removed.wait(LONG_S)
    assert worker.left() == []
    assert not fetch.done


def test_leases_are_given_back_good_or_bad(faulty: FaultySidecar, vllm: StartVllm) -> None:
    worker = vllm(faulty.address, attempts=1)
    worker.fetcher._meeting.result(LONG_S)
    image = worker.image()
    for fault in (None, Fault.NAN):
        faulty.answer(fault)
        worker.obtain(image)
        assert len(faulty.released.get(timeout=LONG_S)) == 1


def test_a_sidecar_with_another_model_is_never_believed(server: Server, vllm: StartVllm) -> None:
    worker = vllm(server.address, fingerprint="a" * 64, attempts=1)
    assert "fingerprint" in (worker.obtain(worker.image()).failure or "")
    assert worker.left() == []


def test_what_cannot_work_is_told_at_the_start(server: Server, vllm: StartVllm, tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="not host:port"):
        vllm([server.address, "no-port"])
    with pytest.raises(Exception, match="token"):
        vllm(server.address, token_file=str(tmp_path / "token"))


def test_a_name_of_a_list_that_is_not_there_is_done_without(server: Server, vllm: StartVllm) -> None:
    worker = vllm([server.address, "no-such-host.invalid:50051"])
    assert worker.obtain(worker.image()).file is not None


def test_closing_ends_what_is_under_way(faulty: FaultySidecar, vllm: StartVllm) -> None:
    worker = vllm(faulty.address)
    faulty.always = Fault.HANG
    fetches = [worker.fetcher.start(worker.image()) for _ in range(4)]
    assert faulty.hanging.wait(LONG_S)
    worker.fetcher.close()
    assert faulty.left.wait(LONG_S)
    assert not any(fetch.done for fetch in fetches)
    assert all(fetch.future is not None and fetch.future.done() for fetch in fetches)
    assert worker.left() == []


def test_closing_does_not_wait_for_a_sidecar_that_never_came(vllm: StartVllm) -> None:
    worker = vllm("127.0.0.1:1")
    worker.fetcher.start(worker.image())
    worker.fetcher.close()
    assert worker.left() == []


def test_many_at_once_all_arrive(server: Server, vllm: StartVllm) -> None:
    worker = vllm(server.address)
    images = [worker.image() for _ in range(12)]
    fetches = [worker.fetcher.start(image) for image in images]
    for image, fetch in zip(images, fetches, strict=True):
        wait(fetch)
        assert np.array_equal(worker.rows(fetch), encoded(server.address, image, worker.tower).data)


def test_closing_gives_back_the_leases_of_what_was_under_way(faulty: FaultySidecar, vllm: StartVllm) -> None:
    """A sidecar that is to end would wait for them."""
    worker = vllm(faulty.address, HeldFiles)
    files = worker.files
    assert isinstance(files, HeldFiles)
    worker.fetcher._meeting.result(LONG_S)
    worker.fetcher.start(worker.image())
    assert files.adding.wait(LONG_S)
    worker.fetcher.close()
    files.go.set()
    assert len(faulty.released.get(timeout=LONG_S)) == 1
