"""The files of `local` mode: written for a prefill worker on this host, and removed once it has read them.

Dynamo's prefill loads such a file and leaves it there. That it has read it, the kernel tells: somebody who had the file open for
reading closes it (inotify(7), IN_CLOSE_NOWRITE). What a reader has open or mapped stays with it. A file that nobody reads goes
when its time is over: its request was given up. So many bytes may lie there at a time; what is more waits.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import itertools
import json
import logging
import mmap
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sidecar.integrations.owned_directory import OwnedDirectory
from sidecar.vision.dtypes import Array, DType

logger = logging.getLogger(__name__)

_PREFIX = "epd-dynamo-"
_TENSOR = "ec_cache"  # as LocalEmbeddingReceiver of dynamo/common/multimodal/embedding_transfer.py reads it
_ALIGNMENT = 8
_MOST_HEADER_BYTES = 256
_IN_CLOSE_NOWRITE = 0x10
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows
_EVENT_BYTES = 64 << 10
# safetensors opens a file once or, in older versions, again while it is open. A reader that closes it in between has so long.
_READ_S = 0.1
# Of the file system; other things lie in shared memory too.
_SHARE = 0.8


@dataclass(slots=True)
class _File:
    size: int
    removal: asyncio.TimerHandle
    read: bool = False


class LocalFiles:
    """To be made and used on one event loop.

    Attributes:
        path: the directory, of mode 0700 and this process's own; what a dead process left beside it is removed.
        bytes: of the files that lie there or are being written.
        unread: how many were removed without having been read.
    """

    def __init__(self, parent: Path, *, capacity_bytes: int, unread_s: float) -> None:
        """Raises:
        OSError: if `parent` cannot be written, or the kernel has no inotify to spare.
        """
        self._directory = OwnedDirectory(parent, _PREFIX)
        self.path = self._directory.path
        self.bytes = self.unread = 0
        self._capacity_bytes = _possible(capacity_bytes, self.path)
        self._unread_s = unread_s
        self._files: dict[str, _File] = {}
        self._writing: set[asyncio.Future[None]] = set()
        self._numbers = itertools.count(1)
        self._turn = asyncio.Lock()
        self._removed = asyncio.Event()
        self._all_read = asyncio.Event()
        self._all_read.set()
        self._loop = asyncio.get_running_loop()
        self._watch = _watch(self.path)
        self._loop.add_reader(self._watch, self._notice)

    @property
    def count(self) -> int:
        """How many lie there."""
        return len(self._files)

    async def add(self, embeddings: Sequence[tuple[Array, DType]]) -> list[Path]:
        """Write those of one request, all or none; waits for room for all of them, in turn.

        Each on its own could not be read before the others have room, and requests would wait for one another for ever.

        Args:
            embeddings: (tokens, width) of `DType.storage` each. More than there is ever room for waits until it is alone.

        Raises:
            OSError: if the file system is full of other things, or fails.
        """
        size = sum(_bytes_taken(values) for values, _ in embeddings)
        async with self._turn:
            while self.bytes and self.bytes + size > self._capacity_bytes:
                self._removed.clear()
                await self._removed.wait()
            self.bytes += size
        paths = [self.path / f"{next(self._numbers)}.safetensors" for _ in embeddings]
        writing: asyncio.Future[None] | None = None
        try:
            while writing is None:
                writing = asyncio.ensure_future(asyncio.to_thread(_write_all, paths, embeddings))
                self._writing.add(writing)
                writing.add_done_callback(self._writing.discard)
                try:
                    await asyncio.shield(writing)
                except OSError as error:
                    # Others have filled the file system; what lies here already will make room.
                    if error.errno != errno.ENOSPC or not self._files:
                        raise
                    _unlink(paths)
                    writing = None
                    self._removed.clear()
                    await self._removed.wait()
        except BaseException:
            if writing is None:
                self._give_back(size)
            else:  # the thread goes on when its caller is cancelled
                writing.add_done_callback(lambda done: self._spoilt(done, paths, size))
            raise
        for path, (values, _) in zip(paths, embeddings, strict=True):
            self._files[path.name] = _File(
                _bytes_taken(values), self._loop.call_later(self._unread_s, self._give_up, path.name)
            )
        self._tell()
        return paths

    async def close(self, wait_s: float) -> None:
        """Remove all of them, those that have not been read only after `wait_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._all_read.wait()
        if self._files:
            await asyncio.sleep(_READ_S)
        if self._writing:
            await asyncio.wait(self._writing)
        for file in self._files.values():
            file.removal.cancel()
        self._loop.remove_reader(self._watch)
        os.close(self._watch)
        self.discard()

    def discard(self) -> None:
        """Remove the directory with all that it holds, at once."""
        self._directory.close()

    def _notice(self) -> None:
        with suppress(BlockingIOError):
            for name in _names(os.read(self._watch, _EVENT_BYTES)):
                if (file := self._files.get(name)) is not None:
                    file.read = True
                    file.removal.cancel()
                    file.removal = self._loop.call_later(_READ_S, self._remove, name)
            self._tell()

    def _give_up(self, name: str) -> None:
        self.unread += 1
        logger.warning("an embedding was not read within %g s and is removed", self._unread_s)
        self._remove(name)

    def _remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)
        self.bytes -= self._files.pop(name).size
        self._tell()

    def _spoilt(self, writing: asyncio.Future[None], paths: Sequence[Path], size: int) -> None:
        if not writing.cancelled():
            writing.exception()  # whoever waited has been told
        _unlink(paths)
        self._give_back(size)

    def _give_back(self, size: int) -> None:
        self.bytes -= size
        self._tell()

    def _tell(self) -> None:
        self._removed.set()
        if all(file.read for file in self._files.values()):
            self._all_read.set()
        else:
            self._all_read.clear()


def _possible(capacity_bytes: int, directory: Path) -> int:
    """Not more than there is room for: a container's /dev/shm has 64 MiB unless it is told otherwise."""
    system = os.statvfs(directory)
    room = int(system.f_bavail * system.f_frsize * _SHARE)
    if room < capacity_bytes:
        logger.warning(
            "embeddings in %s may take %d MiB instead of %d: its file system has no more room",
            directory,
            room >> 20,
            capacity_bytes >> 20,
        )
    return min(room, capacity_bytes)


def _bytes_taken(values: Array) -> int:
    """By its file, which is of whole pages."""
    return -(-(values.nbytes + _MOST_HEADER_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE


def _unlink(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _write_all(paths: Sequence[Path], embeddings: Sequence[tuple[Array, DType]]) -> None:
    for path, (values, dtype) in zip(paths, embeddings, strict=True):
        _write(path, values, dtype)


def _write(path: Path, values: Array, dtype: DType) -> None:
    """A safetensors file of one tensor, (1, tokens, width) (https://huggingface.co/docs/safetensors, "Format")."""
    tensor = {"dtype": dtype.safetensors, "shape": (1, *values.shape), "data_offsets": (0, values.nbytes)}
    header = json.dumps({"__metadata__": {"format": "pt"}, _TENSOR: tensor}).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(np.ascontiguousarray(values).data)


def _watch(directory: Path) -> int:
    """An inotify descriptor that tells of each file in it that a reader closes."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch: int = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    if watch < 0:
        raise OSError(ctypes.get_errno(), "the kernel gives no inotify instance (fs.inotify.max_user_instances)")
    if libc.inotify_add_watch(watch, os.fsencode(directory), _IN_CLOSE_NOWRITE) < 0:
        number = ctypes.get_errno()
        os.close(watch)
        raise OSError(number, f"inotify cannot watch {directory} (fs.inotify.max_user_watches)")
    return watch


def _names(events: bytes) -> set[str]:
    """Of the files that events are about."""
    names, place = set(), 0
    while place < len(events):
        *_, length = _EVENT.unpack_from(events, place)
        place += _EVENT.size
        names.add(events[place : place + length].rstrip(b"\0").decode(errors="replace"))
        place += length
    return names
