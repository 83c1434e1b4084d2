"""The fingerprint of a checkpoint's vision tower, as export computes it, read from the checkpoint's files without torch.

Whoever takes a sidecar's embeddings compares it with the fingerprint that they come with.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from sidecar.artifact import fingerprint, tensor_hash
from sidecar.vision import processors
from sidecar.vision.checkpoint_files import LocalFiles, StoredTensor
from sidecar.vision.spec import PixelSpec, TowerSpec
from sidecar.vision.vision_tensors import DTYPES, find_tensors


def checkpoint_directory(model: str, revision: str | None) -> Path | None:
    """Where vLLM finds the checkpoint: a directory, or the hub's cache."""
    if Path(model).is_dir():
        return Path(model)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception:  # of many kinds, and each means that it is not here
        return None


def pixel_spec(directory: Path, tower: TowerSpec) -> PixelSpec:
    """Read the preprocessing of a checkpoint.

    Raises:
        SpecError: if it is one that no sidecar follows (see `sidecar.vision.processors`).
        OSError, ValueError: if a file cannot be read.
    """

    def read(name: str) -> dict[str, Any] | None:
        path = directory / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    return processors.pixel_spec(*processors.processor_configs(read), tower)


def tower_spec(directory: Path) -> TowerSpec:
    """Raises:
    OSError, ValueError, KeyError: if there is no configuration of such a tower.
    """
    return TowerSpec.from_config(json.loads((directory / "config.json").read_text(encoding="utf-8")))


def checkpoint_fingerprint(directory: Path, pixels: PixelSpec) -> str:
    """Compute a checkpoint's fingerprint as export does.

    Raises:
        OSError, ValueError, KeyError: if the vision tensors cannot be read, or are no floats.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    tower = TowerSpec.from_config(config)
    found = find_tensors(LocalFiles(directory), tower, config)
    hashes = {}
    for shard in sorted({each.shard for each in found.values()}):
        with (directory / shard).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
            for name, each in found.items():
                if each.shard == shard:
                    hashes[name] = _hash(each.stored, mapping)
    return fingerprint(tower, pixels, hashes)


def _hash(stored: StoredTensor, mapping: mmap.mmap) -> str:
    with memoryview(mapping) as file, file[stored.start : stored.end] as values:
        if stored.dtype == "F64":
            narrow = np.frombuffer(values, "<f8").astype("<f4")
            return tensor_hash(DTYPES["F64"], stored.shape, narrow.tobytes())
        return tensor_hash(DTYPES[stored.dtype], stored.shape, values)
