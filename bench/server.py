"""A real server process for demonstrations and figures."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READY = re.compile(r"ready on (\S+?)(?:,| ).*after ([\d.]+) s")


@dataclass(frozen=True, slots=True)
class Server:
    address: str
    ready_s: float
    pid: int


@contextmanager
def serving(artifact: Path, log: Path, *flags: str, timeout_s: float = 300) -> Iterator[Server]:
    """Start `python -m sidecar serve` on a free port and end it by SIGTERM.

    Raises:
        RuntimeError: if it does not become ready; the message holds its log.
    """
    command = [sys.executable, "-m", "sidecar", "serve", "--artifact", str(artifact), "--listen", "127.0.0.1:0"]
    # Not the default store: that may be the one of a sidecar in service. The last flag counts.
    command += ["--store", "none", *flags]
    started = time.perf_counter()
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            while (found := READY.search(log.read_text())) is None:
                if process.poll() is not None or time.perf_counter() - started > timeout_s:
                    raise RuntimeError(f"the server did not become ready:\n{log.read_text()}")
                time.sleep(0.02)
            yield Server(found.group(1), time.perf_counter() - started, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
