"""What a key alone stands for: the content that it was last sent with, or nothing; in the store and in its directory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from stores import description, kept

from sidecar.engine.store import Entry, Store
from sidecar.engine.store_directory import StoreDirectory
from sidecar.store_file import FILE_NAME, file_bytes

SIZE = file_bytes(description())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    opened = Store(StoreDirectory(path), 4 * SIZE, 60.0, "model")
    yield opened
    opened.close()


def sent(store: Store, name: str) -> Entry:
    """The key has been sent with the content of this name."""
    entry = store.find(name, "model") or kept(store, name)
    store.use_key("key", name, entry)
    return entry


def stands_for(store: Store) -> str | None:
    """What the key stands for, by the store and by the directory alike."""
    entry = store.find("key", "model")
    link = store.directory / "key"
    assert link.is_symlink() == (entry is not None)
    if entry is None:
        return None
    assert str(link.readlink()) == entry.name and (link / FILE_NAME).exists()
    return entry.name


def test_it_stands_for_the_content_that_it_was_last_sent_with(store: Store) -> None:
    assert stands_for(store) is None
    for name in ("one", "one", "two", "one"):
        sent(store, name)
        assert stands_for(store) == name


def test_while_another_content_is_leased_it_stands_for_nothing(store: Store) -> None:
    first = store.lease(sent(store, "one"))
    second = store.lease(sent(store, "two"))
    assert first and second
    assert stands_for(store) is None
    sent(store, "one")
    assert stands_for(store) is None  # "two" is leased too
    store.release([second.id])
    assert stands_for(store) is None
    sent(store, "one")
    assert stands_for(store) == "one"  # which its own lease does not hinder
    sent(store, "two")
    assert stands_for(store) is None
    store.release([first.id])
    sent(store, "two")
    assert stands_for(store) == "two"


def test_content_that_could_not_be_kept_takes_the_key_away(store: Store) -> None:
    sent(store, "one")
    store.use_key("key", "large", None)
    assert stands_for(store) is None
    store.use_key("key", "large", None)
    assert stands_for(store) is None
    sent(store, "one")
    assert stands_for(store) == "one"
    store.use_key("key", "one", None)  # it is there, and was only not written twice
    assert stands_for(store) == "one"


def test_it_goes_with_what_it_stands_for(store: Store, path: Path) -> None:
    sent(store, "one")
    sent(store, "two")
    for number in range(4):
        kept(store, f"other-{number}")
    assert stands_for(store) is None
    assert not store._keys._keys  # nothing is left of it
    assert not [child for child in path.iterdir() if child.is_symlink()]


def test_the_eviction_of_what_it_no_longer_stands_for_leaves_it(store: Store) -> None:
    sent(store, "one")
    sent(store, "two")
    for number in range(2):
        kept(store, f"other-{number}")
    store.find("two", "model")
    kept(store, "other-2")
    assert store.find("one", "model") is None
    assert stands_for(store) == "two"


def test_an_empty_directory_in_its_place_does_not_hinder_it(store: Store, path: Path) -> None:
    (path / "key").mkdir()  # as ECExampleConnector makes
    sent(store, "one")
    assert stands_for(store) == "one"


def test_a_reader_that_keeps_looking_in_vain_does_not_hinder_it(store: Store, path: Path) -> None:
    """It makes the directory again as soon as it is gone."""
    looking = threading.Event()

    def look() -> None:
        while not looking.is_set():
            if not (path / "key" / FILE_NAME).exists():
                with suppress(FileExistsError):
                    (path / "key").mkdir()

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for number in range(200):
            sent(store, f"content-{number % 4}")
            assert (path / "key").is_symlink()
            store.use_key("key", "not kept", None)
    finally:
        looking.set()
        reader.join()


def test_what_cannot_be_linked_is_still_found(store: Store, path: Path) -> None:
    (path / "key").mkdir()
    (path / "key" / "somebody's").touch()
    entry = sent(store, "one")
    assert store.find("key", "model") is entry
    assert not (path / "key").is_symlink()


def test_a_restart_sweeps_links_of_ours_and_no_others(tmp_path: Path, path: Path) -> None:
    killed = StoreDirectory(path)
    killed.link("key", "one")
    killed.link("led nowhere", "gone")
    (path / "somebody's").symlink_to(tmp_path)
    (path / ".lock").rename(path / ".was-lock")  # as if its process were gone
    (path / ".lock").touch()
    (path / ".was-lock").unlink()
    StoreDirectory(path)
    assert {child.name for child in path.iterdir()} == {".lock", "somebody's"}
