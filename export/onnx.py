"""Write a tower as an ONNX graph with its weights in one file beside it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.trace import AXES, INPUT_NAMES, OUTPUT_NAME, example_run
from export.weights import Int8Linear, replace_linears
from sidecar.vision.tower import Tower

OPSET = 20


def write_onnx(tower: Tower, graph: Path) -> tuple[Path, ...]:
    """Export `tower` to `graph` (.onnx) and its weights to `graph`.data. Returns the files written."""
    example = example_run(tower.spec)
    lengths = {name: torch.export.Dim.DYNAMIC for name in "NRSFLT"}
    shapes = tuple(
        {place: lengths[axis] for place, axis in enumerate(AXES[name]) if axis is not None} for name in INPUT_NAMES
    )
    graph.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            tower,
            example.inputs,
            graph,
            dynamo=True,
            external_data=True,
            input_names=list(INPUT_NAMES),
            output_names=[OUTPUT_NAME],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    return graph, graph.with_name(graph.name + ".data")


class _quiet:
    """The exporter logs every step it does well; a person exporting wants the progress bar."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: Any) -> None:
        self._logger.setLevel(self._level)
