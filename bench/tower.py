"""`make bench`: time and memory of one image against its number of patches, at real size with random weights.

Every figure is a median over runs that alternate between the precisions, on whatever machine this is; the ratio between two
columns means something, an absolute time on a shared machine does not. Memory is the growth of the process's peak over what
it held after loading, taken in a fresh process for each precision and size.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sidecar.artifact import open_artifact
from sidecar.runtimes.base import Load, Runtime
from sidecar.runtimes.loading import load_runtime
from sidecar.vision.dtypes import DType
from sidecar.vision.grid import Grid

Encode = Callable[[np.ndarray, Grid], object]

# 256, 1024, 2304, 5184 patches, and 1920×1080.
GRIDS = (Grid(1, 16, 16), Grid(1, 32, 32), Grid(1, 48, 48), Grid(1, 72, 72), Grid(1, 78, 138))


def load(artifact_directory: Path, runtime: str, precision: str) -> Runtime:
    artifact = open_artifact(artifact_directory)
    variant = artifact.manifest.variant(runtime, precision)
    return load_runtime(
        runtime,
        Load(
            graph=artifact.path(variant.graph),
            precision=precision,
            tower=artifact.manifest.tower,
            pixels=artifact.manifest.pixels,
            output_dtype=DType.BFLOAT16,
        ),
    )


def patches(grid: Grid, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (grid.patches, width), dtype=np.uint8)


def encoders(artifact: Path, names: list[tuple[str, str]], checkpoint: str | None) -> dict[str, Encode]:
    """The variants, and with a checkpoint transformers' own tower in bf16 beside them."""
    tower = open_artifact(artifact).manifest.tower

    def of(runtime: Runtime) -> Encode:
        return lambda values, grid: runtime.encode(values, [grid], tower)

    found = {f"{runtime}/{precision}": of(load(artifact, runtime, precision)) for runtime, precision in names}
    if checkpoint is not None:
        import torch

        from bench.reference import TransformersTower
        from export.checkpoint import open_checkpoint
        from sidecar.vision.pixels import Patches

        theirs = TransformersTower(open_checkpoint(checkpoint), torch.bfloat16)
        found["transformers/bf16"] = lambda values, grid: theirs.rows(Patches(values, grid))
    return found


def times(artifact: Path, loaded: dict[str, Encode], runs: int) -> dict[int, dict[str, float]]:
    """patches → encoder → median milliseconds, the encoders in turn."""
    tower = open_artifact(artifact).manifest.tower
    table: dict[int, dict[str, float]] = {}
    for grid in GRIDS:
        values = patches(grid, tower.patch_width)
        measured: dict[str, list[float]] = {name: [] for name in loaded}
        for attempt in range(runs + 1 if grid.patches < 4000 else max(2, runs // 2)):
            for name, encode in loaded.items():
                started = time.perf_counter()
                encode(values, grid)
                if attempt:  # the first run at a size sets the runtime up for it
                    measured[name].append((time.perf_counter() - started) * 1e3)
        table[grid.patches] = {name: statistics.median(found) for name, found in measured.items()}
        print(json.dumps({"patches": grid.patches, "grid": grid, "ms": table[grid.patches]}), flush=True)
    return table


def peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def memory_of_one(artifact: Path, runtime: str, precision: str, index: int) -> None:
    """Run in a fresh process: print what one size adds to the peak after loading and a smallest run."""
    tower = open_artifact(artifact).manifest.tower
    loaded = load(artifact, runtime, precision)
    smallest, grid = Grid(1, 8, 8), GRIDS[index]
    loaded.encode(patches(smallest, tower.patch_width), [smallest], tower)
    before = peak_bytes()
    loaded.encode(patches(grid, tower.patch_width), [grid], tower)
    print(json.dumps({"patches": grid.patches, "loaded": before, "added": peak_bytes() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tower", description=__doc__)
    parser.add_argument("--artifact", type=Path, default=Path("artifacts/random-3b"))
    parser.add_argument("--variants", default="openvino/bf16,openvino/int8")
    parser.add_argument("--checkpoint", help="a checkpoint directory: transformers' tower is timed in the same run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = [tuple(name.split("/")) for name in options.variants.split(",")]
    if options.memory_of is not None:
        memory_of_one(options.artifact, *names[0], options.memory_of)
        return
    loaded = encoders(options.artifact, names, options.checkpoint)
    columns = list(loaded)
    table = times(options.artifact, loaded, options.runs)
    del loaded  # its memory is not to be counted below
    print("\n| patches | " + " | ".join(f"{name} ms" for name in columns) + " | memory added, MB |")
    print("|---|" + "---|" * (len(columns) + 1))
    for index, (count, row) in enumerate(table.items()):
        added = []
        for name in names:
            command = [sys.executable, "-m", "bench.tower", "--artifact", str(options.artifact)]
            command += ["--variants", "/".join(name), "--memory-of", str(index)]
            report = json.loads(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            )
            added.append(f"{report['added'] / 1e6:.0f}")
        print(f"| {count} | " + " | ".join(f"{value:.0f}" for value in row.values()) + f" | {' / '.join(added)} |")


if __name__ == "__main__":
    main()
