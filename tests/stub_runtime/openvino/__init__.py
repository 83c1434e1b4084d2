"""The real OpenVINO, which does what it is told in one place. With this folder first on PYTHONPATH:

    STUB_OPENVINO="child compile SIGILL"     a child process that tries a lane dies when it compiles
    STUB_OPENVINO="server infer SIGSEGV"     the server itself dies on its first run
    STUB_OPENVINO="child compile 600"        sleep for so many seconds first
    STUB_OPENVINO="both import SIGFPE"       as soon as it is imported
    STUB_OPENVINO="server exit SIGABRT"      when the interpreter tears it down

STUB_OPENVINO may also name a file that says so, read each time, and may say nothing.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

_HERE = str(Path(__file__).parents[1])


def _reach(place: str) -> None:
    text = os.environ.get("STUB_OPENVINO", "")
    if text.startswith("/"):
        text = Path(text).read_text()
    who, where, what = text.split() or ("", "", "")
    process = "child" if sys.argv[0] == "-c" else "server"
    if where == place and who in (process, "both"):
        _do(what)


def _do(what: str) -> None:
    if what.isdigit():
        time.sleep(int(what))
    elif what == "SIGSEGV":
        ctypes.string_at(0)  # a real one
    else:
        os.kill(os.getpid(), signal.Signals[what])


def _first(method: Any, place: str) -> Any:
    def wrapped(*arguments: Any, **named: Any) -> Any:
        _reach(place)
        return method(*arguments, **named)

    return wrapped


_reach("import")
_path = list(sys.path)
sys.path[:] = [entry for entry in _path if entry != _HERE]
del sys.modules["openvino"]
_real = importlib.import_module("openvino")
sys.path[:] = _path
_real.Core.compile_model = _first(_real.Core.compile_model, "compile")
_real.InferRequest.infer = _first(_real.InferRequest.infer, "infer")
atexit.register(_reach, "exit")
