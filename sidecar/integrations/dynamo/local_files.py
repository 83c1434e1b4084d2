"""The files of `local` mode: written for a prefill worker on this host, and removed once it has read them.

Dynamo's prefill loads such a file and leaves it there. The kernel tells when one is closed (inotify(7), IN_CLOSE_NOWRITE); a
reader opens it more than once, so it goes a moment after the last closing. A file that nobody reads goes when its time is over:
its request was given up. So many bytes may lie there at a time; who would add more waits.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sidecar.integrations.owned_directory import OwnedDirectory
from sidecar.vision.dtypes import Array, DType

logger = logging.getLogger(__name__)

_PREFIX = "epd-dynamo-"
_TENSOR = "ec_cache"  # as LocalEmbeddingReceiver reads it
_CLOSED_UNWRITTEN = 0x10
_CLOSE_ON_EXEC, _NON_BLOCKING = os.O_CLOEXEC, os.O_NONBLOCK
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows
_EVENT_BYTES = 64 << 10
_ALIGNMENT = 8
# Between two openings by one reader.
_AFTER_READ_S = 2.0
_LOOK_S = 0.5


@dataclass(slots=True)
class _File:
    size: int
    goes_at: float
    read: bool = False


class LocalFiles:
    """To be made and used on one event loop."""

    def __init__(self, parent: Path, *, capacity_bytes: int, unread_s: float) -> None:
        """Raises:
        OSError: if `parent` cannot be written, or the kernel has no inotify to spare.
        """
        self._directory = OwnedDirectory(parent, _PREFIX)
        self.path = self._directory.path
        self._capacity_bytes = capacity_bytes
        self._unread_s = unread_s
        self._files: dict[str, _File] = {}
        self._bytes = 0
        self._number = 0
        self._changed = asyncio.Condition()
        self._loop = asyncio.get_running_loop()
        self._watch = _watch(self.path)
        self._loop.add_reader(self._watch, self._notice)
        self._sweeping = self._loop.create_task(self._sweep())
        self.unread = 0

    async def add(self, values: Array, shape: tuple[int, ...], dtype: DType) -> Path:
        """Write one; waits for room.

        Raises:
            OSError: if the file system is full.
        """
        size = values.nbytes
        async with self._changed:
            await self._changed.wait_for(lambda: not self._bytes or self._bytes + size <= self._capacity_bytes)
            self._bytes += size
            self._number += 1
            name = f"{self._number}.safetensors"
        draft = self.path / f".{name}"
        writing = asyncio.ensure_future(asyncio.to_thread(_write, draft, values, shape, dtype))
        try:
            await asyncio.shield(writing)
        except BaseException:
            # A thread that has begun cannot be stopped, and would leave its file behind.
            await asyncio.gather(writing, return_exceptions=True)
            draft.unlink(missing_ok=True)
            self._free(size)
            raise
        self._files[name] = _File(size, time.monotonic() + self._unread_s)
        draft.rename(self.path / name)
        return self.path / name

    def remove(self, path: str | Path) -> None:
        """Now, whoever may still want it. Nothing, if it is gone already."""
        file = self._files.pop(Path(path).name, None)
        if file is not None:
            (self.path / Path(path).name).unlink(missing_ok=True)
            self._free(file.size)

    @property
    def count(self) -> int:
        """How many lie there."""
        return len(self._files)

    async def close(self, drain_s: float) -> None:
        """Remove all of them, those that have not been read only after `drain_s`."""
        ends = time.monotonic() + drain_s
        while any(not file.read for file in self._files.values()) and time.monotonic() < ends:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)  # what comes is a reader's closing, and it has no end of its own
        if self._files:
            # Whoever has closed one may be about to open it again.
            await asyncio.sleep(_AFTER_READ_S)
        self._sweeping.cancel()
        self._loop.remove_reader(self._watch)
        os.close(self._watch)
        self._directory.close()

    def _notice(self) -> None:
        try:
            events = os.read(self._watch, _EVENT_BYTES)
        except BlockingIOError:
            return
        place, now = 0, time.monotonic()
        while place < len(events):
            *_, length = _EVENT.unpack_from(events, place)
            place += _EVENT.size
            name = events[place : place + length].rstrip(b"\0").decode()
            place += length
            if (file := self._files.get(name)) is not None:
                file.read, file.goes_at = True, now + _AFTER_READ_S

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            now = time.monotonic()
            for name, file in list(self._files.items()):
                if file.goes_at > now:
                    continue
                if not file.read:
                    self.unread += 1
                    logger.warning("an embedding was not read within %g s and is removed", self._unread_s)
                self.remove(name)

    def _free(self, size: int) -> None:
        self._bytes -= size
        self._loop.create_task(self._tell())

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _write(path: Path, values: Array, shape: tuple[int, ...], dtype: DType) -> None:
    """A safetensors file (https://huggingface.co/docs/safetensors, "Format")."""
    tensor = {"dtype": dtype.safetensors, "shape": shape, "data_offsets": (0, values.nbytes)}
    header = json.dumps({"__metadata__": {"format": "pt"}, _TENSOR: tensor}).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(np.ascontiguousarray(values).data)


def _watch(directory: Path) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    watch: int = libc.inotify_init1(_CLOSE_ON_EXEC | _NON_BLOCKING)
    if watch < 0:
        raise OSError(ctypes.get_errno(), "the kernel gives no inotify instance (fs.inotify.max_user_instances)")
    if libc.inotify_add_watch(watch, os.fsencode(directory), _CLOSED_UNWRITTEN) < 0:
        number = ctypes.get_errno()
        os.close(watch)
        raise OSError(number, f"inotify cannot watch {directory}")
    return watch
