"""The way of a run to an Intel GPU and back, on a device that only looks like one: what is copied when, and what the log says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.checkpoint import Checkpoint, open_checkpoint
from export.synthetic import make_checkpoint
from export.torch import write_torch
from export.weights import load_tower
from sidecar.runtimes import torch as torch_runtime
from sidecar.runtimes import torch_staging
from sidecar.runtimes.base import Load, RuntimeFault
from sidecar.runtimes.torch import TorchRuntime
from sidecar.vision.dtypes import DType
from sidecar.vision.grid import Grid


class FakeXpu:
    """What `torch.xpu` has of streams and events, over the CPU, where everything is done as soon as it is enqueued."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self._streams = 0

    def get_device_name(self, device: torch.device) -> str:
        return "Fake GPU Max"

    def device(self, device: torch.device) -> Any:
        return self._entered("device")

    def stream(self, stream: str) -> Any:
        return self._entered(stream)

    def Stream(self, device: torch.device) -> str:
        self._streams += 1
        return ("up", "compute", "back")[self._streams - 1]

    def Event(self) -> FakeXpu:
        return self

    def record(self) -> None:
        self.steps.append("mark")

    def wait(self) -> None:
        self.steps.append("wait")

    def synchronize(self) -> None:
        self.steps.append("synchronize")

    @contextmanager
    def _entered(self, what: str) -> Iterator[None]:
        self.steps.append(what)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("checkpoint") / "toy"
    make_checkpoint("toy", directory)
    return open_checkpoint(str(directory))


def load(checkpoint: Checkpoint, directory: Path, device: str) -> TorchRuntime:
    graph = directory / "tower.safetensors"
    write_torch(load_tower(checkpoint, "f32"), graph)
    return TorchRuntime(
        Load(
            graph=graph,
            precision="f32",
            tower=checkpoint.tower,
            pixels=checkpoint.pixels,
            output_dtype=DType.FLOAT32,
            device=device,
        )
    )


def test_a_run_goes_up_is_computed_and_comes_back(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu = load(checkpoint, tmp_path, "cpu")
    fake = FakeXpu()
    monkeypatch.setattr(torch_runtime, "open_device", lambda name: (torch.device("cpu"), fake))
    monkeypatch.setattr(torch_staging, "pinned_memory", lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    runtime = load(checkpoint, tmp_path, "xpu:0")
    assert runtime.device == "cpu (Fake GPU Max, float32)" and runtime.pipelined
    for grids in ([Grid(1, 16, 16)], [Grid(1, 10, 22)], [Grid(2, 12, 20), Grid(1, 4, 6)]):
        fake.steps.clear()
        values = np.random.default_rng(0).integers(
            0, 256, (sum(grid.patches for grid in grids), checkpoint.tower.patch_width), dtype=np.uint8
        )
        got = runtime.encode(values, grids, checkpoint.tower)
        np.testing.assert_array_equal(got, on_cpu.encode(values, grids, checkpoint.tower))
        assert fake.steps == ["device", "up", "mark", "compute", "wait", "mark", "back", "wait", "mark", "synchronize"]


@pytest.mark.parametrize("device", ["xpu:0", "cuda:0"])
def test_a_device_that_this_torch_does_not_have_is_said_to_be_missing(
    checkpoint: Checkpoint, tmp_path: Path, device: str
) -> None:
    kind = device.split(":")[0]
    if torch.get_device_module(kind).is_available():
        pytest.skip(f"there is a {kind} device")
    with pytest.raises(RuntimeFault, match=f"on {device}: torch .* finds no {kind} device"):
        load(checkpoint, tmp_path, device)
