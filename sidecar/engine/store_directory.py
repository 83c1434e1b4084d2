"""The directory that a store lives in: whose it is, one sidecar at a time, and swept of what a crash left.

<store>/.lock                                 held by the living sidecar whose store it is; the mode that the directory had
<store>/.draft-<n>/encoder_cache.safetensors  being written, or being removed
<store>/<name>/encoder_cache.safetensors      whole: its directory was renamed into place
<store>/<key>                                 a link to the name of the entry that the key stands for
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import stat
from contextlib import ExitStack, suppress
from pathlib import Path

from sidecar.store_file import FILE_NAME

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_DRAFT = ".draft-"
_OURS_ALONE = 0o700


class StoreError(OSError):
    """A directory that cannot be this sidecar's store."""


class StoreDirectory:
    """Makes, publishes and removes entries; knows nothing of which are wanted. Safe to call from any thread."""

    def __init__(self, path: Path) -> None:
        """Take the directory, making it where it is missing, and sweep it.

        Raises:
            StoreError: if it is somebody else's, another sidecar's, or holds what no store holds.
        """
        self.path = Path(os.path.abspath(path))  # noqa: PTH100  # resolve() would follow a link
        try:
            while (lock := self._take(path)) is None:
                pass
            self._mode = self._mode_before(lock)
            self.path.chmod(_OURS_ALONE)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"--store {path} cannot be used: {error.strerror or error}") from error
        self._lock = lock
        self._numbers = itertools.count()
        self._closed = self._lost = False
        self.sweep()

    def entry(self, name: str) -> Path:
        """The file of an entry."""
        return self.path / name / FILE_NAME

    def draft(self) -> Path:
        """A directory for a new entry; its file is written at `FILE_NAME` in it.

        Raises:
            OSError: if there is no room, or the store was taken away.
        """
        self._check_open()
        while True:
            draft = self._unnamed()
            with suppress(FileExistsError):  # a sweep had to leave it
                draft.mkdir(mode=0o700)
                return draft

    def publish(self, draft: Path, name: str) -> None:
        """Let an entry appear, whole, under its name.

        Raises:
            OSError: if the name is taken, or the store was taken away.
        """
        self._check_open()
        draft.rename(self.path / name)

    def withdraw(self, name: str) -> Path:
        """Let an entry disappear, so that its name is free at once. What is returned is to be removed, which takes longer."""
        if self._is_ours():
            with suppress(OSError):  # gone already
                return (self.path / name).rename(self._unnamed())
        return self.path / name

    def link(self, key: str, name: str) -> None:
        """Let a key lead to an entry, in place of the one that it led to; a reader finds one of the two at any moment.

        Raises:
            OSError: if there is no room, something else lies there, or the store was taken away. What the key led to stays.
        """
        self._check_open()
        draft = self._unnamed()
        draft.symlink_to(name)
        try:
            while True:
                try:
                    draft.rename(self.path / key)
                    return
                except IsADirectoryError:
                    # vLLM's ECExampleConnector makes an empty one each time that it looks in vain.
                    with suppress(FileNotFoundError):
                        (self.path / key).rmdir()
        except OSError:
            draft.unlink(missing_ok=True)
            raise

    def unlink(self, key: str) -> None:
        """Let a key lead nowhere. What is no link is not ours."""
        with suppress(OSError):
            if (self.path / key).is_symlink():
                (self.path / key).unlink()

    def remove(self, directory: Path) -> None:
        """Take an entry or a draft away; one that is gone already is no error. What a link leads to is not ours."""
        if not self._is_ours():
            return
        with suppress(OSError):
            if directory.is_symlink():
                directory.unlink()
                return
            (directory / FILE_NAME).unlink(missing_ok=True)
            directory.rmdir()

    def sweep(self) -> None:
        """Remove every entry, draft and key. Whatever else lies here is left, with a warning."""
        for child in self.path.iterdir():
            if child.name == _LOCK:
                continue
            if not child.is_symlink() and child.is_dir():
                self.remove(child)
            elif child.is_symlink() and len(child.readlink().parts) == 1:
                self.unlink(child.name)
            if child.is_symlink() or child.exists():
                logger.warning("%s is no embedding and stays; a store should hold nothing else", child)

    def close(self) -> None:
        """Remove everything, the directory too where it is ours alone; one that stays, as a mount does, gets its mode back.

        Writers get an OSError from now on. A directory that was removed and made anew meanwhile is another's, and is left alone.
        """
        if self._closed:
            return
        self._closed = True
        with suppress(OSError):
            if self._is_ours():
                self._leave()
        os.close(self._lock)

    def _leave(self) -> None:
        lock = self.path / _LOCK
        self.sweep()
        lock.unlink()
        try:
            self.path.rmdir()
        except OSError:
            # Something had to be left, and the next sidecar must know it for a store all the same.
            lock.touch(0o600)
            self.path.chmod(self._mode)

    def _check_open(self) -> None:
        """Raises:
        OSError: if the path may be another sidecar's by now.
        """
        if self._closed:
            raise OSError(errno.ESHUTDOWN, "the store is closed")
        if not self._is_ours():
            raise OSError(errno.ENOENT, "the store's directory was removed or replaced; restart the sidecar")

    def _is_ours(self) -> bool:
        """Whether the directory under our path is still the one that we took: its lock is the file that we hold."""
        try:
            ours = os.path.samestat(os.fstat(self._lock), (self.path / _LOCK).lstat())
        except OSError:
            ours = False
        if not ours and not self._lost:
            self._lost = True
            logger.warning(
                "--store %s was removed or replaced by somebody; nothing is stored until a restart", self.path
            )
        return ours

    def _mode_before(self, lock: int) -> int:
        """The directory's mode before it was a store. Noted in the lock, for whoever comes after a crash."""
        if noted := os.pread(lock, 8, 0):
            with suppress(ValueError):
                return int(noted, 8) & 0o7777
        mode = stat.S_IMODE(self.path.stat().st_mode)
        os.pwrite(lock, f"{mode:04o}".encode(), 0)
        return mode

    def _unnamed(self) -> Path:
        return self.path / f"{_DRAFT}{next(self._numbers)}"

    def _take(self, named: Path) -> int | None:
        """Make the directory where it is missing, and hold its lock. None if its last holder took it away just then.

        Raises:
            StoreError: if another sidecar holds it, or the directory is something else.
        """
        with suppress(FileExistsError):
            self.path.mkdir(mode=0o700, parents=True)
        with suppress(FileNotFoundError), ExitStack() as failing:
            self._check_ours(named)
            handle = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            failing.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(
                    f"--store {named} is another sidecar's; give each one a directory of its own"
                ) from None
            # What we have locked may have been removed since we opened it, and be nobody's lock any more.
            if os.path.samestat(os.fstat(handle), (self.path / _LOCK).lstat()):
                failing.pop_all()
                return handle
        return None

    def _check_ours(self, named: Path) -> None:
        """A directory with things in it and no lock was never a store, and is not to be swept.

        Raises:
            StoreError: if the directory is something else than a store of ours, or a place for one.
        """
        found = self.path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise StoreError(f"--store {named} is a link or a file; name a directory")
        if found.st_uid != os.geteuid():
            raise StoreError(f"--store {named} belongs to another user; name a directory of your own")
        lock = self.path / _LOCK
        if not lock.exists() and any(child != lock for child in self.path.iterdir()):
            raise StoreError(f"--store {named} holds other files; name a directory for the store alone")
