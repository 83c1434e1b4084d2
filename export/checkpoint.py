"""Read the vision tower out of a Qwen2.5-VL checkpoint: its sizes, its preprocessing and its weights, and nothing else.

A checkpoint is a directory or a hub id, in any layout that Hugging Face publishes or saves: one safetensors file or
shards, names under `visual.` or `model.visual.`, configuration flat or nested. Of the weights only the vision tensors
are read (`sidecar.vision.vision_tensors` finds them), and only when asked for; the language model beside them costs no
time, no memory and no transfer from the hub.

Everything is verified against the sizes in config.json before a weight is transferred: what opens is complete, of the
right shapes and in floating point.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from export.files import Files, LocalFiles
from export.hub import HubFiles
from sidecar.vision.checkpoint_files import CheckpointError
from sidecar.vision.processors import pixel_spec, processor_configs
from sidecar.vision.spec import PixelSpec, TowerSpec
from sidecar.vision.vision_tensors import DTYPES, Found, find_tensors, no_checkpoint

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint"]

logger = logging.getLogger(__name__)

# Told (bytes so far, bytes in all) while weights are transferred.
Progress = Callable[[int, int], None]


class Checkpoint:
    """The vision half of an opened checkpoint. Iterating gives (name, tensor) in the order of `names`.

    Attributes:
        tower: the network's sizes.
        pixels: its preprocessing.
        dtype: what the weights are stored in; where tensors differ, the narrowest dtype that holds all of them exactly.
        source: hub id and commit ("Qwen/Qwen2.5-VL-3B-Instruct@66285546…"), or the directory's name.
        random_weights: whether the checkpoint says of itself that it was made by `synthetic.py`.
        names: names of all tensors, sorted, as in `Tower.state_dict()`.
    """

    def __init__(
        self,
        *,
        tower: TowerSpec,
        pixels: PixelSpec,
        files: Files,
        found: Mapping[str, Found],
        shards: Mapping[str, Path],
        random_weights: bool,
    ) -> None:
        self.tower = tower
        self.pixels = pixels
        self.source = files.source
        self.random_weights = random_weights
        self.names = tuple(sorted(found))
        self.dtype = reduce(torch.promote_types, {getattr(torch, DTYPES[each.stored.dtype]) for each in found.values()})
        self._found = found
        # Opening maps a file into memory; its pages are read when a tensor is used.
        self._opened = {shard: _open(path, f"{shard} of {files.source}") for shard, path in shards.items()}

    def tensor(self, name: str) -> Tensor:
        """One weight as it is stored: its memory mapped from the file and read at first use, its dtype unchanged. Only
        float64 is rounded to float32, in memory of its own.

        Raises:
            KeyError: if `name` is not in `names`.
        """
        shard, stored = self._found[name]
        tensor: Tensor = self._opened[shard].get_tensor(stored.name)
        return tensor.float() if tensor.dtype is torch.float64 else tensor

    def close(self) -> None:
        """Let go of the files; tensors already handed out keep theirs mapped as long as they live."""
        self._opened.clear()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.tensor(name)) for name in self.names)

    def __len__(self) -> int:
        return len(self.names)


def open_checkpoint(
    model: str, *, revision: str | None = None, cache_dir: str | Path | None = None, progress: Progress | None = None
) -> Checkpoint:
    """Open a Qwen2.5-VL checkpoint and verify its vision tower.

    Args:
        model: a directory, or a hub id, of which only configuration and vision tensors are downloaded (see `hub.py`).
        revision: branch, tag or commit on the hub.
        cache_dir: the hub cache, if not huggingface_hub's own.
        progress: called with (bytes so far, bytes in all) as vision tensors arrive from the hub.

    Raises:
        CheckpointError: if there is no such checkpoint, if it is not a Qwen2.5-VL, or if its vision tensors are
            incomplete, damaged, of other shapes than config.json says, or quantised.
    """
    files = _files(model, revision, cache_dir)
    config = files.json("config.json")
    if config is None:
        raise CheckpointError(no_checkpoint(files))
    try:
        tower = _tower_spec(config)
        pixels = _pixel_spec(files, tower)
    except CheckpointError:
        raise
    except (ValueError, TypeError, AttributeError) as error:  # SpecError, and values of types that no number has
        raise CheckpointError(f"{files.source}: {error}") from error

    found = find_tensors(files, tower, config)

    total = sum(each.stored.end - each.stored.start for each in found.values())
    done = 0

    def received(piece_bytes: int) -> None:
        nonlocal done
        done += piece_bytes
        if progress is not None:
            progress(done, total)

    shards = {
        shard: files.fetch(shard, [each.stored for each in found.values() if each.shard == shard], received)
        for shard in sorted({each.shard for each in found.values()})
    }
    return Checkpoint(
        tower=tower,
        pixels=pixels,
        files=files,
        found=found,
        shards=shards,
        random_weights=config.get("random_weights") is True,
    )


def _files(model: str, revision: str | None, cache_dir: str | Path | None) -> Files:
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{model} is a directory here, and a revision ({revision}) is for hub ids only")
        return LocalFiles(path)
    if path.exists():
        raise CheckpointError(f"{model} is a file: give the directory that holds config.json and the weights")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"there is no directory {model}: give one that holds a checkpoint, or a hub id")
    return HubFiles(model, revision=revision, cache_dir=cache_dir)


def _tower_spec(config: Mapping[str, Any]) -> TowerSpec:
    if not isinstance(config.get("vision_config", {}), dict):
        raise CheckpointError("config.json's vision_config must be an object")
    return TowerSpec.from_config(config)


def _pixel_spec(files: Files, tower: TowerSpec) -> PixelSpec:
    image, video = processor_configs(files.json)
    if image is None:
        logger.warning("%s has no image processor configuration: Qwen2.5-VL's defaults are assumed", files.source)
    return pixel_spec(image, video, tower)


def _open(path: Path, where: str) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{where} is no safetensors file, or a damaged one ({error}): download it again"
        ) from error
