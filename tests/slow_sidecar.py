"""A real sidecar whose runs take as long as a test says, however many cores there are; its embeddings are right.

    python tests/slow_sidecar.py FIXED_MS PATCH_MS serve …    as `python -m sidecar serve …`

A run of N patches lasts FIXED_MS + PATCH_MS · N, or as long as the real one if that is longer: for the rest its lane sleeps.
Its device, which comes with each embedding, says so: `SlowSidecar.device`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_READY = re.compile(r" ready on (\S+) after ")


@dataclass(frozen=True, slots=True)
class SlowSidecar:
    """One that was started by `start`; `fixed_ms` and `patch_ms` as above."""

    process: subprocess.Popen[bytes]
    log: Path
    fixed_ms: float
    patch_ms: float

    @property
    def device(self) -> str:
        """What the embeddings that it encoded name as their lane's device."""
        return _device(self.fixed_ms, self.patch_ms)

    @property
    def address(self) -> str:
        """Its TCP address, once it is ready."""
        return self.wait_ready()

    def wait_ready(self, timeout_s: float = 60) -> str:
        ends = time.monotonic() + timeout_s
        while (ready := _READY.search(self.log.read_text())) is None:
            assert self.process.poll() is None and time.monotonic() < ends, self.log.read_text()
            time.sleep(0.02)
        return ready[1]

    def end(self) -> None:
        """Whatever state it is in."""
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


def start(
    artifact: Path, directory: Path, fixed_ms: float, patch_ms: float, *flags: str, listen: str = "127.0.0.1:0"
) -> SlowSidecar:
    """Start one in a directory of its own, without a store unless the flags name one."""
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "log"
    command = [sys.executable, __file__, str(fixed_ms), str(patch_ms), "serve", "--artifact", str(artifact)]
    command += ["--listen", listen, "--threads", "1", "--trial", "never"]
    command += [*(() if "--store" in flags else ("--store", "none")), *flags]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("EPD_", "DYN_"))}
    environment |= {"PYTHONPATH": str(ROOT), "GRPC_VERBOSITY": "NONE", "XDG_CACHE_HOME": str(directory)}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=directory, env=environment, stdout=output, stderr=output)
    return SlowSidecar(process, log, fixed_ms, patch_ms)


def _device(fixed_ms: float, patch_ms: float) -> str:
    return f"CPU slowed to {fixed_ms:g} ms and {patch_ms:g} ms a patch"


def _main(fixed_ms: float, patch_ms: float, arguments: Sequence[str]) -> int:
    from sidecar.__main__ import main
    from sidecar.runtimes.base import Load, Runtime
    from sidecar.runtimes.loading import load_runtime
    from sidecar.server import loading
    from sidecar.vision.dtypes import Array
    from sidecar.vision.grid import Grid

    class Slowed(Runtime):
        def __init__(self, real: Runtime) -> None:
            self._real = real
            self.name, self.device, self.precision = real.name, _device(fixed_ms, patch_ms), real.precision
            self.output_dtype, self.streams = real.output_dtype, real.streams

        def run(self, patches: Array, grids: Sequence[Grid], out: Array) -> None:
            ends = time.monotonic() + (fixed_ms + patch_ms * len(patches)) / 1e3
            self._real.run(patches, grids, out)
            time.sleep(max(0.0, ends - time.monotonic()))

    def load_slowed(name: str, load: Load) -> Runtime:
        return Slowed(load_runtime(name, load))

    vars(loading)["load_runtime"] = load_slowed
    return main(list(arguments))


if __name__ == "__main__":
    sys.exit(_main(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
