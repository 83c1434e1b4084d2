"""The log's way to stderr: a bounded queue and a thread that writes, so that a reader who stalls stops nobody.

A pipe to a log collector is full as soon as that stops reading, and whoever writes to it then waits. Here only one thread does.
Lines that find the queue full are dropped and counted, and a line says how many once the reader goes on. Lines of libraries
(whatever is not logged by this project) are also bounded by rate: callers' pictures can make decoders warn thousands of times.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial

OWN = "sidecar"
# Reasons why lines are dropped, as the metric names them.
SLOW_READER, LIBRARY = "slow_reader", "library"

_MOST_BYTES = 4 << 20
# Up to PIPE_BUF a write to a pipe is whole or not there, so that no line is ever cut.
_AT_ONCE = select.PIPE_BUF
# So long a thread that may wait does so until its line is out: what a crash in the next instant leaves is then complete.
_PATIENCE_S = 0.2
_FLUSH_S = 0.5
_LIBRARY_LINES, _LIBRARY_LINES_A_SECOND = 20, 1.0

_dropped: Counter[str] = Counter()

Write = Callable[[bytes], object]


def dropped() -> dict[str, int]:
    """Lines dropped since the process began, by reason."""
    return {reason: _dropped[reason] for reason in (SLOW_READER, LIBRARY)}


class LogWriter(logging.Handler):
    """Writes what its formatter makes of records, in order, each as a whole line.

    On an event loop's thread it returns at once. Other threads wait a moment for their line to be written, unless the reader has
    stalled already.
    """

    def __init__(self, write: Write | None = None, *, most_bytes: int = _MOST_BYTES) -> None:
        """`write` takes whole lines of at most PIPE_BUF bytes, or one longer line, and may block; None: to stderr."""
        super().__init__()
        self._write = write or _to_stderr()
        self._most_bytes = most_bytes
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._queued = self._written = 0  # bytes since the beginning
        self._lost = 0
        self._stalled = self._closed = False
        self._library_lines, self._library_asked, self._library_lost = float(_LIBRARY_LINES), time.monotonic(), 0
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def handle(self, record: logging.LogRecord) -> bool:
        """As the base class, without its lock: a thread that waits here must not keep the event loop waiting."""
        if not self.filter(record):
            return False
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        try:
            with self._changed:
                if not (record.name == OWN or record.name.startswith(OWN + ".") or self._admit_library()):
                    return
                self._put(self._line(record))
        except Exception as error:
            failed = "a log line of %s could not be written: %s"
            with self._changed:
                self._put(self._line(_record(logging.ERROR, failed, record.name, type(error).__name__)))
        if not _on_event_loop():
            self._wait(_PATIENCE_S)

    def flush(self) -> None:
        """Wait until everything is written, for at most half a second."""
        self._wait(_FLUSH_S)

    def close(self) -> None:
        """Write what is queued, as `flush` does; what comes later is dropped."""
        self.flush()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        super().close()

    def _line(self, record: logging.LogRecord) -> bytes:
        return (self.format(record) + "\n").encode("utf-8", "backslashreplace")

    def _put(self, line: bytes) -> None:
        if self._closed or self._queued - self._written + len(line) > self._most_bytes:
            self._lost += 1
            _dropped[SLOW_READER] += 1
            return
        self._lines.append(line)
        self._queued += len(line)
        self._changed.notify_all()

    def _admit_library(self) -> bool:
        now = time.monotonic()
        earned = (now - self._library_asked) * _LIBRARY_LINES_A_SECOND
        self._library_lines = min(_LIBRARY_LINES, self._library_lines + earned)
        self._library_asked = now
        if self._library_lines < 1:
            self._library_lost += 1
            _dropped[LIBRARY] += 1
            return False
        self._library_lines -= 1
        if self._library_lost:
            self._put(
                self._line(_record(logging.WARNING, "%d log lines of libraries were dropped", self._library_lost))
            )
            self._library_lost = 0
        return True

    def _wait(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        with self._changed:
            mine = self._queued
            while self._written < mine and not self._stalled and (left := ends - time.monotonic()) > 0:
                self._changed.wait(left)
            self._stalled = self._written < mine

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._lines or self._lost or self._closed):
                    self._changed.wait()
                if not (self._lines or self._lost):
                    return
                lines = list(self._lines)
                if self._lost:
                    message = "%d log lines were dropped: the reader of this log was too slow"
                    lines.append(self._line(_record(logging.WARNING, message, self._lost)))
                    self._queued += len(lines[-1])
                self._lines.clear()
                self._lost = 0
            for chunk in _chunks(lines):
                with suppress(OSError, ValueError):  # nobody reads it any more
                    self._write(chunk)
                with self._changed:
                    self._stalled = False
                    self._written += len(chunk)
                    self._changed.notify_all()


def _chunks(lines: list[bytes]) -> list[bytes]:
    """Whole lines, as many as a pipe takes at once; a longer line alone."""
    chunks: list[bytes] = []
    chunk: list[bytes] = []
    size = 0
    for line in lines:
        if chunk and size + len(line) > _AT_ONCE:
            chunks.append(b"".join(chunk))
            chunk, size = [], 0
        chunk.append(line)
        size += len(line)
    if chunk:
        chunks.append(b"".join(chunk))
    return chunks


def _record(level: int, message: str, *values: object) -> logging.LogRecord:
    return logging.LogRecord(__name__, level, "", 0, message, values, None)


def _on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _to_stderr() -> Write:
    stream = sys.stderr
    if stream is None:  # a daemon without one
        return len
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # a test's
        return lambda lines: stream.write(lines.decode())
    return partial(_write_all, descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:  # somebody made it non-blocking, for all who share it
            select.select([], [descriptor], [])
