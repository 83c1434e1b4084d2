"""`python -m bench.gpu --checkpoint DIR`: the torch lane on a GPU, its accuracy and its time, against transformers' own tower.

Accuracy: the relative error of each against transformers in float32 on the same GPU, over the samples that every export is
measured on and further grids, videos and several images in one run among them. Time: against what the chip's own rate of bf16
products, measured in the same run, allows for the tower's arithmetic. Medians; the two towers alternate.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from bench.reference import TransformersTower
from export.accuracy import relative_error
from export.checkpoint import Checkpoint, open_checkpoint
from export.samples import samples
from export.synthetic import make_checkpoint, synthetic_kind
from export.torch import write_torch
from export.weights import load_tower
from sidecar.runtimes.base import Load
from sidecar.runtimes.torch import TorchRuntime
from sidecar.vision.dtypes import DType, to_float32
from sidecar.vision.grid import Grid
from sidecar.vision.pixels import Patches
from sidecar.vision.spec import TowerSpec

ACCURACY_BAR = 1.1
# The grids of tests/real_size/test_parity.py, and larger ones.
GRIDS: dict[str, tuple[Grid, ...]] = {
    "square": (Grid(1, 16, 16),),
    "ragged": (Grid(1, 18, 30),),
    "one window": (Grid(1, 8, 8),),
    "two images": (Grid(1, 10, 12), Grid(1, 16, 8)),
    "video": (Grid(2, 12, 10),),
    "video of 24 frames": (Grid(12, 18, 26),),
    "twenty images": tuple(Grid(1, 4 + 2 * (n % 7), 30 - 2 * (n % 5)) for n in range(20)),
    "1080p": (Grid(1, 78, 138),),
}
TIMED: dict[str, tuple[tuple[Grid, ...], float]] = {  # with the most that the time may be over the limit
    "1 × 1024": ((Grid(1, 32, 32),), 2.0),
    "1 × 4096": ((Grid(1, 64, 64),), 1.7),
    "8 × 1024": ((Grid(1, 32, 32),) * 8, 1.6),
}
# What no size of graph fits exactly.
FURTHER = {"640×480": (Grid(1, 34, 46),), "1280×720": (Grid(1, 52, 92),), "1920×1080": (Grid(1, 78, 138),)}


def random_items(grids: Sequence[Grid], spec: TowerSpec) -> list[Patches]:
    random = np.random.default_rng(sum(grid.patches for grid in grids))
    return [Patches(random.integers(0, 256, (grid.patches, spec.patch_width), dtype=np.uint8), grid) for grid in grids]


def rows(runtime: TorchRuntime, items: Sequence[Patches], spec: TowerSpec) -> np.ndarray:
    values = np.concatenate([item.values for item in items])
    return to_float32(runtime.encode(values, [item.grid for item in items], spec), runtime.output_dtype)


def accuracy(checkpoint: Checkpoint, runtime: TorchRuntime, device: str) -> dict[str, dict[str, float]]:
    spec = checkpoint.tower
    cases = {sample.name: [sample.patches] for sample in samples(spec, checkpoint.pixels)}
    cases |= {name: random_items(grids, spec) for name, grids in GRIDS.items()}
    exact = TransformersTower(checkpoint, torch.float32, device)
    expected = {name: exact.rows(*items) for name, items in cases.items()}
    del exact
    theirs = TransformersTower(checkpoint, torch.bfloat16, device)
    found = {}
    for name, items in cases.items():
        errors = [relative_error(got, expected[name]) for got in (rows(runtime, items, spec), theirs.rows(*items))]
        found[name] = {"ours": errors[0], "transformers": errors[1], "ratio": errors[0] / errors[1]}
        print(f"{name:28} ours {errors[0]:.4f}  transformers {errors[1]:.4f}  ratio {errors[0] / errors[1]:.3f}")
    return found


def arithmetic(spec: TowerSpec, grids: Sequence[Grid]) -> float:
    """Floating-point operations of the tower: the linear layers, windows, and whole frames."""
    patches = sum(grid.patches for grid in grids)
    block = 4 * spec.hidden_size**2 + 3 * spec.hidden_size * spec.intermediate_size
    merged = spec.hidden_size * spec.merge_unit
    merger = merged * (merged + spec.out_hidden_size) / spec.merge_unit
    linear = 2 * patches * (spec.depth * block + spec.patch_width * spec.hidden_size + merger)
    whole = len(spec.fullatt_block_indexes)
    pairs = whole * sum(grid.t * (grid.h * grid.w) ** 2 for grid in grids)
    pairs += (spec.depth - whole) * patches * spec.window_patches
    return linear + 4 * spec.hidden_size * pairs


def gpu_ms(work: Callable[[], object], times: int = 20) -> float:
    taken = []
    for _ in range(times):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return statistics.median(taken)


def bf16_rate(device: str) -> float:
    """Operations a second of a large product."""
    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    gpu_ms(lambda: left @ right, 5)
    return 2 * 8192**3 / (gpu_ms(lambda: left @ right) * 1e-3)


def timing(checkpoint: Checkpoint, runtime: TorchRuntime, device: str) -> dict[str, dict[str, float]]:
    spec = checkpoint.tower
    theirs = TransformersTower(checkpoint, torch.bfloat16, device)
    rate = bf16_rate(device)
    print(f"bf16 products: {rate / 1e12:.0f} TFLOP/s")
    found: dict[str, dict[str, float]] = {"bf16 rate": {"tflops": rate / 1e12}}
    for name, grids in {**{name: grids for name, (grids, _) in TIMED.items()}, **FURTHER}.items():
        items = random_items(grids, spec)
        values, inputs = np.concatenate([item.values for item in items]), theirs.inputs(*items)
        ours = runtime.enqueue(values, grids)
        for work in (ours, lambda: theirs.encode(*inputs)):  # noqa: B023
            gpu_ms(work, 3)
        pairs = [(gpu_ms(ours, 5), gpu_ms(lambda: theirs.encode(*inputs), 1)) for _ in range(9)]  # noqa: B023
        limit = arithmetic(spec, grids) / rate * 1e3
        mine, other = (statistics.median(times) for times in zip(*pairs, strict=True))
        out = np.empty((sum(grid.tokens(spec) for grid in grids), spec.out_hidden_size), runtime.output_dtype.storage)
        walls = []
        for _ in range(20):
            started = time.perf_counter()
            runtime.run(values, grids, out)
            walls.append((time.perf_counter() - started) * 1e3)
        found[name] = {
            "limit_ms": limit,
            "ours_ms": mine,
            "over_limit": mine / limit,
            "transformers_ms": other,
            "whole_run_ms": statistics.median(walls),
        }
        print(
            f"{name:10} limit {limit:6.2f} ms  ours {mine:6.2f} ms = {mine / limit:.2f} ×  transformers {other:6.1f} ms  "
            f"from the host and back {statistics.median(walls):6.2f} ms"
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("--checkpoint", default="random:3b", help="a directory, or random:3b")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as scratch:
        source = options.checkpoint
        if kind := synthetic_kind(source):
            source = str(make_checkpoint(kind, Path(scratch) / "checkpoint"))
        checkpoint = open_checkpoint(source)
        graph = Path(scratch) / "tower.safetensors"
        write_torch(load_tower(checkpoint, "bf16"), graph)
        started = time.perf_counter()
        runtime = TorchRuntime(
            Load(
                graph=graph,
                precision="bf16",
                tower=checkpoint.tower,
                pixels=checkpoint.pixels,
                output_dtype=DType.BFLOAT16,
                device=options.device,
            )
        )
        cold_s = time.perf_counter() - started
    print(f"{runtime.device}; torch {torch.__version__}; ready after {cold_s:.1f} s")
    print(f"GPU memory {torch.cuda.memory_reserved() / 2**30:.2f} GiB")
    figures = {
        "device": runtime.device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "random_weights": checkpoint.random_weights,
        "cold_start_s": cold_s,
        "gpu_memory_bytes": torch.cuda.memory_reserved(),
        "accuracy": accuracy(checkpoint, runtime, options.device),
        "timing": timing(checkpoint, runtime, options.device),
    }
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
    worst = max(case["ratio"] for case in figures["accuracy"].values())
    slow = [name for name, (_, bar) in TIMED.items() if figures["timing"][name]["over_limit"] > bar]
    print(f"worst ratio of errors {worst:.3f} (bar {ACCURACY_BAR}); over the bar of time: {', '.join(slow) or 'none'}")
    return int(worst > ACCURACY_BAR or bool(slow))


if __name__ == "__main__":
    sys.exit(main())
