"""OpenVINO on a CPU (or any device it names): the default runtime of the sidecar."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from sidecar.runtimes import CACHED_PRIMITIVES
from sidecar.runtimes.base import Load, Runtime, RuntimeFault
from sidecar.runtimes.held import RELEASE_WAIT_S, Held, release
from sidecar.vision.dtypes import Array, DType
from sidecar.vision.grid import Grid
from sidecar.vision.windows import plan_windows

# Activations are quantised on the fly in groups of this many values, each with its own scale. Larger groups were no faster
# on AVX-512 VNNI, and a group per row (or none) took 2 to 3 times as long; see docs/performance.md.
DYNAMIC_QUANTISATION_GROUP = 128

# What the graph computes in, for each precision an artifact may have. int8 quantises the linear layers and runs the rest,
# attention above all, in bfloat16.
_INFERENCE_PRECISION = {"f32": ov.Type.f32, "bf16": ov.Type.bf16, "int8": ov.Type.bf16}

OUTPUT_TYPE = {DType.FLOAT32: ov.Type.f32, DType.FLOAT16: ov.Type.f16, DType.BFLOAT16: ov.Type.bf16}


class OpenVinoRuntime(Runtime):
    """One compiled model, and an infer request for each of its streams."""

    name = "openvino"
    version = ov.__version__.partition("-")[0]

    def __init__(self, load: Load) -> None:
        """Compile the graph.

        Raises:
            RuntimeFault: if OpenVINO cannot read or compile it.
        """
        self.precision = load.precision
        self.output_dtype = load.output_dtype
        self._tower = load.tower
        self._held = Held()
        core = ov.Core()
        if load.cache_dir is not None:
            core.set_property({"CACHE_DIR": str(load.cache_dir)})
        try:
            model = core.read_model(load.graph)
            steps = ov.preprocess.PrePostProcessor(model)
            steps.output().tensor().set_element_type(OUTPUT_TYPE[load.output_dtype])
            compiled = core.compile_model(steps.build(), openvino_device(load.device), compile_options(load))
            self._compiled = compiled
            self.streams = load.streams
            self._requests: queue.SimpleQueue[ov.InferRequest] = queue.SimpleQueue()
            for _ in range(self.streams):
                self._requests.put(compiled.create_infer_request())
            self.device = describe_device(core, compiled, load.precision)
            # Which of several streams a run is given to, nobody outside can say; and GPUs have no such thing.
            self._releases = self.streams == 1 and openvino_device(load.device) == "CPU"
        except (RuntimeError, KeyError) as error:
            raise RuntimeFault(f"OpenVINO could not load {load.graph.name} on {load.device}: {error}") from error
        self._inputs = [port.any_name for port in compiled.inputs]

    def run(self, patches: Array, grids: Sequence[Grid], out: Array) -> None:
        request = self._requests.get()
        try:
            self._infer(request, patches, grids, out)
            self._held.ran(len(patches))
        except RuntimeError as error:
            raise RuntimeFault(f"OpenVINO failed on a run of {len(patches)} patches: {error}") from error
        finally:
            self._requests.put(request)

    def release_memory(self) -> bool:
        if not (self._releases and self._held.due):
            return False
        try:
            request = self._requests.get(timeout=RELEASE_WAIT_S)
        except queue.Empty:
            return False
        try:
            release([self._compiled], self._tower, lambda grid: self._small_run(request, grid))
            self._held.released()
        except RuntimeError as error:
            raise RuntimeFault(f"OpenVINO failed to give memory back: {error}") from error
        finally:
            self._requests.put(request)
        return True

    def _small_run(self, request: ov.InferRequest, grid: Grid) -> None:
        out = np.empty((grid.tokens(self._tower), self._tower.out_hidden_size), self.output_dtype.storage)
        self._infer(request, np.zeros((grid.patches, self._tower.patch_width), np.uint8), [grid], out)

    def _infer(self, request: ov.InferRequest, patches: Array, grids: Sequence[Grid], out: Array) -> None:
        plan = plan_windows(grids, self._tower)
        pixels = patches[plan.patch_order].astype(np.float32, copy=False)
        # The request uses the arrays' memory without keeping it alive; this dict does, until the run is over.
        arrays: dict[str, Array] = {
            name: np.ascontiguousarray(array) for name, array in {"patches": pixels, **plan.tower_inputs}.items()
        }
        for name in self._inputs:
            request.set_tensor(name, ov.Tensor(arrays[name], shared_memory=True))
        request.set_output_tensor(shared_output(out, self.output_dtype))
        request.infer()


def shared_output(out: Array, dtype: DType) -> ov.Tensor:
    """An OpenVINO tensor over `out`'s own memory, so that the runtime writes its result in place."""
    return ov.Tensor(out, out.shape, OUTPUT_TYPE[dtype])


def openvino_device(device: str) -> str:
    """`cpu` → `CPU`, `ov:GPU.1` → `GPU.1`."""
    return device.removeprefix("ov:").upper()


def compile_options(load: Load) -> dict[str, Any]:
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _INFERENCE_PRECISION[load.precision],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": DYNAMIC_QUANTISATION_GROUP if load.precision == "int8" else 0,
    }
    if openvino_device(load.device) == "CPU":
        options["CPU_RUNTIME_CACHE_CAPACITY"] = CACHED_PRIMITIVES
    if load.streams > 1:
        options |= {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": load.streams}
    if load.threads:
        options["INFERENCE_NUM_THREADS"] = load.threads
    if load.cache_dir is not None:
        # Keep the compiled graph but not a second copy of the weights: a few MB instead of all of them, and quicker to load.
        options |= {"CACHE_MODE": "OPTIMIZE_SIZE", "WEIGHTS_PATH": str(load.graph.with_suffix(".bin"))}
    return options


def describe_device(core: ov.Core, compiled: ov.CompiledModel, precision: str) -> str:
    """The device that will run, its name and the precision it really took, as the compiled model reports them."""
    devices = ",".join(compiled.get_property("EXECUTION_DEVICES"))
    name = core.get_property(devices.split(",")[0], "FULL_DEVICE_NAME").strip()
    known = compiled.get_property("SUPPORTED_PROPERTIES")
    threads = ""
    if "INFERENCE_NUM_THREADS" in known:  # GPUs have none
        threads = f"{compiled.get_property('INFERENCE_NUM_THREADS')} threads, "
    arithmetic = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if precision == "int8":
        arithmetic = f"int8 weights, rest {arithmetic}"
    return f"{devices} ({name}, {threads}{arithmetic})"


def graph_files(graph: Path) -> tuple[Path, Path]:
    """A graph's two files: topology and weights."""
    return graph, graph.with_suffix(".bin")
