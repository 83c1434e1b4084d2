"""The real 3B size against transformers' own tower on the same weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from bench.reference import TransformersTower
from export.accuracy import relative_error
from sidecar.artifact import open_artifact
from sidecar.runtimes.base import Load, Runtime
from sidecar.runtimes.loading import load_runtime
from sidecar.vision.dtypes import DType, to_float32
from sidecar.vision.grid import Grid
from sidecar.vision.pixels import Patches
from tests.real_size.conftest import RealExport

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

RUNS = {
    "square": [Grid(1, 16, 16)],
    "ragged": [Grid(1, 18, 30)],
    "one window": [Grid(1, 8, 8)],
    "two images": [Grid(1, 10, 12), Grid(1, 16, 8)],
    "video": [Grid(2, 12, 10)],
}


def items(real: RealExport, grids: list[Grid]) -> list[Patches]:
    random = np.random.default_rng(sum(grid.patches for grid in grids))
    width = real.checkpoint.tower.patch_width
    return [Patches(random.integers(0, 256, (grid.patches, width), dtype=np.uint8), grid) for grid in grids]


@pytest.fixture(scope="module")
def reference(real_export: RealExport) -> dict[str, np.ndarray]:
    tower = TransformersTower(real_export.checkpoint, torch.float32)
    return {name: tower.rows(*items(real_export, grids)) for name, grids in RUNS.items()}


@pytest.fixture(scope="module")
def transformers_bf16(real_export: RealExport) -> dict[str, np.ndarray]:
    tower = TransformersTower(real_export.checkpoint, torch.bfloat16)
    return {name: tower.rows(*items(real_export, grids)) for name, grids in RUNS.items()}


def runtime_of(real: RealExport, precision: str, dtype: DType) -> Runtime:
    artifact = open_artifact(real.artifact)
    # The f32 runtime reads the bf16 graph: the stored weights are the same, only the arithmetic differs.
    variant = artifact.manifest.variant("openvino", "bf16" if precision == "f32" else precision)
    load = Load(
        graph=artifact.path(variant.graph),
        precision=precision,
        tower=artifact.manifest.tower,
        pixels=artifact.manifest.pixels,
        output_dtype=dtype,
    )
    return load_runtime("openvino", load)


def rows(real: RealExport, runtime: Runtime) -> Iterator[tuple[str, np.ndarray]]:
    for name, grids in RUNS.items():
        patches = items(real, grids)
        values = np.concatenate([item.values for item in patches])
        output = runtime.encode(values, grids, real.checkpoint.tower)
        yield name, to_float32(output, runtime.output_dtype)


def test_float32_is_transformers_float32(real_export: RealExport, reference: dict[str, np.ndarray]) -> None:
    for name, got in rows(real_export, runtime_of(real_export, "f32", DType.FLOAT32)):
        error = np.abs(got - reference[name]).max() / np.abs(reference[name]).max()
        print(f"f32 {name}: max relative error {error:.2e}")
        assert error <= 1e-4, name


def test_bf16_is_no_worse_than_transformers_bf16(
    real_export: RealExport, reference: dict[str, np.ndarray], transformers_bf16: dict[str, np.ndarray]
) -> None:
    for name, got in rows(real_export, runtime_of(real_export, "bf16", DType.BFLOAT16)):
        ours = relative_error(got, reference[name])
        theirs = relative_error(transformers_bf16[name], reference[name])
        print(f"bf16 {name}: ours {ours:.4f}, transformers {theirs:.4f}, ratio {ours / theirs:.3f}")
        assert ours <= 1.1 * theirs, name


def test_int8_stays_above_its_bar(real_export: RealExport, reference: dict[str, np.ndarray]) -> None:
    for name, got in rows(real_export, runtime_of(real_export, "int8", DType.BFLOAT16)):
        error = relative_error(got, reference[name])
        print(f"int8 {name}: relative error {error:.4f}")
        assert error < 0.2, name
