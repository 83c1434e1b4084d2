"""One stored embedding: the safetensors file that the server writes and that clients and vLLM's ECExampleConnector map.

Format: https://huggingface.co/docs/safetensors (8 bytes with the header's length, a JSON header, the tensor). The one tensor is
`ec_cache`, of shape (tokens, width); the header's metadata says of which grid and which model it is.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sidecar.vision.dtypes import Array, DType
from sidecar.vision.grid import Grid

FILE_NAME = "encoder_cache.safetensors"
TENSOR = "ec_cache"

# Vector stores do not straddle cache lines where the tensor begins on one.
_ALIGNMENT = 64
_LENGTH_BYTES = 8


class StoreFileError(ValueError):
    """A file is not the embedding that it should be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What an embedding is, without its values: `tokens` × `width` of `dtype`, for an item of size `grid`."""

    grid: Grid
    tokens: int
    width: int
    dtype: DType
    fingerprint: str

    @property
    def nbytes(self) -> int:
        return self.tokens * self.width * self.dtype.storage.itemsize


def create(path: Path, description: Description) -> Array:
    """Make a file of the embedding's size and map it; return its tensor, (tokens, width), to be filled in.

    Its memory is allocated here: a shared-memory file system that is full says so now, and not by a SIGBUS when a page of
    it is first written.

    Raises:
        OSError: if the file cannot be made, with ENOSPC where there is no room.
    """
    header = _header(description)
    size = len(header) + description.nbytes
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(handle, 0, size)
        mapping = mmap.mmap(handle, size)
    finally:
        os.close(handle)
    mapping[: len(header)] = header
    return _tensor(mapping, len(header), description)


def file_bytes(description: Description) -> int:
    """What an embedding's file takes, in whole pages, with a page for its directory."""
    page = mmap.PAGESIZE
    return page + -(-(len(_header(description)) + description.nbytes) // page) * page


def read(store: Path, name: str, description: Description) -> Array:
    """Map the embedding `<store>/<name>/encoder_cache.safetensors`, read-only: (tokens, width).

    It stays readable for as long as the array lives, even if the store drops the file meanwhile. Nothing outside `store` is
    opened, whatever `name` is and whatever links lie in the store.

    Raises:
        OSError: if there is no such file, or it may not be read.
        StoreFileError: if `name` is no name, or the file is not the embedding described.
    """
    if not name.isascii() or not name or name in (".", "..") or "/" in name or "\0" in name:
        raise StoreFileError("the name of a stored embedding must be a plain file name")
    directories = [os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
    try:
        below = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        directories.append(os.open(name, below | os.O_DIRECTORY, dir_fd=directories[0]))
        handle = os.open(FILE_NAME, below | os.O_NONBLOCK, dir_fd=directories[1])
        directories.append(handle)
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size < _LENGTH_BYTES:
            raise StoreFileError("a stored embedding is no file of the store's format")
        mapping = mmap.mmap(handle, found.st_size, access=mmap.ACCESS_READ)
    finally:
        for handle in directories:
            os.close(handle)
    return _tensor(mapping, _check_header(mapping, description), description)


def _header(description: Description) -> bytes:
    values = {
        "__metadata__": {
            "format": "pt",
            "grid_thw": json.dumps(list(description.grid)),
            "fingerprint": description.fingerprint,
        },
        TENSOR: {
            "dtype": description.dtype.safetensors,
            "shape": [description.tokens, description.width],
            "data_offsets": [0, description.nbytes],
        },
    }
    text = json.dumps(values, separators=(",", ":")).encode()
    padding = -(len(text) + _LENGTH_BYTES) % _ALIGNMENT
    return (len(text) + padding).to_bytes(_LENGTH_BYTES, "little") + text + b" " * padding


def _check_header(mapping: mmap.mmap, description: Description) -> int:
    """Where the tensor begins.

    Raises:
        StoreFileError: if the file holds anything but the embedding described.
    """
    # What was written for this very embedding has this very header, so that nothing needs to be parsed.
    header = _header(description)
    if mapping[: len(header)] != header:
        raise StoreFileError("a stored embedding is not of the grid, size, type or model that was announced")
    if len(mapping) != len(header) + description.nbytes:
        raise StoreFileError(
            f"a stored embedding has {len(mapping)} bytes instead of {len(header) + description.nbytes}"
        )
    return len(header)


def _tensor(mapping: mmap.mmap, offset: int, description: Description) -> Array:
    values: Array = np.frombuffer(mapping, description.dtype.storage, offset=offset)
    return values.reshape(description.tokens, description.width)
