"""Read the vision tower out of a Qwen2.5-VL checkpoint: its sizes, its preprocessing and its weights, and nothing else.

A checkpoint is a directory or a hub id, in any layout that Hugging Face publishes or saves: one safetensors file or
shards, names under `visual.` or `model.visual.`, configuration flat or nested. Of the weights only the vision tensors
are read, and only when asked for; the language model beside them costs no time, no memory and no
transfer from the hub.

Everything is verified against the project's own `Tower` before a weight is transferred: what opens is complete, of the
right shapes and in floating point.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from export.files import CheckpointError, Files, LocalFiles, StoredTensor
from export.hub import HubFiles
from sidecar.vision.processors import pixel_spec, processor_configs
from sidecar.vision.spec import VISION_PREFIXES, PixelSpec, TowerSpec
from sidecar.vision.tower import Tower

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint"]

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLED_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")

# safetensors' codes of the dtypes that a tower may be stored in.
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

# Told (bytes so far, bytes in all) while weights are transferred.
Progress = Callable[[int, int], None]


class _Found(NamedTuple):
    """A vision tensor and the shard that holds it."""

    shard: str
    stored: StoredTensor


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
        found: Mapping[str, _Found],
        shards: Mapping[str, Path],
        random_weights: bool,
    ) -> None:
        self.tower = tower
        self.pixels = pixels
        self.source = files.source
        self.random_weights = random_weights
        self.names = tuple(sorted(found))
        self.dtype = reduce(torch.promote_types, {_DTYPES[each.stored.dtype] for each in found.values()})
        self._found = found
        # Opening maps a file into memory; its pages are read when a tensor is used.
        self._opened = {shard: _open(path, f"{shard} of {files.source}") for shard, path in shards.items()}

    def tensor(self, name: str) -> Tensor:
        """One weight as it is stored: its dtype unchanged, its memory mapped from the file and read at first use.

        Raises:
            KeyError: if `name` is not in `names`.
        """
        shard, stored = self._found[name]
        tensor: Tensor = self._opened[shard].get_tensor(stored.name)
        return tensor

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
        raise CheckpointError(f"{files.source} has no config.json: give the directory that holds a whole checkpoint")
    try:
        tower = _tower_spec(config)
        pixels = _pixel_spec(files, tower)
    except CheckpointError:
        raise
    except (ValueError, TypeError, AttributeError) as error:  # SpecError, and values of types that no number has
        raise CheckpointError(f"{files.source}: {error}") from error

    found = _find(files)
    _verify(found, tower, pixels, config, files.source)

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


def _canonical(name: str) -> str | None:
    """The tensor's name in `Tower.state_dict()`, None if it is none of the vision tower's."""
    return next((name.removeprefix(prefix) for prefix in VISION_PREFIXES if name.startswith(prefix)), None)


def _find(files: Files) -> dict[str, _Found]:
    """All vision tensors by canonical name, from the index and the headers of those shards that hold any."""
    found: dict[str, _Found] = {}
    for shard, claimed in _shards(files).items():
        held = {tensor.name: tensor for tensor in files.header(shard) if _canonical(tensor.name) is not None}
        for name in sorted(claimed - held.keys()):
            raise CheckpointError(
                f"{files.source}: {INDEX_FILE} places {name} in {shard}, which lacks it; download both again"
            )
        for stored in held.values():
            name = _canonical(stored.name) or ""
            if name in found:
                raise CheckpointError(f"{files.source} holds {name} twice: in {found[name].shard} and in {shard}")
            found[name] = _Found(shard, stored)
    if not found:
        raise CheckpointError(
            f"{files.source} holds no vision tensors (none is named visual.* or model.visual.*): give a whole "
            "Qwen2.5-VL checkpoint, not a text model or an adapter"
        )
    return found


def _shards(files: Files) -> dict[str, set[str]]:
    """Safetensors files that hold vision tensors, each with the tensors that the index places there (none without an
    index). Where there are both, the index goes before the single file, as in vLLM.
    """
    index = files.json(INDEX_FILE)
    if index is None:
        if files.exists(SINGLE_FILE):
            return {SINGLE_FILE: set()}
        if any(files.exists(name) for name in _PICKLED_FILES):
            raise CheckpointError(
                f"{files.source} holds its weights as pytorch_model.bin (pickle), which can neither be read in part "
                "nor be trusted: give a checkpoint in safetensors, such as transformers' save_pretrained writes"
            )
        raise CheckpointError(f"{files.source} has no weights: expected {SINGLE_FILE} or {INDEX_FILE} with its shards")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{INDEX_FILE} of {files.source} has no weight_map: download it again")
    claimed: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if _canonical(name) is not None:
            if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
                raise CheckpointError(
                    f"{INDEX_FILE} of {files.source} names {shard!r}, which is no file name of a shard"
                )
            claimed.setdefault(shard, set()).add(name)
    return claimed


def _verify(
    found: Mapping[str, _Found], spec: TowerSpec, pixels: PixelSpec, config: Mapping[str, Any], source: str
) -> None:
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Tower(spec, pixels).state_dict().items()}
    narrow = [
        f"{each.stored.name} ({each.stored.dtype})" for each in found.values() if each.stored.dtype not in _DTYPES
    ]
    if narrow:
        method = (config.get("quantization_config") or {}).get("quant_method", "")
        raise CheckpointError(
            f"{source} has a quantised vision tower{f' ({method})' if method else ''}: {_some(narrow)}. Give the "
            f"checkpoint that it was made from, or one whose vision tensors stayed in {', '.join(_DTYPES)}"
        )
    if extra := sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            f"{source} has vision tensors that no Qwen2.5-VL tower of its config.json has: {_some(extra)}"
        )
    if missing := sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"{source} lacks vision tensors that its config.json calls for: {_some(missing)}")
    wrong = [
        f"{name} is {found[name].stored.shape} instead of {shape}"
        for name, shape in expected.items()
        if found[name].stored.shape != shape
    ]
    if wrong:
        raise CheckpointError(f"{source} has vision tensors of other shapes than its config.json says: {_some(wrong)}")


def _some(entries: list[str]) -> str:
    return ", ".join(entries[:3]) + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")


def _open(path: Path, where: str) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{where} is no safetensors file, or a damaged one ({error}): download it again"
        ) from error
