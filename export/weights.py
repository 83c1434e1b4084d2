"""A tower holding a checkpoint's weights, in the width that a graph will store them in.

Nothing is widened here: the tensors stay memory-mapped where the checkpoint's dtype is the wanted one, so that exporting a
real tower costs little more than its graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.checkpoint import Checkpoint
from sidecar.vision import tower as network


def storage_dtype(precision: str, checkpoint_dtype: torch.dtype) -> torch.dtype:
    """What a graph stores the weights in that are not int8: float32 keeps what the checkpoint has, exact either way, and the
    other precisions narrow only what is wider than two bytes."""
    if precision == "f32" or checkpoint_dtype.itemsize == 2:
        return checkpoint_dtype
    return torch.bfloat16


class Int8Linear(nn.Module):
    """A linear layer with symmetric int8 weights and one scale for each output.

    The runtime quantises the activations as they come (OpenVINO: in groups along the input), so that no calibration data
    is needed and an outlier spoils its own group alone.
    """

    def __init__(self, linear: network.Linear) -> None:
        super().__init__()
        self.weight, self.scale = (nn.Parameter(part, requires_grad=False) for part in quantise_rows(linear.weight))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
        return functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(outputs, inputs) → int8 values and float32 scales (outputs, 1), value·scale ≈ weight."""
    wide = weight.detach().float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (wide / scale).round().to(torch.int8), scale


def load_tower(checkpoint: Checkpoint, precision: str) -> network.Tower:
    """The tower with the checkpoint's weights stored for `precision`, computing in float32."""
    dtype = storage_dtype(precision, checkpoint.dtype)
    tower = empty_tower(checkpoint)
    tower.load_state_dict(
        {name: checkpoint.tensor(name).to(dtype) for name in checkpoint.names}, assign=True, strict=True
    )
    if precision == "int8":
        replace_modules(tower, network.Linear, Int8Linear)
    return tower.eval()


def empty_tower(checkpoint: Checkpoint) -> network.Tower:
    """The tower with no storage behind its weights (the small constant buffers are real)."""
    with torch.device("meta"):
        tower = network.Tower(checkpoint.tower, checkpoint.pixels)
    tower.patch_embed.set_normalisation(checkpoint.pixels)
    return tower


def replace_modules(module: nn.Module, kind: type[nn.Module], replacement: Callable[[Any], nn.Module]) -> None:
    """Put `replacement(child)` in the place of every module of `kind` below `module`."""
    for name, child in list(module.named_children()):
        if isinstance(child, kind):
            setattr(module, name, replacement(child))
        else:
            replace_modules(child, kind, replacement)
