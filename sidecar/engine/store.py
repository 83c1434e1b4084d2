"""The store: embeddings as files in shared memory; cache, hand-over and vLLM-readable format in one.

It knows which entries there are, who holds a lease, and what must go when room is needed: the entry used longest ago that
nobody has leased. Nothing it does fails a request: what finds no room is handed out from ordinary memory.

`write` and its `Draft` are for the lanes' threads, the rest for any; whatever takes time happens outside the lock.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sidecar import store_file
from sidecar.engine.status import LaneIdentity, StoreStatus
from sidecar.engine.store_directory import StoreDirectory
from sidecar.engine.store_keys import StoreKeys
from sidecar.store_file import FILE_NAME, Description, StoreFileError
from sidecar.vision.dtypes import Array

logger = logging.getLogger(__name__)

# A caller that takes leases and never gives them back holds memory for each until it expires.
MAX_LEASES = 65_536
_DEFAULT_MOST_BYTES = 4 << 30
_INLINE = "an embedding could not be stored and is sent inline"


@dataclass(slots=True, eq=False)
class Entry:
    """An embedding in the store; `lane` is what encoded it. `name` is that of its directory.

    `key`: the name of the key that it was last asked for by, which may stand for it; empty for none.
    """

    name: str
    description: Description
    lane: LaneIdentity
    file_bytes: int
    leases: int = 0
    key: str = ""


@dataclass(frozen=True, slots=True)
class Lease:
    """A claim on an entry until `expires`, in `time.monotonic` seconds."""

    id: str
    entry: Entry
    expires: float


class Draft:
    """An embedding in the making: `rows`, (tokens, width), is filled in and then published or discarded.

    `rows` stays usable after either, whatever becomes of the file.
    """

    def __init__(self, rows: Array, into: tuple[Store, str, Description, Path] | None = None) -> None:
        self.rows = rows
        self._into = into

    def publish(self, lane: LaneIdentity) -> Entry | None:
        """Let the entry appear. None if it was not to be kept."""
        if self._into is None:
            return None
        (store, name, description, directory), self._into = self._into, None
        return store._publish(directory, name, description, lane)

    def discard(self) -> None:
        """Drop the file, unless it was published."""
        if self._into is not None:
            (store, _, description, directory), self._into = self._into, None
            store._discard(directory, description)


def loose_draft(description: Description) -> Draft:
    """A draft that no store will keep."""
    return Draft(np.empty((description.tokens, description.width), description.dtype.storage))


class Store:
    """Entries of one model, the one with `fingerprint`, in one directory."""

    def __init__(
        self,
        directory: StoreDirectory,
        capacity_bytes: int,
        lease_seconds: float,
        fingerprint: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self.capacity_bytes = capacity_bytes
        self.lease_seconds = lease_seconds
        self._fingerprint = fingerprint
        self._clock = clock
        self._lock = threading.RLock()
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # the one used longest ago comes first
        self._leases: OrderedDict[str, Lease] = OrderedDict()  # the one that expires first comes first
        self._keys = StoreKeys(directory)
        self._used_bytes = self._evictions = self._unkept = self._expired = 0
        self._warned_at = -float("inf")

    @property
    def directory(self) -> Path:
        return self._directory.path

    def path(self, entry: Entry) -> Path:
        return self._directory.entry(entry.name)

    def find(self, name: str, fingerprint: str) -> Entry | None:
        """The entry of a model under a name, its own or that of a key which stands for it; it is now the one used last."""
        with self._lock:
            entry = self._entries.get(name) or self._keys.find(name)
            if entry is None or entry.description.fingerprint != fingerprint:
                return None
            self._entries.move_to_end(entry.name)
            return entry

    def use_key(self, key: str, name: str, entry: Entry | None) -> None:
        """A key has been sent with content, and answered: from now on it stands for that. See `StoreKeys.use`."""
        with self._lock:
            if entry is not None:
                if self._entries.get(entry.name) is not entry:
                    entry = None
                else:
                    entry.key = key
            try:
                self._keys.use(key, name, entry)
            except OSError as error:
                self._warn(
                    "a key could not be linked in the store, where vLLM's ECExampleConnector looks for it", error
                )

    def read(self, entry: Entry) -> Array | None:
        """An entry's rows, mapped read-only; None if it has gone meanwhile."""
        try:
            return store_file.read(self.directory, entry.name, entry.description)
        except (FileNotFoundError, NotADirectoryError, StoreFileError):
            self._forget(entry)
        except OSError:
            self._evict(entry)  # no descriptors left, perhaps: encoded anew, it comes from memory
        return None

    def lease(self, entry: Entry) -> Lease | None:
        """Claim an entry: it is not evicted before it is released or expires. None if it has gone meanwhile."""
        if not os.path.exists(self.path(entry)):  # noqa: PTH110  # twice as quick, and this is the way of every cache hit
            self._forget(entry)
            return None
        now = self._clock()
        with self._lock:
            self._expire(now)
            if self._entries.get(entry.name) is not entry or len(self._leases) >= MAX_LEASES:
                return None
            lease = Lease(secrets.token_urlsafe(16), entry, now + self.lease_seconds)
            self._leases[lease.id] = lease
            entry.leases += 1
            return lease

    def release(self, ids: Iterable[str]) -> int:
        """End leases; returns how many of them were held."""
        with self._lock:
            self._expire(self._clock())
            return sum(self._end_lease(id) for id in ids)

    def leased(self) -> int:
        """How many leases are held now."""
        with self._lock:
            self._expire(self._clock())
            return len(self._leases)

    def write(self, name: str, description: Description) -> Draft:
        """Room for a new entry: in the store, else in ordinary memory."""
        size = store_file.file_bytes(description)
        if self._make_room(name, description.fingerprint, size):
            try:
                directory, rows = self._create(description)
                return Draft(rows, (self, name, description, directory))
            except OSError as error:
                self._give_back(size)
                self._warn(_INLINE, error)
        with self._lock:
            self._unkept += 1
        return loose_draft(description)

    def turn_over(self, fingerprint: str) -> None:
        """Serve another model from now on: what is left of the old one goes as its leases end."""
        with self._lock:
            self._fingerprint = fingerprint
            stale = [entry for entry in self._entries.values() if self._is_stale(entry)]
        for entry in stale:
            self._evict(entry)

    def status(self) -> StoreStatus:
        with self._lock:
            self._expire(self._clock())
            return StoreStatus(
                directory=str(self.directory),
                capacity_bytes=self.capacity_bytes,
                used_bytes=self._used_bytes,
                entries=len(self._entries),
                leases=len(self._leases),
                evictions=self._evictions,
                unkept=self._unkept,
                expired=self._expired,
            )

    def close(self) -> None:
        """Take every file away; who has mapped one keeps it."""
        self._directory.close()

    def _make_room(self, name: str, fingerprint: str, size: int) -> bool:
        """Set `size` bytes aside, evicting what must go. False if the entry cannot or shall not be kept."""
        if size > self.capacity_bytes:
            return False
        while True:
            with self._lock:
                self._expire(self._clock())
                in_place = self._entries.get(name)
                # Equal, or of another model and leased: either stays, and the new one is handed out from memory.
                if fingerprint != self._fingerprint or (in_place and (in_place.leases or not self._is_stale(in_place))):
                    return False
                if in_place is None and self._used_bytes + size <= self.capacity_bytes:
                    self._used_bytes += size
                    return True
            if not self._evict(in_place or self._oldest()):
                return False

    def _create(self, description: Description) -> tuple[Path, Array]:
        """A draft's directory and its rows. Where the file system is fuller than the store, older entries make room.

        Raises:
            OSError: if there is no room all the same.
        """
        while True:
            directory = None
            try:
                directory = self._directory.draft()
                return directory, store_file.create(directory / FILE_NAME, description)
            except OSError as error:
                if directory is not None:
                    self._directory.remove(directory)
                if error.errno != errno.ENOSPC or not self._may_fit(description) or not self._evict(self._oldest()):
                    raise

    def _may_fit(self, description: Description) -> bool:
        """Whether the file system has room once every entry that may go is gone: if not, none needs to."""
        found = os.statvfs(self.directory)
        with self._lock:
            evictable = sum(entry.file_bytes for entry in self._entries.values() if not entry.leases)
        return store_file.file_bytes(description) <= found.f_bavail * found.f_frsize + evictable

    def _publish(self, directory: Path, name: str, description: Description, lane: LaneIdentity) -> Entry | None:
        entry = Entry(name, description, lane, store_file.file_bytes(description))
        try:
            with self._lock:
                if description.fingerprint == self._fingerprint and name not in self._entries:
                    self._directory.publish(directory, name)
                    self._entries[name] = entry
                    return entry
        except OSError as error:
            self._warn(_INLINE, error)
        self._discard(directory, description)
        return None

    def _discard(self, directory: Path, description: Description) -> None:
        self._directory.remove(directory)
        self._give_back(store_file.file_bytes(description))

    def _give_back(self, size: int) -> None:
        with self._lock:
            self._used_bytes -= size

    def _oldest(self) -> Entry | None:
        with self._lock:
            return next((entry for entry in self._entries.values() if not entry.leases), None)

    def _evict(self, entry: Entry | None) -> bool:
        """Remove an entry, unless it has been leased or removed meanwhile and there is one to look for in its place."""
        if entry is None:
            return False
        with self._lock:
            if entry.leases or self._entries.get(entry.name) is not entry:
                return True
            self._evictions += 1
            directory = self._take_out(entry)
        # Its bytes count until they are really free.
        self._discard(directory, entry.description)
        return True

    def _forget(self, entry: Entry) -> None:
        """Drop an entry whose file somebody else took away or spoilt, leased or not."""
        with self._lock:
            if self._entries.get(entry.name) is not entry:
                return
            directory = self._take_out(entry)
        self._discard(directory, entry.description)

    def _take_out(self, entry: Entry) -> Path:
        if entry.key:
            self._keys.forget(entry.key, entry)
        del self._entries[entry.name]
        return self._directory.withdraw(entry.name)

    def _is_stale(self, entry: Entry) -> bool:
        return entry.description.fingerprint != self._fingerprint

    def _expire(self, now: float) -> None:
        while self._leases and (lease := next(iter(self._leases.values()))).expires <= now:
            self._end_lease(lease.id)
            self._expired += 1

    def _end_lease(self, id: str) -> bool:
        lease = self._leases.pop(id, None)
        if lease is None:
            return False
        lease.entry.leases -= 1
        if not lease.entry.leases and self._is_stale(lease.entry):
            self._evict(lease.entry)
        return True

    def _warn(self, what: str, error: OSError) -> None:
        """A full or lost store is said once a minute."""
        if self._clock() - self._warned_at > 60:
            self._warned_at = self._clock()
            logger.warning("%s: %s", what, error.strerror or error)


def default_capacity(directory: Path) -> int:
    """Half of the file system that the directory is or will be on, at most 4 GiB: others need shared memory too."""
    while not directory.exists():
        directory = directory.parent
    with suppress(OSError):
        found = os.statvfs(directory)
        return min(found.f_blocks * found.f_frsize // 2, _DEFAULT_MOST_BYTES)
    return _DEFAULT_MOST_BYTES
