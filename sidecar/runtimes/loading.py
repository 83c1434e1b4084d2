"""From a variant's runtime name to the class that loads it, imported only when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from sidecar.runtimes.base import Load, Runtime, RuntimeFault

# name → module, class, and the extra that brings what the module imports.
_RUNTIMES = {
    "openvino": ("sidecar.runtimes.openvino", "OpenVinoRuntime", None),
    "optimum": ("sidecar.runtimes.optimum", "OptimumRuntime", None),
    "onnx": ("sidecar.runtimes.onnx", "OnnxRuntime", "onnx"),
    "torch": ("sidecar.runtimes.torch", "TorchRuntime", "torch"),
}

RUNTIME_NAMES = tuple(_RUNTIMES)


def load_runtime(name: str, load: Load) -> Runtime:
    """Load a graph on a device.

    Raises:
        RuntimeFault: if the runtime is unknown, not installed, or cannot load the graph.
    """
    if name not in _RUNTIMES:
        raise RuntimeFault(f"there is no runtime {name!r}; there are {', '.join(RUNTIME_NAMES)}")
    module, class_name, extra = _RUNTIMES[name]
    try:
        runtime: Callable[[Load], Runtime] = getattr(importlib.import_module(module), class_name)
    except ModuleNotFoundError as error:
        hint = f"; install this package with the extra [{extra}]" if extra else ""
        raise RuntimeFault(f"the {name} runtime needs {error.name}, which is not installed{hint}") from error
    return runtime(load)
