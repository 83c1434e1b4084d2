"""The tower itself, in torch: `cpu`, `cuda:0` or `xpu:0`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sidecar.runtimes.base import Load, Runtime, RuntimeFault
from sidecar.vision.dtypes import Array, DType
from sidecar.vision.grid import Grid
from sidecar.vision.tower import Tower
from sidecar.vision.windows import plan_windows

_COMPUTE_DTYPE = {"f32": torch.float32, "bf16": torch.bfloat16}
_OUTPUT_DTYPE = {DType.FLOAT32: torch.float32, DType.FLOAT16: torch.float16, DType.BFLOAT16: torch.bfloat16}


class TorchRuntime(Runtime):
    """The tower with an artifact's weights on one torch device."""

    name = "torch"

    def __init__(self, load: Load) -> None:
        """Load the weights on to the device.

        Raises:
            RuntimeFault: if torch does not have the device, or the weights do not fit the tower.
        """
        self.precision = load.precision
        self.output_dtype = load.output_dtype
        self._spec = load.tower
        try:
            device = torch.device(load.device)
            dtype = _COMPUTE_DTYPE[load.precision]
            with torch.device("meta"):
                tower = Tower(load.tower, load.pixels, dtype)
            weights = {name: tensor.to(device, dtype) for name, tensor in load_file(load.graph).items()}
            tower.load_state_dict(weights, assign=True)
            tower.patch_embed.set_normalisation(load.pixels)
            self._tower = tower.to(device).eval()
        except (RuntimeError, KeyError, OSError, SafetensorError) as error:
            raise RuntimeFault(f"torch could not load {load.graph.name} on {load.device}: {error}") from error
        if load.threads and device.type == "cpu":
            torch.set_num_threads(load.threads)
        self._device = next(self._tower.parameters()).device
        self.device = f"{self._device} ({dtype})".replace("torch.", "")

    @torch.inference_mode()
    def run(self, patches: Array, grids: Sequence[Grid], out: Array) -> None:
        plan = plan_windows(grids, self._spec)
        arrays = [patches[plan.patch_order], *plan.tower_inputs.values()]
        try:
            inputs = [torch.from_numpy(np.ascontiguousarray(array)).to(self._device) for array in arrays]
            embeddings = self._tower(*inputs).to(_OUTPUT_DTYPE[self.output_dtype])
            # numpy has no bfloat16: copy its bits.
            bits = torch.int16 if out.dtype.itemsize == 2 else torch.int32
            torch.from_numpy(out.view(np.int16 if out.dtype.itemsize == 2 else np.int32)).copy_(embeddings.view(bits))
        except RuntimeError as error:
            raise RuntimeFault(f"torch failed on a run of {len(patches)} patches: {error}") from error
