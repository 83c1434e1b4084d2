"""Every runtime gives what the tower gives, in every dtype it may be asked for, and from a cached model too."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from export.accuracy import BARS, measure, reference_embeddings
from export.checkpoint import Checkpoint, open_checkpoint
from export.onnx import write_onnx
from export.openvino import write_openvino
from export.samples import REFERENCES, Sample, samples
from export.synthetic import make_checkpoint
from export.torch import write_torch
from export.weights import load_tower
from sidecar.engine.cost import CostModel
from sidecar.engine.self_test import SelfTest, SelfTestError
from sidecar.runtimes.base import Load, Runtime, RuntimeFault
from sidecar.runtimes.loading import load_runtime
from sidecar.runtimes.onnx import multiplies_bytes_exactly
from sidecar.vision.dtypes import DType, from_float32, to_float32
from sidecar.vision.grid import Grid
from sidecar.vision.reference import Reference
from sidecar.vision.windows import plan_windows

WRITERS = {"openvino": (write_openvino, ".xml"), "onnx": (write_onnx, ".onnx"), "torch": (write_torch, ".safetensors")}
RUNS = (
    [Grid(1, 8, 8)],
    [Grid(1, 2, 2)],
    [Grid(1, 16, 24)],
    [Grid(1, 10, 22)],
    [Grid(1, 2, 60)],
    [Grid(3, 12, 20)],
    [Grid(1, 16, 8), Grid(2, 10, 6), Grid(1, 34, 14)],
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("checkpoint") / "toy"
    make_checkpoint("toy", directory)
    return open_checkpoint(str(directory))


@pytest.fixture(scope="module")
def graphs(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("graphs")
    written = {}
    for name, (write, suffix) in WRITERS.items():
        written[name] = directory / f"{name}{suffix}"
        write(load_tower(checkpoint, "f32"), written[name])
    return written


def load(
    checkpoint: Checkpoint, graph: Path, name: str, precision: str, dtype: DType, cache: Path | None = None
) -> Runtime:
    return load_runtime(
        name,
        Load(
            graph=graph,
            precision=precision,
            tower=checkpoint.tower,
            pixels=checkpoint.pixels,
            output_dtype=dtype,
            cache_dir=cache,
        ),
    )


def patches(checkpoint: Checkpoint, grids: list[Grid]) -> np.ndarray:
    count = sum(grid.patches for grid in grids)
    return np.random.default_rng(count).integers(0, 256, (count, checkpoint.tower.patch_width), dtype=np.uint8)


@torch.inference_mode()
def expected(checkpoint: Checkpoint, grids: list[Grid]) -> np.ndarray:
    plan = plan_windows(grids, checkpoint.tower)
    inputs = [torch.from_numpy(array.copy()) for array in plan.tower_inputs.values()]
    values = torch.from_numpy(patches(checkpoint, grids)[plan.patch_order])
    return load_tower(checkpoint, "f32")(values, *inputs).numpy()


@pytest.mark.parametrize("name", WRITERS)
def test_float32_equals_the_tower_on_every_kind_of_run(
    checkpoint: Checkpoint, graphs: dict[str, Path], name: str
) -> None:
    runtime = load(checkpoint, graphs[name], name, "f32", DType.FLOAT32)
    for grids in RUNS:
        got = runtime.encode(patches(checkpoint, grids), grids, checkpoint.tower)
        reference = expected(checkpoint, grids)
        assert np.abs(got - reference).max() <= 1e-4 * np.abs(reference).max(), grids


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT16])
def test_embeddings_come_in_the_dtype_asked_for(
    checkpoint: Checkpoint, graphs: dict[str, Path], name: str, dtype: DType
) -> None:
    runtime = load(checkpoint, graphs[name], name, "f32", dtype)
    grids = [Grid(1, 10, 12)]
    got = runtime.encode(patches(checkpoint, grids), grids, checkpoint.tower)
    assert got.dtype == dtype.storage
    np.testing.assert_allclose(to_float32(got, dtype), expected(checkpoint, grids), rtol=2**-7, atol=2**-7)


def test_a_model_from_the_compile_cache_gives_the_same_embeddings(
    checkpoint: Checkpoint, graphs: dict[str, Path], tmp_path: Path
) -> None:
    grids = [Grid(1, 10, 22)]
    found = [
        load(checkpoint, graphs["openvino"], "openvino", "f32", DType.FLOAT32, cache).encode(
            patches(checkpoint, grids), grids, checkpoint.tower
        )
        for cache in (None, tmp_path, tmp_path)
    ]
    assert list(tmp_path.rglob("*.blob")), "nothing was cached"
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


def test_the_device_is_read_back_from_the_runtime(checkpoint: Checkpoint, graphs: dict[str, Path]) -> None:
    device = load(checkpoint, graphs["openvino"], "openvino", "f32", DType.FLOAT32).device
    assert device.startswith("CPU (")
    assert "f32" in device
    assert load(checkpoint, graphs["torch"], "torch", "bf16", DType.BFLOAT16).device == "cpu (bfloat16)"


@pytest.mark.parametrize("name", ["openvino", "onnx", "torch"])
def test_a_graph_that_is_no_graph_is_a_fault_and_not_a_crash(checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    broken = tmp_path / "graph"
    broken.write_bytes(b"not a graph")
    with pytest.raises(RuntimeFault, match="could not load graph"):
        load(checkpoint, broken, name, "f32", DType.FLOAT32)


@pytest.mark.parametrize("device", ["ov:NOSUCH", "AUTO"])
def test_a_device_that_will_not_do_is_named(checkpoint: Checkpoint, graphs: dict[str, Path], device: str) -> None:
    load_of_gpu = Load(
        graph=graphs["openvino"],
        precision="f32",
        tower=checkpoint.tower,
        pixels=checkpoint.pixels,
        output_dtype=DType.FLOAT32,
        device=device,
    )
    with pytest.raises(RuntimeFault, match=device):
        load_runtime("openvino", load_of_gpu)


def test_int8_products_are_refused_where_they_would_saturate(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("flags : fpu sse4_2 avx avx2\n")
    new.write_text("flags : fpu avx2 avx512_vnni\n")
    assert multiplies_bytes_exactly(new)
    assert multiplies_bytes_exactly(old) == (platform.machine() != "x86_64")


@pytest.fixture(scope="module")
def sealed_items(checkpoint: Checkpoint) -> tuple[list[Sample], list[Reference]]:
    """What export seals."""
    picked = [sample for sample in samples(checkpoint.tower, checkpoint.pixels) if sample.name in REFERENCES]
    rows = reference_embeddings(checkpoint, picked, lambda: None)
    return picked, [Reference(sample.patches, found) for sample, found in zip(picked, rows, strict=True)]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16])
def test_every_runtime_is_held_to_the_sealed_reference(
    checkpoint: Checkpoint,
    graphs: dict[str, Path],
    sealed_items: tuple[list[Sample], list[Reference]],
    name: str,
    precision: str,
    dtype: DType,
) -> None:
    """It passes in every dtype of its rows, and fails where they are one percent too large."""
    tower = checkpoint.tower
    picked, references = sealed_items
    rows = [reference.rows for reference in references]
    exporting = load(checkpoint, graphs[name], name, precision, DType.FLOAT32 if precision == "f32" else DType.BFLOAT16)
    _, sealed = measure(exporting, tower, picked, rows, BARS[precision], lambda: None)
    runtime = load(checkpoint, graphs[name], name, precision, dtype)
    assert runtime.version
    test = SelfTest(runtime, tower, references, sealed)
    test.warm_up(CostModel(), 0.0)
    assert test.passed
    whole = runtime.run

    def enlarged(patches: np.ndarray, grids: list[Grid], out: np.ndarray) -> None:
        whole(patches, grids, out)
        out[:] = from_float32(to_float32(out, dtype) * np.float32(1.01), dtype)

    runtime.run = enlarged  # type: ignore[method-assign, assignment]
    with pytest.raises(SelfTestError, match=f"^{name} {re.escape(runtime.version)} on "):
        test.run()
