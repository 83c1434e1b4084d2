"""The store: what is kept, what goes when room is needed, what a lease holds, and that it all adds up."""

from __future__ import annotations

import gc
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import (
    LANE,
    description,
    descriptors,
    holds,
    keep,
    kept,
    mappings,
    shared_memory,
    small_file_system,
    taken_bytes,
)

from sidecar.engine import store as store_module
from sidecar.engine.store import Store, default_capacity, loose_draft
from sidecar.engine.store_directory import StoreDirectory
from sidecar.store_file import FILE_NAME, file_bytes

ONE = file_bytes(description())


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def directory() -> Iterator[Path]:
    with shared_memory() as place:
        yield place / "store"


@pytest.fixture
def store(directory: Path, clock: Clock) -> Store:
    """Room for three embeddings of the usual size."""
    return Store(StoreDirectory(directory), 3 * ONE + 100, 10.0, "model", clock)


def names(store: Store) -> set[str]:
    return {path.name for path in store.directory.iterdir()} - {".lock"}


def found(store: Store, *wanted: str) -> list[bool]:
    """Whether each is there; looking makes it the one used last."""
    return [store.find(name, "model") is not None for name in wanted]


def test_an_embedding_is_found_once_it_is_whole(store: Store) -> None:
    draft = store.write("a", description())
    draft.rows[:] = 7
    assert found(store, "a") == [False]
    assert not store.directory.joinpath("a").exists()
    entry = draft.publish(LANE)
    assert entry is not None
    assert store.find("a", "model") is entry
    assert entry.lane == LANE
    assert store.path(entry) == store.directory / "a" / FILE_NAME
    assert holds(store, entry, 7)
    assert store.status().used_bytes == ONE == taken_bytes(store.directory) + ONE - 4096


def test_another_models_entry_is_not_found(store: Store) -> None:
    kept(store, "a")
    assert store.find("a", "another") is None


def test_the_entry_used_longest_ago_goes_first(store: Store) -> None:
    for name in "abc":
        kept(store, name)
    assert found(store, "a") == [True]
    kept(store, "d")
    assert names(store) == {"a", "c", "d"}
    assert found(store, "b", "c", "a") == [False, True, True]
    kept(store, "e")
    assert names(store) == {"a", "c", "e"}
    assert store.status().evictions == 2


def test_a_large_entry_takes_the_place_of_several(store: Store) -> None:
    for name in "abc":
        kept(store, name)
    kept(store, "large", what=description(width=8 + 1024))
    assert "large" in names(store)
    assert store.status().used_bytes <= store.capacity_bytes


def test_a_leased_entry_stays_and_the_next_oldest_goes(store: Store) -> None:
    first = kept(store, "a")
    kept(store, "b")
    lease = store.lease(first)
    assert lease is not None
    for name in "cdef":
        kept(store, name)
    assert names(store) == {"a", "e", "f"}
    assert store.release([lease.id]) == 1
    for name in "gh":
        kept(store, name)
    assert "a" not in names(store)


def test_what_finds_no_room_is_still_handed_out(store: Store) -> None:
    leases = [store.lease(kept(store, name)) for name in "abc"]
    assert all(leases)
    draft = store.write("d", description())
    draft.rows[:] = 3
    assert draft.publish(LANE) is None
    assert (draft.rows == 3).all()
    assert names(store) == set("abc")
    assert store.status().unkept == 1
    assert store.status().evictions == 0


def test_what_is_larger_than_the_store_evicts_nobody(store: Store) -> None:
    for name in "abc":
        kept(store, name)
    assert keep(store, "huge", what=description(tokens=4096)) is None
    assert names(store) == set("abc")


def test_two_leases_on_one_entry_are_two(store: Store) -> None:
    entry = kept(store, "a")
    first, second = store.lease(entry), store.lease(entry)
    assert first and second and first.id != second.id
    assert store.release([first.id, first.id, "unknown", ""]) == 1
    for name in "bcdef":
        kept(store, name)
    assert "a" in names(store)
    assert store.release([first.id, second.id]) == 1
    assert store.leased() == 0


def test_a_lease_that_nobody_releases_expires(store: Store, clock: Clock) -> None:
    entry = kept(store, "a")
    lease = store.lease(entry)
    assert lease is not None
    assert lease.expires == clock.now + 10
    clock.now += 9.9
    later = store.lease(entry)
    assert later is not None
    assert store.leased() == 2
    clock.now += 0.1
    assert store.leased() == 1
    assert store.release([lease.id]) == 0
    for name in "bcd":
        kept(store, name)
    assert "a" in names(store)
    clock.now += 10
    kept(store, "e")
    assert "a" not in names(store)
    assert store.status().expired == 2


def test_room_is_made_by_leases_that_have_just_expired(store: Store, clock: Clock) -> None:
    for name in "abc":
        assert store.lease(kept(store, name))
    assert keep(store, "d") is None
    clock.now += 10
    assert keep(store, "d") is not None


def test_leases_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_LEASES", 2)
    entry = kept(store, "a")
    first = store.lease(entry)
    assert first and store.lease(entry)
    assert store.lease(entry) is None
    store.release([first.id])
    assert store.lease(entry)


def test_what_is_in_the_store_is_not_written_again(store: Store) -> None:
    entry = kept(store, "a", 1)
    assert keep(store, "a", 2) is None
    assert store.find("a", "model") is entry
    assert holds(store, entry, 1)


def test_of_two_that_write_the_same_the_first_is_kept(store: Store) -> None:
    first, second = store.write("a", description()), store.write("a", description())
    first.rows[:], second.rows[:] = 1, 2
    entry = second.publish(LANE)
    assert entry is not None
    assert first.publish(LANE) is None
    assert (first.rows == 1).all()
    assert holds(store, entry, 2)
    assert store.status().used_bytes == ONE
    assert names(store) == {"a"}


def test_a_discarded_draft_leaves_nothing_and_its_rows_stay_usable(store: Store) -> None:
    draft = store.write("a", description())
    draft.rows[:] = 5
    draft.discard()
    draft.discard()
    assert draft.publish(LANE) is None
    assert names(store) == set()
    assert store.status().used_bytes == 0
    assert (draft.rows == 5).all()


def test_discarding_what_was_published_leaves_it(store: Store) -> None:
    draft = store.write("a", description())
    entry = draft.publish(LANE)
    draft.discard()
    assert entry and draft.publish(LANE) is None
    assert names(store) == {"a"}


def test_a_loose_draft_is_never_kept() -> None:
    draft = loose_draft(description())
    assert draft.rows.shape == (4, 8)
    assert draft.publish(LANE) is None
    draft.discard()


def test_rows_in_use_outlive_the_entry(store: Store) -> None:
    draft = store.write("a", description())
    draft.rows[:] = 4
    entry = draft.publish(LANE)
    assert entry is not None
    read = store.read(entry)
    for name in "bcd":
        kept(store, name)
    assert "a" not in names(store)
    assert read is not None
    assert (read == 4).all() and (draft.rows == 4).all()


def test_another_model_takes_the_old_ones_entries_away_as_their_leases_end(store: Store, clock: Clock) -> None:
    entries = [kept(store, name) for name in "abc"]
    released, expired = store.lease(entries[0]), store.lease(entries[1])
    assert released and expired
    draft = store.write("late", description())
    store.turn_over("next")
    assert draft.publish(LANE) is None
    assert names(store) == {"a", "b"}
    # The old model's requests that are still under way.
    assert store.find("a", "model") is entries[0]
    assert store.find("a", "next") is None
    assert keep(store, "d") is None
    # A leased name's new embedding has to wait for it.
    assert keep(store, "a", 2, description(fingerprint="next")) is None
    store.release([released.id])
    assert names(store) == {"b"}
    renewed = kept(store, "a", 2, description(fingerprint="next"))
    assert holds(store, renewed, 2)
    clock.now += 10
    assert store.status().entries == 1
    assert names(store) == {"a"}
    assert store.status().used_bytes == ONE


def test_an_equal_model_keeps_what_is_stored(store: Store) -> None:
    kept(store, "a")
    store.turn_over("model")
    assert found(store, "a") == [True]


@pytest.mark.parametrize("taken", ["the file", "the entry", "everything"])
def test_an_entry_that_somebody_deleted_is_encoded_anew(store: Store, taken: str) -> None:
    def take() -> None:
        if taken == "the file":
            (store.directory / "a" / FILE_NAME).unlink()
        else:
            shutil.rmtree(store.directory / "a" if taken == "the entry" else store.directory)

    for use in (store.lease, store.read):
        if not store.directory.exists():
            break
        entry = kept(store, "a")
        take()
        assert use(entry) is None
        assert found(store, "a") == [False]
        assert store.status().used_bytes == 0


def test_without_its_directory_the_store_keeps_nothing_and_fails_nothing(
    store: Store, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    drafts = [store.write(name, description()) for name in "ab"]
    shutil.rmtree(store.directory)
    assert drafts[0].publish(LANE) is None
    drafts[1].discard()
    for _ in range(3):
        assert keep(store, "c") is None
    assert store.status().used_bytes == 0
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2
    assert "was removed or replaced by somebody" in messages[0]
    assert messages[1].startswith(
        "an embedding could not be stored and is sent inline: the store's directory was removed"
    )
    clock.now += 61
    keep(store, "c")
    assert len(caplog.records) == 3


def test_an_entry_that_somebody_spoilt_is_dropped_and_can_be_stored_again(store: Store) -> None:
    entry = kept(store, "a")
    assert store.lease(entry)
    os.truncate(store.path(entry), 100)
    assert store.read(entry) is None
    assert found(store, "a") == [False]
    assert holds(store, kept(store, "a", 2), 2)
    assert store.status().used_bytes == ONE


def test_somebodys_files_in_an_entry_do_not_block_its_name(store: Store) -> None:
    entry = kept(store, "a")
    (store.directory / "a" / "notes").touch()
    store.path(entry).unlink()
    assert store.read(entry) is None
    assert holds(store, kept(store, "a", 2), 2)


def test_out_of_descriptors_an_entry_in_use_stays_and_every_byte_is_accounted_for(store: Store) -> None:
    leased, free = kept(store, "a"), kept(store, "b")
    assert store.lease(leased)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        read = [store.read(leased), store.read(free)]
        draft = store.write("c", description())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert read == [None, None]
    assert draft.publish(LANE) is None
    assert holds(store, leased)
    kept(store, "b")
    for name in "def":
        kept(store, name)
    assert taken_bytes(store.directory) <= store.status().used_bytes <= store.capacity_bytes


def test_a_name_is_free_at_once_while_its_last_file_is_still_being_removed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        kept(store, name)
    removing, go_on = threading.Event(), threading.Event()
    really = StoreDirectory.remove

    def slowly(self: StoreDirectory, path: Path) -> None:
        if not removing.is_set():
            removing.set()
            assert go_on.wait(20)
        really(self, path)

    monkeypatch.setattr(StoreDirectory, "remove", slowly)
    with ThreadPoolExecutor(1) as pool:
        evicting = pool.submit(keep, store, "d")  # in the place of a
        assert removing.wait(20)
        again = keep(store, "a", 2)  # in the place of b, while the old a is not yet gone
        go_on.set()
        evicting.result(20)
    assert again is not None
    assert holds(store, again, 2)


def test_removing_the_old_models_entries_holds_nobody_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        kept(store, name)
    really = StoreDirectory.remove

    def remove(self: StoreDirectory, path: Path) -> None:
        looking = threading.Thread(target=store.status, daemon=True)
        looking.start()
        looking.join(20)
        held_up.append(looking.is_alive())
        really(self, path)

    held_up: list[bool] = []
    monkeypatch.setattr(StoreDirectory, "remove", remove)
    store.turn_over("next")
    assert held_up == [False] * 3
    assert names(store) == set()


def test_a_file_system_fuller_than_the_store_loses_older_entries_first(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "shm") as shm:
        store = Store(StoreDirectory(shm), 1 << 30, 10.0, "model")
        large = description(tokens=100, width=1000)  # 400 kB
        for name in "abc":
            kept(store, name, what=large)
        assert names(store) == {"b", "c"}
        # Others' files count too, and evicting everything for what still has no room helps nobody.
        (shm / "theirs").write_bytes(bytes(200_000))
        assert keep(store, "huge", what=description(tokens=250, width=1000)) is None
        assert {"b", "c"} <= names(store)
        leases = [store.lease(entry) for name in "bc" if (entry := store.find(name, "model"))]
        assert len(leases) == 2
        assert keep(store, "d", what=large) is None
        assert names(store) == {"b", "c", "theirs"}
        store.turn_over("next")
        store.release([lease.id for lease in leases if lease])
        assert store.status().used_bytes == 0
        assert names(store) == {"theirs"}


def test_a_file_system_out_of_inodes_loses_older_entries_first(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "shm", "1m,nr_inodes=8") as shm:
        store = Store(StoreDirectory(shm), 1 << 30, 10.0, "model")
        for name in "abcdef":
            kept(store, name)
        assert {"e", "f"} <= names(store)


def test_a_closed_store_hands_out_from_memory(store: Store) -> None:
    entry, draft = kept(store, "a"), store.write("b", description())
    store.close()
    assert not store.directory.exists()
    assert store.lease(entry) is None
    assert draft.publish(LANE) is None
    assert keep(store, "c") is None
    store.close()


def test_the_default_capacity_is_half_of_the_file_system_within_reason(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "shm") as shm:
        assert default_capacity(shm / "not" / "yet" / "there") == 1 << 19
    assert default_capacity(Path("/dev/shm")) <= 4 << 30


SIZES = st.lists(st.integers(1, 60_000), min_size=40, max_size=120)


@settings(max_examples=5, deadline=None)
@given(sizes=SIZES, capacity=st.integers(50_000, 400_000))
def test_eight_writers_never_outgrow_the_store_nor_lose_what_is_leased(sizes: list[int], capacity: int) -> None:
    with shared_memory() as place:
        gc.collect()
        before = descriptors()
        store = Store(StoreDirectory(place / "store"), capacity, 1e6, "model")
        work = iter(enumerate(sizes))
        taking = threading.Lock()
        written = threading.Event()

        def writer() -> None:
            while True:
                with taking:
                    number, size = next(work, (-1, 0))
                if number < 0:
                    return
                name = f"name-{number % 23}"
                draft = store.write(name, description(tokens=1, width=size))
                draft.rows[:] = number
                if number % 11 == 10:
                    draft.discard()
                    continue
                entry = draft.publish(LANE) or store.find(name, "model")
                lease = store.lease(entry) if entry else None
                if entry and lease:
                    value = store.read(entry)
                    assert value is not None
                    assert store.path(entry).exists()
                    assert int(value[0, 0]) % 23 == number % 23
                    assert np.all(value == value[0, 0])
                    if number % 7:
                        assert store.release([lease.id]) == 1

        def watcher() -> None:
            while True:
                last = written.is_set()
                # Held, so that nothing is set aside anew while the files are counted one by one.
                with store._lock:
                    assert taken_bytes(store.directory) <= store.status().used_bytes <= capacity
                    for entry in store._entries.values():
                        assert not entry.leases or store.path(entry).exists()
                if last:
                    return

        with ThreadPoolExecutor(9) as pool:
            watching = pool.submit(watcher)
            try:
                for writing in [pool.submit(writer) for _ in range(8)]:
                    writing.result(60)
            finally:
                written.set()
            watching.result(60)
        with store._lock:
            leases = list(store._leases)
            assert store.status().entries == len(names(store))
        store.turn_over("next")
        assert store.release(leases) == len(leases)
        assert (store.status().used_bytes, store.status().entries, names(store)) == (0, 0, set())
        gc.collect()
        assert mappings(store.directory) == []
        store.close()
        assert descriptors() <= before
