"""Write a tower's weights for the torch runtime, which runs the tower itself."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from sidecar.vision.tower import Tower


def write_torch(tower: Tower, graph: Path) -> tuple[Path, ...]:
    """Write the weights to `graph` (.safetensors) under the checkpoint's names. Returns the file written."""
    graph.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tower.state_dict().items()}, graph)
    # safetensors makes it readable for its owner alone; a container's user is another one.
    graph.chmod(0o644)
    return (graph,)
