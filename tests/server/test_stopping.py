"""A process that is told to stop ends in time, whatever keeps it from doing so by itself."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from servers import ROOT

# Where the event loop is stuck: in Python code that other threads can run beside, and in native code that keeps the
# interpreter's lock from the moment that the handler has run.
_STUCK = {
    "a loop that is blocked": "time.sleep(60)",
    "native code that holds the interpreter's lock": "time.sleep(1.3)\n    ctypes.PyDLL(None).sleep(60)",
}
_SCRIPT = """
import asyncio, ctypes, os, time
from sidecar.server.stopping import Stop

async def main():
    Stop(0.5, lambda: None)
    print("ready", flush=True)
    {stuck}

asyncio.run(main())
"""


@pytest.mark.parametrize("what", _STUCK)
def test_it_ends_within_the_drain_and_a_second(what: str, tmp_path: Path) -> None:
    script = tmp_path / "stuck.py"
    script.write_text(_SCRIPT.format(stuck=_STUCK[what]))
    command = [sys.executable, str(script)]
    process = subprocess.Popen(command, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        begun = time.monotonic()
        process.terminate()
        assert process.wait(20) == 1
        assert 0.5 < time.monotonic() - begun < 1.8
        assert process.stderr is not None
        if "lock" not in what:
            assert b"did not end in time" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()
