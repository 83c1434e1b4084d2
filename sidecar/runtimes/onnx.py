"""ONNX Runtime on a CPU: the same graph for those whose platform speaks ONNX."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from sidecar.runtimes.base import Load, Runtime, RuntimeFault
from sidecar.vision.dtypes import Array, from_float32
from sidecar.vision.grid import Grid
from sidecar.vision.windows import plan_windows


def multiplies_bytes_exactly(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether products of uint8 and int8 are summed without saturating at 16 bits. x86 without VNNI does saturate
    (onnxruntime's quantization guide); other processors, and systems that do not tell, are taken at their word."""
    if platform.machine() not in ("x86_64", "AMD64") or not cpuinfo.is_file():
        return True
    return any(feature in cpuinfo.read_text() for feature in ("avx512_vnni", "avx_vnni"))


class OnnxRuntime(Runtime):
    """One inference session. It computes in float32 (and int8 in the layers of an int8 graph) whatever the weights are
    stored in: ONNX Runtime's CPU provider has no bfloat16 arithmetic."""

    name = "onnx"
    version = onnxruntime.__version__

    def __init__(self, load: Load) -> None:
        """Create the session.

        Raises:
            RuntimeFault: if ONNX Runtime cannot read or initialise the graph.
        """
        self.precision = load.precision
        self.output_dtype = load.output_dtype
        self._tower = load.tower
        if load.precision == "int8" and not multiplies_bytes_exactly():
            raise RuntimeFault(
                "this CPU has no VNNI, without which ONNX Runtime's int8 products can overflow unnoticed; serve another precision"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = load.threads
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(load.graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise RuntimeFault(f"ONNX Runtime could not load {load.graph.name}: {error}") from error
        threads = f"{load.threads} threads" if load.threads else "all cores"
        self.device = f"{self._session.get_providers()[0]} ({threads})"
        self._inputs = [node.name for node in self._session.get_inputs()]

    def run(self, patches: Array, grids: Sequence[Grid], out: Array) -> None:
        plan = plan_windows(grids, self._tower)
        arrays: dict[str, Array] = {
            "patches": patches[plan.patch_order].astype(np.float32, copy=False),
            **plan.tower_inputs,
        }
        try:
            (embeddings,) = self._session.run(None, {name: arrays[name] for name in self._inputs})
        except Exception as error:  # as above
            raise RuntimeFault(f"ONNX Runtime failed on a run of {len(patches)} patches: {error}") from error
        out[:] = from_float32(embeddings, self.output_dtype)
