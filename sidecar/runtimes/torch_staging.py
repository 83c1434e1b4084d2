"""The way to a torch device and back: pinned memory, and streams of their own for copies, so that one run is copied while
another one computes."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sidecar.vision.dtypes import Array
from sidecar.vision.grid import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the device is to be given beside a run's patches. `rows`: how many patches the tower takes, the run's own first."""

    arrays: dict[str, Array]
    rows: int
    tokens: int


class Encoder(Protocol):
    """A way of running the tower."""

    def plan(self, grids: Sequence[Grid]) -> Any:
        """A `Plan` of its own kind."""

    def encode(self, plan: Any, patches: Tensor, arrays: Mapping[str, Tensor], /) -> Tensor:
        """Enqueue the run: patches (rows, patch_width) and the plan's arrays on the device → (≥ tokens, out_hidden_size), which
        stays as it is until the next call."""


class HostStaging:
    """The CPU needs none."""

    def run(self, encoder: Encoder, patches: Array, plan: Plan, dtype: torch.dtype, out: Array) -> None:
        """Fill `out`, (tokens, width), with the embeddings in `dtype`."""
        arrays = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in plan.arrays.items()}
        embeddings = encoder.encode(plan, torch.from_numpy(np.array(patches)), arrays)
        _copy_bits(embeddings[: plan.tokens].to(dtype), out)


class DeviceStaging:
    """`cuda` or `xpu`; called by as many threads as runs are to be under way."""

    def __init__(self, device: torch.device, module: Any) -> None:
        """`module`: torch.cuda or torch.xpu."""
        self._device = device
        self._module = module
        self._up, self._compute, self._back = (module.Stream(device) for _ in range(3))
        self._turn = threading.Lock()

    def run(self, encoder: Encoder, patches: Array, plan: Plan, dtype: torch.dtype, out: Array) -> None:
        """As `HostStaging.run`."""
        module = self._module
        with module.device(self._device):
            with module.stream(self._up):
                # Rows in excess stay as they come: the tower keeps rows apart.
                on_device = torch.empty(plan.rows, patches.shape[1], dtype=_dtype(patches), device=self._device)
                on_device[: len(patches)].copy_(_pinned(patches), non_blocking=True)
                arrays = {
                    name: _pinned(array).to(self._device, non_blocking=True) for name, array in plan.arrays.items()
                }
                uploaded = self._mark()
            with self._turn, module.stream(self._compute):
                uploaded.wait()
                for tensor in (on_device, *arrays.values()):
                    tensor.record_stream(self._compute)
                embeddings = encoder.encode(plan, on_device, arrays)[: plan.tokens].to(dtype, copy=True)
                computed = self._mark()
            with module.stream(self._back):
                computed.wait()
                embeddings.record_stream(self._back)
                on_host = pinned_memory(embeddings.shape, dtype)
                on_host.copy_(embeddings, non_blocking=True)
                arrived = self._mark()
            arrived.synchronize()
        _copy_bits(on_host, out)

    def _mark(self) -> Any:
        """An event whose wait sleeps where the device has such: a thread that spins would take a core from a CPU lane and from
        preprocessing."""
        event = self._module.Event(blocking=True) if self._device.type == "cuda" else self._module.Event()
        event.record()
        return event


def _pinned(array: Array) -> Tensor:
    pinned = pinned_memory(array.shape, _dtype(array))
    pinned.numpy()[...] = array
    return pinned


def pinned_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Host memory that a device copies from and to by itself; torch keeps it for the next run."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)


def _dtype(array: Array) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype


def _copy_bits(embeddings: Tensor, out: Array) -> None:
    """numpy has no bfloat16: its bits are copied."""
    wide = out.dtype.itemsize == 4
    torch.from_numpy(out.view(np.int32 if wide else np.int16)).copy_(
        embeddings.view(torch.int32 if wide else torch.int16)
    )
