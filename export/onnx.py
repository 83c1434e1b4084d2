"""Write a tower as an ONNX graph with its weights in one file beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from export.trace import INPUT_NAMES, OUTPUT_NAME, example_run, exported_program, quiet
from export.weights import Int8Linear, replace_modules
from sidecar.vision.tower import Tower

OPSET = 20


class Int8RowsLinear(nn.Module):
    """An `Int8Linear` whose activations are quantised too, a scale for each row, and multiplied as integers.

    ONNX has no operator that does this at once, and ONNX Runtime would widen int8 weights that are merely scaled, so the
    steps are spelled out. MatMulInteger takes activations as uint8, hence the offset of 128. Its CPU kernels are several
    times as fast as float32 ones; those of MatMulNBits with 8 bits, the alternative, were half as fast (docs/performance.md).
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: Int8Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().t().contiguous())
        self.register_buffer("scale", linear.scale.detach().reshape(-1))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        quantised = ((x / scale).round() + 128).to(torch.uint8)
        offset = torch.full((), 128, dtype=torch.uint8)
        product = torch.onnx.ops.symbolic(
            "MatMulInteger",
            (quantised, self.weight, offset),
            dtype=torch.int32,
            shape=(x.shape[0], self.weight.shape[1]),
            version=OPSET,
        )
        y = product.to(torch.float32) * scale * self.scale
        return y if self.bias is None else y + self.bias.to(torch.float32)


def write_onnx(tower: Tower, graph: Path) -> tuple[Path, ...]:
    """Export `tower`, whose int8 layers are replaced, to `graph` (.onnx) and its weights to `graph`.data.

    Returns the files written.
    """
    replace_modules(tower, Int8Linear, Int8RowsLinear)
    program = exported_program(tower, example_run(tower.spec))
    graph.parent.mkdir(parents=True, exist_ok=True)
    with quiet():
        torch.onnx.export(
            program,
            f=graph,
            external_data=True,
            input_names=list(INPUT_NAMES),
            output_names=[OUTPUT_NAME],
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    return graph, graph.with_name(graph.name + ".data")
