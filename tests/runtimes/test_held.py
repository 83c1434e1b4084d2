"""Memory of a large run is given back once such runs no longer come, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sidecar.artifact import open_artifact
from sidecar.machine import return_freed_memory
from sidecar.runtimes import held
from sidecar.runtimes.base import Load, Runtime
from sidecar.runtimes.held import Held
from sidecar.runtimes.loading import load_runtime
from sidecar.vision.grid import Grid
from sidecar.vision.spec import TowerSpec

SMALL = (Grid(1, 32, 32), Grid(2, 2, 10), Grid(1, 2, 2), Grid(1, 16, 16))


def resident_mb() -> float:
    return_freed_memory()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def encoded(runtime: Runtime, tower: TowerSpec, grid: Grid) -> np.ndarray:
    patches = np.random.default_rng(0).integers(0, 256, (grid.patches, tower.patch_width), np.uint8)
    return runtime.encode(patches, [grid], tower)


def test_memory_of_a_large_run_is_given_back_and_results_stay(
    toy_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "_AFTER_S", 0.0)
    artifact = open_artifact(toy_artifact)
    manifest, variant = artifact.manifest, artifact.manifest.variants[0]
    tower = manifest.tower
    runtime = load_runtime(
        variant.runtime,
        Load(
            graph=toy_artifact / variant.graph,
            precision=variant.precision,
            tower=tower,
            pixels=manifest.pixels,
            output_dtype=manifest.checkpoint.dtype,
        ),
    )
    before = {grid: encoded(runtime, tower, grid) for grid in SMALL}
    assert not runtime.release_memory(), "small runs hold nothing that is worth it"
    usual = resident_mb()
    encoded(runtime, tower, Grid(1, 80, 80))
    grown = resident_mb() - usual
    assert runtime.release_memory() and not runtime.release_memory()
    left = resident_mb() - usual
    assert left < grown / 2, f"{left:.0f} of {grown:.0f} MB are held"
    for last in SMALL:  # a run of the same shapes as the one before the release is what OpenVINO alone fails on
        for grid in (last, *SMALL):
            np.testing.assert_array_equal(encoded(runtime, tower, grid), before[grid])
        encoded(runtime, tower, Grid(1, 64, 64))
        encoded(runtime, tower, last)
        assert runtime.release_memory()


def test_it_waits_until_no_run_of_that_size_has_come_for_a_while() -> None:
    now = 0.0
    memory = Held(lambda: now)
    memory.ran(1000)
    now = 100.0
    assert not memory.due
    memory.ran(20_000)
    memory.ran(100)
    assert not memory.due
    now = 125.0
    memory.ran(10_000)
    now = 150.0
    assert not memory.due
    now = 156.0
    assert memory.due
    memory.released()
    memory.ran(100)
    assert not memory.due
