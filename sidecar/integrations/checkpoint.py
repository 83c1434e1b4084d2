"""The fingerprint of a checkpoint's vision tower, as export computes it, read from the checkpoint's files without torch.

Whoever takes a sidecar's embeddings compares it with the fingerprint that they come with.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sidecar.artifact import fingerprint, tensor_hash
from sidecar.vision import processors
from sidecar.vision.spec import VISION_PREFIXES, PixelSpec, TowerSpec

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# What export reads, by safetensors' names and by torch's.
_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_LENGTH_BYTES = 8


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
    """As export computes it.

    Raises:
        OSError, ValueError, KeyError: if the vision tensors cannot be read, or are no floats.
    """
    tower = tower_spec(directory)
    index = directory / _INDEX
    shards = {_SINGLE}
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {shard for name, shard in weight_map.items() if name.startswith(VISION_PREFIXES)}
    hashes = {name: value for shard in sorted(shards) for name, value in _hashes(directory / shard)}
    if not hashes:
        raise ValueError("it holds no vision tensors in safetensors")
    return fingerprint(tower, pixels, hashes)


def _hashes(shard: Path) -> Iterator[tuple[str, str]]:
    """Name, without its prefix, and hash of each vision tensor (https://huggingface.co/docs/safetensors, "Format").

    Raises:
        OSError, ValueError: if it cannot be read, is no safetensors file, or a vision tensor is of another type.
    """
    with shard.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        start = _LENGTH_BYTES + int.from_bytes(mapping[:_LENGTH_BYTES], "little")
        if start > len(mapping):
            raise ValueError(f"{shard.name} is no safetensors file, or a part of one")
        with memoryview(mapping) as bytes_of_file:
            for name, tensor in json.loads(mapping[_LENGTH_BYTES:start]).items():
                prefix = next((prefix for prefix in VISION_PREFIXES if name.startswith(prefix)), None)
                if prefix is None:
                    continue
                if tensor["dtype"] not in _FLOATS:
                    raise ValueError(f"{name} is stored in {tensor['dtype']}, not as the floats that export reads")
                begin, end = (start + offset for offset in tensor["data_offsets"])
                if end > len(mapping):
                    raise ValueError(f"{shard.name} is cut short: {name} ends behind its end")
                with bytes_of_file[begin:end] as values:
                    yield name.removeprefix(prefix), tensor_hash(_FLOATS[tensor["dtype"]], tensor["shape"], values)
