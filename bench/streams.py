"""Streams and shared runs: what many small items gain from either, on one device.

    python -m bench.streams --artifact DIR [--precision bf16]

Pictures a second over a fixed number of equal items, for each number of streams and of items that share a run. One artifact is
loaded anew for each number of streams, since that decides how a runtime lays out its threads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sidecar.artifact import open_artifact
from sidecar.runtimes.base import Load, Runtime
from sidecar.runtimes.loading import load_runtime
from sidecar.vision.grid import Grid
from sidecar.vision.spec import TowerSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 32], help="of square grids, in patches")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shared", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    artifact = open_artifact(arguments.artifact)
    tower, variant = artifact.manifest.tower, artifact.manifest.variant("openvino", arguments.precision)
    print("patches streams items/run  pictures/s")
    for streams in arguments.streams:
        runtime = load_runtime(
            "openvino",
            Load(
                graph=artifact.path(variant.graph),
                precision=variant.precision,
                tower=tower,
                pixels=artifact.manifest.pixels,
                output_dtype=artifact.manifest.checkpoint.dtype,
                streams=streams,
            ),
        )
        for side in arguments.sides:
            for shared in arguments.shared:
                taken = [seconds(runtime, tower, side, shared, arguments.items) for _ in range(arguments.rounds + 1)]
                rate = arguments.items / statistics.median(taken[1:])
                print(f"{side * side:7} {streams:7} {shared:9}  {rate:10.2f}", flush=True)
        print(runtime.device)


def seconds(runtime: Runtime, tower: TowerSpec, side: int, shared: int, items: int) -> float:
    """For so many items, `shared` to a run, on all streams."""
    grids = [Grid(1, side, side)] * shared
    patches = np.zeros((shared * side * side, tower.patch_width), np.uint8)
    with ThreadPoolExecutor(runtime.streams) as threads:
        started = time.perf_counter()
        runs = [threads.submit(runtime.encode, patches, grids, tower) for _ in range(items // shared)]
        for run in runs:
            run.result()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
