"""The tower itself, in torch: `cpu`, `cuda:0` or `xpu:0`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sidecar.runtimes.base import Load, Runtime, RuntimeFault
from sidecar.runtimes.torch_graphs import GraphedEncoder
from sidecar.runtimes.torch_packed import PackedTower, can_pack
from sidecar.runtimes.torch_padded import PaddedEncoder
from sidecar.runtimes.torch_staging import DeviceStaging, Encoder, HostStaging
from sidecar.vision.dtypes import Array, DType
from sidecar.vision.grid import Grid
from sidecar.vision.tower import Tower

logger = logging.getLogger(__name__)

_COMPUTE_DTYPE = {"f32": torch.float32, "bf16": torch.bfloat16}
_OUTPUT_DTYPE = {DType.FLOAT32: torch.float32, DType.FLOAT16: torch.float16, DType.BFLOAT16: torch.bfloat16}


class TorchRuntime(Runtime):
    """The tower with an artifact's weights on one torch device."""

    name = "torch"
    version = torch.__version__

    def __init__(self, load: Load) -> None:
        """Load the weights on to the device, and on CUDA compile and record it.

        Raises:
            RuntimeFault: if torch does not have the device, or the weights do not fit the tower.
        """
        self.precision = load.precision
        self.output_dtype = load.output_dtype
        self._dtype = _OUTPUT_DTYPE[load.output_dtype]
        try:
            device, module = open_device(load.device)
            dtype = _COMPUTE_DTYPE[load.precision]
            tower = _tower(load, device, dtype)
            self._device = next(tower.parameters()).device
            self._staging: HostStaging | DeviceStaging = HostStaging()
            hardware = ""
            if module is not None:
                self._staging = DeviceStaging(self._device, module)
                self.pipelined = True
                hardware = f"{module.get_device_name(self._device)}, "
            elif load.threads:
                torch.set_num_threads(load.threads)
            self._encoder, how = _encoder(tower, self._device, dtype, load)
        except (RuntimeError, KeyError, AssertionError, OSError, SafetensorError) as error:
            raise RuntimeFault(f"torch could not load {load.graph.name} on {load.device}: {error}") from error
        self.device = f"{self._device} ({hardware}{dtype}{how})".replace("torch.", "")

    def run(self, patches: Array, grids: Sequence[Grid], out: Array) -> None:
        try:
            plan = self._encoder.plan(grids)
            with torch.inference_mode():
                self._staging.run(self._encoder, patches, plan, self._dtype, out)
        except RuntimeError as error:
            raise RuntimeFault(f"torch failed on a run of {len(patches)} patches: {error}") from error

    def enqueue(self, patches: Array, grids: Sequence[Grid]) -> Callable[[], object]:
        """A run whose input lies on the device already, for a benchmark of the device alone."""
        plan = self._encoder.plan(grids)
        arrays = {name: torch.from_numpy(array).to(self._device) for name, array in plan.arrays.items()}
        on_device = torch.zeros(plan.rows, patches.shape[1], dtype=torch.uint8, device=self._device)
        on_device[: len(patches)] = torch.from_numpy(patches)
        return torch.inference_mode()(lambda: self._encoder.encode(plan, on_device, arrays))


def open_device(name: str) -> tuple[torch.device, Any]:
    """The device, and torch's module for its kind (torch.cuda, torch.xpu), None for the CPU.

    Raises:
        RuntimeError: if this torch has no such device.
    """
    device = torch.device(name)
    if device.type == "cpu":
        return device, None
    module = torch.get_device_module(device)
    if not module.is_available():
        raise RuntimeError(
            f"torch {torch.__version__} finds no {device.type} device: another build of torch, or a driver, is needed"
        )
    if device.index is not None and device.index >= module.device_count():
        raise RuntimeError(f"there are {module.device_count()} {device.type} devices, counted from 0")
    return device, module


def _tower(load: Load, device: torch.device, dtype: torch.dtype) -> Tower:
    with torch.device("meta"):
        tower = Tower(load.tower, load.pixels, dtype)
    weights = {name: tensor.to(device, dtype) for name, tensor in load_file(load.graph).items()}
    tower.load_state_dict(weights, assign=True)
    tower.patch_embed.set_normalisation(load.pixels)
    return tower.to(device).eval()


def _encoder(tower: Tower, device: torch.device, dtype: torch.dtype, load: Load) -> tuple[Encoder, str]:
    """The best way that there is on this device, and its name for the log."""
    if not can_pack(device, dtype, load.tower):
        return PaddedEncoder(tower), ""
    if load.cache_dir is not None:
        # Beside the artifacts' own: a compiled block is keyed by its code and not by its weights.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(load.cache_dir.parent / "inductor"))
    packed = PackedTower(tower)
    graphed = GraphedEncoder(packed, device, _OUTPUT_DTYPE[load.output_dtype])
    started = time.perf_counter()
    try:
        packed.compile()
        graphed.warm_up()
    except Exception as error:  # a compiler that is missing or fails has as many exceptions as parts
        logger.warning(
            "torch.compile does not work here, the tower runs as it is: %s", str(error).strip().split("\n")[0]
        )
        packed.stay_eager()
        graphed.warm_up()
    logger.info("the tower's blocks were made ready in %.1f s", time.perf_counter() - started)
    graphed.capture()
    return graphed, ", compiled, CUDA graphs" if packed.compiled else ", CUDA graphs"
