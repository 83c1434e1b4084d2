"""A child process that loads a lane's runtime first, so that a crash of native code ends the child and not the server.

OpenVINO, ONNX Runtime and device drivers have ended processes by SIGSEGV, SIGFPE or SIGILL on machines that their makers did
not try: lists of CPUs with gaps, one CPU online, unusual virtual machines (openvino issues 37051, 35943, 34262). The child loads
the graph as the server will and makes two small runs; its exit status tells how that ended. What it compiled is in the compile
cache, so the server's own load is quick, and it has ended by then, so that the weights are never in memory twice.

What has been loaded here before is not tried again; `tried` knows that.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np

from sidecar.runtimes.base import Load, Runtime, RuntimeFault
from sidecar.runtimes.loading import load_runtime
from sidecar.runtimes.tried import Tried, combination
from sidecar.vision.grid import Grid

logger = logging.getLogger(__name__)

# A whole window and ragged ones, in tokens (h, w).
_RUNS = ((4, 4), (5, 6))
# torch is not among them: its crashes are Python exceptions but for a driver's, and CUDA takes longer to start than to fail.
_NATIVE = ("openvino", "optimum", "onnx")
_LOADED = "loaded"
_PR_SET_PDEATHSIG = 1  # prctl(2)
_MOST_LINES = 20


class Trials:
    """Guards the loading of lanes, one at a time; `stop` is for another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = False
        self._child: subprocess.Popen[bytes] | None = None
        self._open: Tried | None = None
        self._passed: set[str] = set()

    @contextmanager
    def guard(self, lane: str, runtime: str, content: str, load: Load) -> Iterator[None]:
        """Try a runtime in a child unless that was done here before, then keep a record while the block loads and warms it.

        `content`: a hash of the graph's files.

        Raises:
            RuntimeFault: if the child crashed, or could not load or run the graph.
        """
        if runtime not in _NATIVE:
            yield
            return
        what = combination(runtime, content, load)
        tried = Tried(load.cache_dir, what)
        if cut_short := tried.was_cut_short():
            logger.warning(
                "lane %s: the process that loaded %s/%s last, at %s, ended before it had run: it is tried in a child first",
                *(lane, runtime, load.precision, cut_short),
            )
        if cut_short or not (tried.passed() or tried.name in self._passed):
            self._try(lane, runtime, load)
        with self._lock:
            self._open = tried
            if not self._stopped:
                tried.begin()
        try:
            yield
        finally:
            # Also where it raised: that is no crash.
            self._close()
        self._passed.add(tried.name)
        tried.pass_()

    def stop(self) -> None:
        """Kill a child that is at work, and begin no other. The process is about to end, which is not to look like a crash."""
        with self._lock:
            self._stopped = True
            if self._child is not None:
                self._child.kill()
        self._close()

    def _close(self) -> None:
        with self._lock:
            if self._open is not None:
                self._open.end()
            self._open = None

    def _try(self, lane: str, runtime: str, load: Load) -> None:
        logger.info("lane %s: a child process tries %s/%s on %s first", lane, runtime, load.precision, load.device)
        # With this process's import path, however it came by it.
        code = f"import sys; sys.path[:] = {sys.path!r}; from sidecar.runtimes.trial import child; child()"
        pipe = subprocess.PIPE
        with self._lock:
            if self._stopped:
                raise RuntimeFault("the server is told to stop")
            try:
                # In a session of its own: a terminal's Ctrl-C is the server's to handle.
                self._child = subprocess.Popen(
                    [sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
                )
            except OSError as error:
                logger.warning("lane %s: no child process can be started, so none tries: %s", lane, error.strerror)
                return
            child = self._child
        try:
            said, printed = child.communicate(pickle.dumps((os.getpid(), runtime, load)))
        finally:
            with self._lock:
                self._child = None
        outcome = said.decode(errors="replace").splitlines()
        if child.returncode == 0 and outcome:
            if fault := json.loads(outcome[-1]):
                raise RuntimeFault(fault)
            return
        if self._stopped:
            raise RuntimeFault("the server is told to stop")
        for line in printed.decode(errors="replace").splitlines()[:_MOST_LINES]:
            logger.error("lane %s: the child process printed: %s", lane, line)
        raise RuntimeFault(_crash(lane, runtime, load, child.returncode, has_loaded=_LOADED in outcome))


def _crash(lane: str, runtime: str, load: Load, code: int, *, has_loaded: bool) -> str:
    ended = f"with exit code {code}"
    if code < 0:
        with suppress(ValueError):
            ended = f"by {signal.Signals(-code).name}"
    phase = "in its first run" if has_loaded else "while loading"
    advice = (
        "try --precision f32, another --runtime, --threads 1, --cpus without gaps, or another version of the runtime; "
        "docs/operations.md says more"
    )
    if code == -signal.SIGKILL:
        advice = "most likely for want of memory: compare the container's limit with what docs/operations.md names"
    return f"lane {lane}: {runtime}/{load.precision} on {load.device} was ended {ended} {phase}; {advice}"


def child() -> None:
    """Load and run what the parent writes to stdin, answer on stdout, and exit without tearing anything down.

    The answer is a line `loaded` once it has, then JSON: null, or why it could not.
    """
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # native libraries print where they like
    parent, name, load = pickle.load(sys.stdin.buffer)
    with suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    fault: str | None = None
    try:
        runtime = load_runtime(name, load)
        print(_LOADED, file=answer)
        run_small(runtime, load)
    except Exception as error:
        fault = str(error) if isinstance(error, RuntimeFault) else f"{type(error).__name__}: {error}"
    print(json.dumps(fault), file=answer, flush=True)
    os._exit(0)


def run_small(runtime: Runtime, load: Load) -> None:
    """Encode small black pictures."""
    merge = load.tower.spatial_merge_size
    for height, width in _RUNS:
        grid = Grid(1, height * merge, width * merge)
        runtime.encode(np.zeros((grid.patches, load.tower.patch_width), np.uint8), [grid], load.tower)
