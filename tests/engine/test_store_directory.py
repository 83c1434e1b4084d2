"""The store's directory: whose it is, what a crash or somebody else left in it, and that one sidecar at a time has it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from stores import descriptors

from sidecar.engine.store_directory import StoreDirectory, StoreError
from sidecar.store_file import FILE_NAME

HOLDER = """
import sys
from pathlib import Path
from sidecar.engine.store_directory import StoreDirectory
store = StoreDirectory(Path(sys.argv[1]))
for name in ("entry", None):
    draft = store.draft()
    (draft / "encoder_cache.safetensors").write_bytes(b"rows")
    if name:
        store.publish(draft, name)
print("here", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another sidecar, with an entry and a draft in its store."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
            yield process
        finally:
            process.kill()


def publish(store: StoreDirectory, name: str, content: bytes = b"rows") -> None:
    draft = store.draft()
    (draft / FILE_NAME).write_bytes(content)
    store.publish(draft, name)


def names(path: Path) -> set[str]:
    return {child.name for child in path.iterdir()} - {".lock"}


def test_a_missing_directory_is_made_for_its_owner_alone(path: Path) -> None:
    store = StoreDirectory(path / "deep" / "down")
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o700
    publish(store, "name")
    assert store.entry("name").read_bytes() == b"rows"
    assert stat.S_IMODE(store.entry("name").parent.stat().st_mode) == 0o700
    store.close()
    assert list(path.iterdir()) == [path / "deep"]


def test_an_open_directory_is_closed_to_others(path: Path) -> None:
    path.mkdir(mode=0o777)
    StoreDirectory(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_relative_path_means_the_same_after_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = StoreDirectory(Path("store"))
    monkeypatch.chdir("/")
    publish(store, "name")
    assert (tmp_path / "store" / "name" / FILE_NAME).exists()


def test_another_sidecars_store_is_refused_and_left_alone_until_it_ends(path: Path) -> None:
    with holder(path) as other:
        before = descriptors()
        with pytest.raises(
            StoreError, match=f"--store {path} is another sidecar's; give each one a directory of its own"
        ):
            StoreDirectory(path)
        assert descriptors() <= before
        assert names(path) == {"entry", ".draft-1"}
        other.communicate("")
        StoreDirectory(path)


def test_what_a_killed_sidecar_left_is_swept(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with holder(path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert names(path) == {"entry", ".draft-1"}
    store = StoreDirectory(path)
    assert names(path) == set()
    assert caplog.records == []
    publish(store, "entry")


def test_a_directory_that_was_never_a_store_is_refused_and_left_alone(path: Path) -> None:
    (path / "photos").mkdir(parents=True)
    (path / "photos" / FILE_NAME).touch()
    with pytest.raises(StoreError, match="holds other files; name a directory for the store alone"):
        StoreDirectory(path)
    assert (path / "photos" / FILE_NAME).exists()
    assert names(path) == {"photos"}
    assert not (path / ".lock").exists()


def test_a_link_or_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "dangling"):
        with pytest.raises(StoreError, match=f"--store {tmp_path}/{name} is a link or a file; name a directory"):
            StoreDirectory(tmp_path / name)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert not (tmp_path / "nowhere").exists()


def test_a_directory_below_a_file_is_refused_in_the_systems_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be used: Not a directory"):
        StoreDirectory(tmp_path / "file" / "store")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to give a directory away")
def test_somebody_elses_directory_is_refused_and_left_alone(path: Path) -> None:
    path.mkdir()
    os.chown(path, 4711, 4711)
    with pytest.raises(StoreError, match="belongs to another user; name a directory of your own"):
        StoreDirectory(path)
    assert list(path.iterdir()) == []


def test_a_lock_that_is_a_link_is_refused(path: Path, tmp_path: Path) -> None:
    path.mkdir()
    target = tmp_path / "target"
    target.write_text("theirs")
    (path / ".lock").symlink_to(target)
    with pytest.raises(StoreError):
        StoreDirectory(path)
    (path / ".lock").unlink()
    (path / ".lock").symlink_to(tmp_path / "dangling")
    with pytest.raises(StoreError):
        StoreDirectory(path)
    assert target.read_text() == "theirs"
    assert not (tmp_path / "dangling").exists()


def test_a_lock_taken_while_its_last_holder_removes_it_still_keeps_a_third_out(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at a restart: one stops, the next is starting, and a third follows."""
    first = StoreDirectory(path)
    really = fcntl.flock

    def lock(handle: int, how: int) -> None:
        first.close()
        really(handle, how)

    monkeypatch.setattr(fcntl, "flock", lock)
    second = StoreDirectory(path)
    monkeypatch.undo()
    with pytest.raises(StoreError, match="another sidecar's"):
        StoreDirectory(path)
    publish(second, "name")
    assert second.entry("name").exists()


def foreign(path: Path, tmp_path: Path) -> set[str]:
    """Leave things in a store that no store leaves there; returns their names."""
    theirs = tmp_path / "theirs"
    theirs.mkdir(exist_ok=True)
    (theirs / FILE_NAME).write_text("theirs")
    (path / "README").write_text("mine")
    (path / "link").symlink_to(theirs)
    (path / "dangling").symlink_to(tmp_path / "nowhere")
    (path / "nested" / "deeper").mkdir(parents=True)
    (path / ".draft-0").mkdir()
    (path / ".draft-0" / "notes").write_text("mine")
    return {"README", "link", "dangling", "nested", ".draft-0"}


def test_what_no_store_left_is_not_swept_and_is_no_hindrance(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with holder(path):
        left = foreign(path, tmp_path)
    with caplog.at_level(logging.WARNING):
        store = StoreDirectory(path)
    assert names(path) == left
    assert (tmp_path / "theirs" / FILE_NAME).read_text() == "theirs"
    warned = {name for name in left for record in caplog.records if f"{path / name} is no embedding" in record.message}
    assert warned == left
    publish(store, "name")
    with pytest.raises(OSError):
        publish(store, "link")
    assert (tmp_path / "theirs" / FILE_NAME).read_text() == "theirs"


def test_a_store_closed_with_somebodys_files_in_it_is_still_a_store(path: Path, tmp_path: Path) -> None:
    store = StoreDirectory(path)
    publish(store, "name")
    left = foreign(path, tmp_path)
    store.close()
    assert names(path) == left
    StoreDirectory(path)


def test_closing_removes_everything_and_can_be_asked_for_twice(path: Path) -> None:
    store = StoreDirectory(path)
    publish(store, "name")
    (store.draft() / FILE_NAME).touch()
    store.close()
    assert not path.exists()
    # What has the lock's number by now is somebody else's.
    read, write = os.pipe()
    store.close()
    os.write(write, b"x")
    assert os.read(read, 1) == b"x"
    for handle in (read, write):
        os.close(handle)


def test_a_directory_that_was_taken_away_can_still_be_closed(path: Path) -> None:
    store = StoreDirectory(path)
    before = descriptors()
    shutil.rmtree(path)
    with pytest.raises(FileNotFoundError):
        store.draft()
    store.remove(path / "name")
    store.close()
    assert descriptors() <= before - 1


def test_who_still_writes_to_a_closed_store_does_not_write_into_the_next_ones(path: Path) -> None:
    old = StoreDirectory(path)
    draft = old.draft()
    old.close()
    new = StoreDirectory(path)
    with pytest.raises(OSError, match="the store is closed"):
        old.draft()
    with pytest.raises(OSError):
        old.publish(draft, "name")
    assert names(path) == set()
    publish(new, "name")
    old.close()
    assert new.entry("name").exists()


def test_a_name_is_published_once(path: Path) -> None:
    store = StoreDirectory(path)
    publish(store, "name", b"first")
    with pytest.raises(OSError):
        publish(store, "name", b"second")
    assert store.entry("name").read_bytes() == b"first"


def test_a_withdrawn_name_is_free_before_its_file_is_gone(path: Path) -> None:
    store = StoreDirectory(path)
    publish(store, "name", b"first")
    withdrawn = store.withdraw("name")
    publish(store, "name", b"second")
    store.remove(withdrawn)
    store.remove(withdrawn)
    assert names(path) == {"name"}
    assert store.entry("name").read_bytes() == b"second"
    store.remove(store.withdraw("missing"))
    assert names(path) == {"name"}


def test_a_link_planted_in_an_entrys_place_takes_nothing_of_what_it_leads_to(path: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / FILE_NAME).touch()
    store = StoreDirectory(path)
    (path / "name").symlink_to(theirs)
    store.remove(store.withdraw("name"))
    assert names(path) == set()
    assert (theirs / FILE_NAME).exists()


def test_threads_never_share_a_draft(path: Path) -> None:
    store = StoreDirectory(path)
    with ThreadPoolExecutor(8) as pool:
        drafts = list(pool.map(lambda _: store.draft(), range(200)))
    assert len(set(drafts)) == 200


def test_a_directory_that_was_removed_and_taken_by_another_is_left_alone(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = StoreDirectory(path)
    publish(first, "name")
    draft = first.draft()
    shutil.rmtree(path)
    second = StoreDirectory(path)
    publish(second, "name")
    (second.draft() / FILE_NAME).write_bytes(b"rows")
    with pytest.raises(OSError, match="was removed or replaced"):
        publish(first, "another")
    first.remove(first.withdraw("name"))
    first.remove(draft)
    first.close()
    assert names(path) == {"name", ".draft-1"}
    with pytest.raises(StoreError, match="another sidecar's"):
        StoreDirectory(path)
    (warning,) = caplog.records
    assert f"--store {path} was removed or replaced" in warning.getMessage()


@pytest.mark.parametrize("crash", [False, True])
def test_a_directory_that_stays_has_its_mode_back(path: Path, monkeypatch: pytest.MonkeyPatch, crash: bool) -> None:
    """A mount point cannot be removed, and others may need it."""
    path.mkdir()
    path.chmod(0o1777)
    store = StoreDirectory(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    if crash:
        os.close(store._lock)
        store = StoreDirectory(path)

    def busy(self: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rmdir", busy)
    store.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o1777
    StoreDirectory(path)
