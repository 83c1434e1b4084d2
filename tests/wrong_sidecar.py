"""A real sidecar whose first lane computes something wrong.

    python tests/wrong_sidecar.py FAULT serve …    as `python -m sidecar serve …`

FAULT is a name in `FAULTS`. Those that begin later do so with the 11th of the callers' runs.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from sidecar.__main__ import main
from sidecar.runtimes.base import Load, Runtime
from sidecar.runtimes.loading import load_runtime
from sidecar.server import loading
from sidecar.vision.dtypes import Array, DType, from_float32, to_float32
from sidecar.vision.grid import Grid

_GOOD_RUNS = 10
_CALLERS_PATCHES = 256  # the callers' items have more; what the self-test and the warm-up run has fewer, or this number


def _noise(rows: Array) -> Array:
    return np.random.default_rng(0).normal(size=rows.shape) * np.abs(rows).mean()


def _hang(rows: Array) -> Array:
    threading.Event().wait()
    return rows


FAULTS: dict[str, Callable[[Array], Array]] = {
    "zeros": np.zeros_like,
    "permuted": lambda rows: rows[::-1],
    "noise": _noise,
    "scaled": lambda rows: rows * 1.01,
    "nan-later": lambda rows: rows * np.nan,
    "hang-later": _hang,
}


class Wrong(Runtime):
    """A real runtime, whose rows are changed."""

    def __init__(self, real: Runtime, fault: str) -> None:
        self._real, self._fault = real, FAULTS[fault]
        self.name, self.version, self.precision = real.name, real.version, real.precision
        self.device, self.output_dtype, self.streams = f"wrong {real.device}", real.output_dtype, real.streams
        self._good_runs = _GOOD_RUNS if fault.endswith("-later") else 0

    def run(self, patches: Array, grids: Sequence[Grid], out: Array) -> None:
        self._real.run(patches, grids, out)
        time.sleep(0.01)  # so that both lanes get work
        if self._good_runs:
            self._good_runs -= len(patches) > _CALLERS_PATCHES
            return
        dtype: DType = self.output_dtype
        out[:] = from_float32(self._fault(to_float32(out, dtype)).astype(np.float32), dtype)


def _main(fault: str, arguments: Sequence[str]) -> int:
    loaded: list[Runtime] = []

    def load_wrong(name: str, load: Load) -> Runtime:
        real = load_runtime(name, load)
        loaded.append(real if loaded else Wrong(real, fault))
        return loaded[-1]

    vars(loading)["load_runtime"] = load_wrong
    return main(list(arguments))


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2:]))
