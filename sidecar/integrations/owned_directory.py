"""A directory that is gone with the process that made it: by itself, or where it was killed, by the next of its kind."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

_LOCK = ".lock"


class OwnedDirectory:
    """<parent>/<prefix><random>, of mode 0700, with a `.lock` that is held by the living process whose it is.

    Attributes:
        path: the directory.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        """Make it, after removing those of processes that are gone.

        Raises:
            OSError: if `parent` cannot be written.
        """
        for left in parent.glob(prefix + "*"):
            _remove_if_left(left)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))  # of mode 0700
            self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if (self.path / _LOCK).exists():
                break
            # Another process that starts now took it for one left behind, while it was not locked yet.
            os.close(self._lock)
        # Where its user ends without a word, as in a script.
        self._remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def close(self) -> None:
        """Remove it with all that it holds."""
        self._remove()
        with suppress(OSError):
            os.close(self._lock)


def _remove_if_left(directory: Path) -> None:
    with suppress(OSError):  # somebody else's, or gone meanwhile
        if directory.is_symlink() or directory.stat().st_uid != os.geteuid():
            return
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(lock)
