"""What tracing needs, whoever traces: example inputs, the inputs' names, and which of their lengths vary."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sidecar.vision.grid import Grid
from sidecar.vision.spec import TowerSpec
from sidecar.vision.tower import Tower
from sidecar.vision.windows import TOWER_PLAN_INPUTS, plan_windows

INPUT_NAMES = ("patches", *TOWER_PLAN_INPUTS)
OUTPUT_NAME = "embeddings"

# Symbolic lengths: N patches, R ragged windows, S ragged patches, F frames of at most L patches, T tokens.
AXES: dict[str, tuple[str | None, ...]] = {
    "patches": ("N", None),
    "rotary_cos": ("N", None),
    "rotary_sin": ("N", None),
    "ragged_index": ("R", None),
    "ragged_mask": ("R", None),
    "ragged_return": ("S",),
    "frame_index": ("F", "L"),
    "frame_mask": ("F", "L"),
    "frame_return": ("N",),
    "token_order": ("T",),
}


@dataclass(frozen=True, slots=True)
class Example:
    """One run that has something of everything: full windows, ragged windows of each shape, frames of unequal length."""

    inputs: tuple[Tensor, ...]

    def shape(self, name: str) -> tuple[int, ...]:
        """The input's shape with −1 where it varies."""
        tensor = self.inputs[INPUT_NAMES.index(name)]
        return tuple(-1 if axis else size for axis, size in zip(AXES[name], tensor.shape, strict=True))


def example_run(spec: TowerSpec) -> Example:
    side = spec.window_side * spec.spatial_merge_size
    grids = [Grid(1, side + spec.spatial_merge_size, 2 * side), Grid(2, 2 * side, side + 2 * spec.spatial_merge_size)]
    plan = plan_windows(grids, spec)
    patches = torch.zeros(len(plan.patch_order), spec.patch_width)
    return Example((patches, *(torch.from_numpy(array.copy()) for array in plan.tower_inputs.values())))


@contextmanager
def quiet() -> Iterator[None]:
    """Tracers and converters warn of their own internals and log every step; who exports wants the progress bar."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def exported_program(tower: Tower, example: Example) -> torch.export.ExportedProgram:
    """Trace the tower symbolically: no weight is read or widened, so it costs the same at every size."""
    shapes = tuple(
        {place: torch.export.Dim.DYNAMIC for place, axis in enumerate(AXES[name]) if axis is not None}
        for name in INPUT_NAMES
    )
    with torch.no_grad(), quiet():
        return torch.export.export(
            tower, example.inputs, dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
        )
