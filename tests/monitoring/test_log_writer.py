"""The log's way out: a reader who stalls stops nobody, and is told what it missed."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.monitoring.log_writer import LogWriter, dropped

LOGGER = logging.Logger("sidecar.test")


class Reader:
    """Takes what is written, once it is let."""

    def __init__(self) -> None:
        self.reading = threading.Event()
        self.text = ""

    def write(self, lines: bytes) -> None:
        self.reading.wait()
        self.text += lines.decode()


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.reading.set()


def record(message: str) -> logging.LogRecord:
    return LOGGER.makeRecord("sidecar.test", logging.INFO, "", 0, message, (), None)


def log(writer: LogWriter, messages: list[str]) -> float:
    """Log on an event loop; returns how many seconds it took."""

    async def run() -> float:
        begun = time.perf_counter()
        for message in messages:
            writer.handle(record(message))
        return time.perf_counter() - begun

    return asyncio.run(run())


def test_a_stalled_reader_stops_nobody_and_is_told_what_it_missed(reader: Reader) -> None:
    writer = LogWriter(reader.write, most_bytes=1000)
    before = dropped()["slow_reader"]
    assert log(writer, ["x" * 99] * 100) < 1
    assert dropped()["slow_reader"] - before == 90
    reader.reading.set()
    writer.flush()
    lines = reader.text.splitlines()
    assert lines[:10] == ["x" * 99] * 10
    assert lines[10:] == ["90 log lines were dropped: the reader of this log was too slow"]
    log(writer, ["and on it goes"])
    writer.flush()
    assert reader.text.endswith("\nand on it goes\n")


def test_threads_that_may_wait_have_their_line_out_when_they_go_on(reader: Reader) -> None:
    """What crashes the process in the next instant is then known by the line before it."""
    reader.reading.set()
    writer = LogWriter(reader.write)
    for number in range(100):
        writer.handle(record(f"loading {number}"))
        assert reader.text.endswith(f"loading {number}\n")


def test_threads_that_may_wait_do_so_once_and_not_for_long(reader: Reader) -> None:
    writer = LogWriter(reader.write)
    begun = time.perf_counter()
    for number in range(100):
        writer.handle(record(str(number)))
    writer.close()
    assert time.perf_counter() - begun < 2


def test_a_line_that_cannot_be_formatted_is_told(reader: Reader) -> None:
    reader.reading.set()
    writer = LogWriter(reader.write)
    writer.handle(LOGGER.makeRecord("sidecar.test", logging.INFO, "", 0, "%d items", ("no number",), None))
    assert reader.text == "a log line of sidecar.test could not be written: TypeError\n"


def test_a_process_with_a_full_pipe_for_its_log_lives_and_ends(tmp_path: Path) -> None:
    """Its event loop goes on, and SIGTERM ends it, while nobody reads its stderr."""
    program = """
import asyncio, logging, pathlib, signal, sys
from sidecar.monitoring.request_log import configure_logging
configure_logging("info", "text")
async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    for number in range(2000):
        logging.getLogger("sidecar").info("x" * 1000)
    pathlib.Path(sys.argv[1]).touch()
    await stop.wait()
asyncio.run(main())
"""
    running = tmp_path / "running"
    read, write = os.pipe()
    with subprocess.Popen([sys.executable, "-c", program, str(running)], stderr=write) as process:
        try:
            os.close(write)
            ends = time.monotonic() + 20
            while not running.exists():
                assert time.monotonic() < ends, "the event loop waits for the log's reader"
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 0
            with os.fdopen(read, "rb") as left:
                lines = left.read().decode().splitlines()
            assert lines
            assert all(line.endswith("x" * 1000) for line in lines), "no line is cut"
        finally:
            process.kill()
