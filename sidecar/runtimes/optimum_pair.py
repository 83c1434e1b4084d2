"""The files of optimum's pair of graphs, for those who look for them and need no OpenVINO."""

from __future__ import annotations

from pathlib import Path

# The names optimum gives its files: patches → hidden states, and hidden states → embeddings.
EMBEDDINGS = "openvino_vision_embeddings_model.xml"
MERGER = "openvino_vision_embeddings_merger_model.xml"


def pair_files(merger: Path) -> tuple[Path, ...]:
    """The files of the pair whose merger's topology is `merger`: that first, then its weights, then the other graph's."""
    embeddings = merger.with_name(EMBEDDINGS)
    return merger, merger.with_suffix(".bin"), embeddings, embeddings.with_suffix(".bin")
