"""Write a tower as an OpenVINO graph."""

from __future__ import annotations

from pathlib import Path

import openvino as ov

from export.trace import INPUT_NAMES, OUTPUT_NAME, example_run, exported_program, quiet
from sidecar.runtimes.openvino import graph_files
from sidecar.vision.tower import Tower


def write_openvino(tower: Tower, graph: Path) -> tuple[Path, ...]:
    """Write `tower` as `graph` (.xml) and its weights (.bin); every length but the widths stays open.

    The weights are written as the tower holds them, two bytes or one each, with the widening in the graph.
    Returns the files written.
    """
    example = example_run(tower.spec)
    program = exported_program(tower, example)
    with quiet():
        model = ov.convert_model(program)
    for port, name in zip(model.inputs, INPUT_NAMES, strict=True):
        port.get_tensor().set_names({name})
        parameter = port.get_node()
        parameter.set_friendly_name(name)
        parameter.set_partial_shape(ov.PartialShape(list(example.shape(name))))
    model.output(0).get_tensor().set_names({OUTPUT_NAME})
    model.validate_nodes_and_infer_types()
    graph.parent.mkdir(parents=True, exist_ok=True)
    # Weights narrower than float32 already are what they should be; float32 ones were asked for.
    ov.save_model(model, graph, compress_to_fp16=False)
    return graph_files(graph)
