"""A sidecar as a user starts it: a process of its own, found by what its log says."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import grpc

from sidecar.client import EncoderClient
from sidecar.pb import encoder_pb2_grpc

ROOT = Path(__file__).parents[1]
_READY = re.compile(r" ready on (\S+), unix:(\S+) after ")


@dataclass(frozen=True, slots=True)
class Server:
    """`address` is its TCP address, `socket` its unix socket's path, `log` the file its stderr goes to."""

    process: subprocess.Popen[bytes]
    log: Path
    address: str
    socket: Path

    def client(self) -> EncoderClient:
        return EncoderClient(self.address)

    def channel(self) -> grpc.Channel:
        """With gRPC's defaults on what may be received, and no limit on what may be sent."""
        return grpc.insecure_channel(self.address, [("grpc.max_send_message_length", -1)])

    @contextmanager
    def growing_less_than(self, most_bytes: float) -> Iterator[None]:
        """Assert that the process never holds so much more memory than now."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")  # forget the highest mark so far
        before = self._bytes("VmRSS")
        yield
        assert self._bytes("VmHWM") - before < most_bytes

    @contextmanager
    def stub(self) -> Iterator[Any]:
        """The generated stub, which has no annotations, on a channel of its own."""
        with self.channel() as channel:
            new_stub: Any = encoder_pb2_grpc.EncoderStub
            yield new_stub(channel)

    def terminate(self, timeout_s: float = 60) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def logged(self, words: str, times: int = 1, since: int = 0, timeout_s: float = 10) -> str:
        """The log from its character `since` on, once it holds `words` so many times: a thread writes it, a moment later."""
        ends = time.monotonic() + timeout_s
        while (text := self.log.read_text()[since:]).count(words) < times:
            assert time.monotonic() < ends, f"{words!r} is not {times} times in\n{text}"
            time.sleep(0.01)
        return text

    def _bytes(self, name: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"{name}:\s+(\d+) kB", status)
        assert found, status
        return int(found[1]) * 1024


StartServer = Callable[..., Server]


def spawn(
    artifact: Path, directory: Path, *flags: str, listen: str, added: dict[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], Path]:
    """Start the command in a working directory of its own; return the process and its log.

    Each has a store of its own, unless the flags name one. `added`: variables for its environment.
    """
    log = directory / "log"
    if "--store" not in flags:
        flags = (*flags, "--store", tempfile.mkdtemp(dir=_stores()))
    command = [sys.executable, "-m", "sidecar", "serve", "--artifact", str(artifact), "--listen", listen]
    environment = serve_environment() | (added or {})
    with log.open("wb") as output:
        process = subprocess.Popen([*command, *flags], cwd=directory, env=environment, stdout=output, stderr=output)
    return process, log


def serve_environment() -> dict[str, str]:
    """The environment of a server that shares compiled models with the others and is set by its flags alone."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("EPD_", "DYN_"))}
    # gRPC's own lines on stderr would mix with the server's.
    return environment | {"PYTHONPATH": str(ROOT), "GRPC_VERBOSITY": "NONE", "XDG_CACHE_HOME": str(shared_cache())}


@cache
def _stores() -> Path:
    """Where the stores lie: in shared memory where there is any. What killed servers leave there goes at the end."""
    memory = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="epd-tests-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@cache
def shared_cache() -> Path:
    """One place for compiled models: only the first server of an artifact compiles it, and tries it in a child process."""
    directory = Path(tempfile.mkdtemp(prefix="epd-tests-cache-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def exit_code(process: subprocess.Popen[bytes], timeout_s: float = 30) -> int:
    """Of a process that ends by itself; one that does not is killed, so that a failing test leaves nothing running.

    Raises:
        subprocess.TimeoutExpired: if it had to be.
    """
    try:
        return process.wait(timeout_s)
    finally:
        process.kill()
        process.wait()


def start(
    artifact: Path, directory: Path, *flags: str, timeout_s: float = 60, added: dict[str, str] | None = None
) -> Server:
    """Start a server on a free port and a unix socket, and return once it is ready."""
    process, log = spawn(artifact, directory, *flags, listen=f"127.0.0.1:0,unix:{directory / 'sock'}", added=added)
    ends = time.monotonic() + timeout_s
    while (ready := _READY.search(log.read_text())) is None:
        if process.poll() is not None or time.monotonic() > ends:
            process.kill()
            process.wait()
            raise AssertionError(f"the server did not become ready:\n{log.read_text()}")
        time.sleep(0.02)
    return Server(process, log, ready[1], Path(ready[2]))
