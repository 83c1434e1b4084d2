"""Write a tower as an ONNX graph with its weights in one file beside it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from export.trace import INPUT_NAMES, OUTPUT_NAME, example_run, exported_program
from sidecar.vision.tower import Tower

OPSET = 20


def write_onnx(tower: Tower, graph: Path) -> tuple[Path, ...]:
    """Export `tower` to `graph` (.onnx) and its weights to `graph`.data. Returns the files written."""
    program = exported_program(tower, example_run(tower.spec))
    graph.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")
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


class _quiet:
    """The exporter logs every step it does well; a person exporting wants the progress bar."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: Any) -> None:
        self._logger.setLevel(self._level)
