"""A checkpoint's files as export needs them: to read headers of (`sidecar.vision.checkpoint_files`), to fetch, and to write.

Nothing here knows the hub; that is `hub.py`, with the same methods.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from sidecar.vision import checkpoint_files
from sidecar.vision.checkpoint_files import PREAMBLE_BYTES, HeaderFiles, StoredTensor


class Files(HeaderFiles, Protocol):
    """Where a checkpoint's files come from. Every method raises CheckpointError."""

    def fetch(self, shard: str, tensors: Iterable[StoredTensor], received: Callable[[int], None]) -> Path:
        """A local safetensors file that holds at least these tensors of `shard`. `received` is told of every piece that
        had to be transferred, in bytes."""
        ...


class LocalFiles(checkpoint_files.LocalFiles):
    """A checkpoint in a directory."""

    def fetch(self, shard: str, tensors: Iterable[StoredTensor], received: Callable[[int], None]) -> Path:
        return self.directory / shard


def pack_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Preamble and header of a file that holds `tensors` (name, dtype, shape, bytes) in this order and nothing else."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, size in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format asks for aligned tensors
    return len(header).to_bytes(PREAMBLE_BYTES, "little") + header
