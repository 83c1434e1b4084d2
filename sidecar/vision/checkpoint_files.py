"""A checkpoint's files in a directory, and the safetensors header that says which bytes hold which tensor.

Knows JSON and byte positions; nothing of towers (that is `vision_tensors.py`), and nothing of the hub.
Format: https://huggingface.co/docs/safetensors/index#format. Eight bytes of length, a JSON header, then the tensors'
bytes without gaps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

PREAMBLE_BYTES = 8
# The safetensors library refuses longer headers too; a garbage length must not become an allocation.
MAX_HEADER_BYTES = 100_000_000


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that is no Qwen2.5-VL in floating point. The message says what would be."""


class AbsentError(CheckpointError):
    """A safetensors file that the index lists and that is not there."""


class StoredTensor(NamedTuple):
    """One tensor in a safetensors file: `dtype` is the format's code ("BF16"), `start` and `end` bytes of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class HeaderFiles(Protocol):
    """Where a checkpoint's files come from. Every method raises CheckpointError."""

    @property
    def source(self) -> str:
        """The checkpoint's name for people and manifests: never a path of this machine."""
        ...

    def json(self, name: str) -> dict[str, Any] | None:
        """The parsed JSON object in the file `name`, None if the checkpoint has no such file."""
        ...

    def exists(self, name: str) -> bool: ...

    def shards(self) -> list[str]:
        """The names of all safetensors files, sorted."""
        ...

    def header(self, shard: str) -> list[StoredTensor]:
        """What the safetensors file `shard` holds, without reading its tensors.

        Raises:
            AbsentError: if there is no such file.
        """
        ...


class LocalFiles:
    """A checkpoint in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.source = directory.resolve().name

    def json(self, name: str) -> dict[str, Any] | None:
        path = self.directory / name
        return parse_json(path, f"{name} of {self.source}") if path.is_file() else None

    def exists(self, name: str) -> bool:
        return (self.directory / name).is_file()

    def shards(self) -> list[str]:
        return sorted(path.name for path in self.directory.glob("*.safetensors"))

    def header(self, shard: str) -> list[StoredTensor]:
        if not self.exists(shard):
            raise AbsentError(f"{self.source} lacks {shard}, which its index lists: copy or download that file too")
        return read_header(self.directory / shard, f"{shard} of {self.source}")


def parse_json(path: Path, where: str) -> dict[str, Any]:
    """Read a JSON object; `where` names the file in errors.

    Raises:
        CheckpointError: if it is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{where} is not readable JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be a JSON object, got {type(value).__name__}")
    return value


def read_header(path: Path, where: str) -> list[StoredTensor]:
    """The header of a safetensors file on this machine.

    Raises:
        CheckpointError: if the file is cut short or is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = header_length(file.read(PREAMBLE_BYTES), where)
            return parse_header(file.read(length), where, path.stat().st_size)
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror}") from error


def header_length(preamble: bytes, where: str) -> int:
    """Bytes of the JSON header, from the file's first eight bytes."""
    if preamble == b"version ":
        raise CheckpointError(f"{where} is only a git-lfs pointer: run `git lfs pull` in the checkpoint")
    length = int.from_bytes(preamble, "little")
    if len(preamble) < PREAMBLE_BYTES or not 2 <= length <= MAX_HEADER_BYTES:
        raise CheckpointError(f"{where} is no safetensors file, or a damaged one: download it again")
    return length


def parse_header(header: bytes, where: str, file_bytes: int) -> list[StoredTensor]:
    """Tensors of a file of `file_bytes` whose JSON header is `header`, positions counted from the file's beginning."""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = []
        for name, entry in entries.items():
            start, end = (PREAMBLE_BYTES + len(header) + int(offset) for offset in entry["data_offsets"])
            tensors.append(StoredTensor(name, str(entry["dtype"]), tuple(map(int, entry["shape"])), start, end))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where} has a damaged safetensors header ({error}): download it again") from error
    needed = max((tensor.end for tensor in tensors), default=0)
    if needed > file_bytes:
        raise CheckpointError(
            f"{where} is truncated: its header calls for {needed} bytes, the file has {file_bytes}; download it again"
        )
    return tensors
