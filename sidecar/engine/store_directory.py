"""The directory that a store lives in: whose it is, one sidecar at a time, and swept of what a crash left.

<store>/.lock                                 held by the living sidecar whose store it is
<store>/.draft-<n>/encoder_cache.safetensors  being written
<store>/<name>/encoder_cache.safetensors      whole: its directory was renamed into place
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

from sidecar.store_file import FILE_NAME

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_DRAFT = ".draft-"


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
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.path.lstat()
            if not stat.S_ISDIR(found.st_mode):
                raise StoreError(f"--store {path} is a link or a file; name a directory")
            if found.st_uid != os.geteuid():
                raise StoreError(f"--store {path} belongs to another user; name a directory of your own")
            self._lock = self._take()
            self.path.chmod(0o700)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"--store {path} cannot be used: {error.strerror or error}") from error
        self.sweep()

    def entry(self, name: str) -> Path:
        """The file of an entry."""
        return self.path / name / FILE_NAME

    def draft(self, number: int) -> Path:
        """A directory for a new entry; its file is written at `FILE_NAME` in it.

        Raises:
            OSError: if there is no room, or the store was taken away.
        """
        draft = self.path / f"{_DRAFT}{number}"
        draft.mkdir(mode=0o700)
        return draft

    def publish(self, draft: Path, name: str) -> None:
        """Let an entry appear, whole, under its name.

        Raises:
            OSError: if the name is taken, or the store was taken away.
        """
        draft.rename(self.path / name)

    def remove(self, directory: Path) -> None:
        """Take an entry or a draft away; one that is gone already is no error."""
        with suppress(OSError):
            (directory / FILE_NAME).unlink(missing_ok=True)
            directory.rmdir()

    def sweep(self) -> None:
        """Remove every entry and draft. Whatever else lies here is left, with a warning."""
        for child in self.path.iterdir():
            if child.name == _LOCK:
                continue
            if not child.is_symlink() and child.is_dir():
                self.remove(child)
            if child.is_symlink() or child.exists():
                logger.warning("%s is no embedding and stays; a store should hold nothing else", child)

    def close(self) -> None:
        """Remove everything, the directory too where it is ours alone."""
        self.sweep()
        with suppress(OSError):
            (self.path / _LOCK).unlink()
            self.path.rmdir()
        os.close(self._lock)

    def _take(self) -> int:
        """Hold the lock. A directory with things in it and no lock was never a store, and is not to be swept.

        Raises:
            StoreError: if another sidecar holds it, or the directory is something else.
        """
        lock = self.path / _LOCK
        if not lock.exists() and any(self.path.iterdir()):
            raise StoreError(f"--store {self.path} holds other files; name a directory for the store alone")
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise StoreError(
                f"--store {self.path} is another sidecar's; give each one a directory of its own"
            ) from None
        return handle
