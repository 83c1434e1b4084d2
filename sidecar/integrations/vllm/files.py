"""The embeddings that a vLLM waits for or still needs, as files of its own.

<directory>/epd-vllm-<random>/.lock                                held by the living vLLM whose files these are
<directory>/epd-vllm-<random>/<number>/encoder_cache.safetensors   one embedding, in the store's format

A file here is a second link to one in a sidecar's store, where that lies on the same file system: it costs nothing, and neither
the sidecar's eviction nor its death takes it away. Elsewhere it is a copy. What a killed vLLM left is removed by the next.
"""

from __future__ import annotations

import itertools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from sidecar.integrations.owned_directory import OwnedDirectory
from sidecar.store_file import FILE_NAME, Description, create, read
from sidecar.vision.dtypes import Array, all_finite

_PREFIX = "epd-vllm-"


@dataclass(frozen=True, slots=True)
class LocalFile:
    """One embedding, checked, for whoever reads it by `sidecar.store_file.read(directory, name, description)`."""

    directory: str
    name: str
    description: Description


class LocalFiles:
    """Adds and removes files; knows nothing of who wants them. Safe to call from any thread."""

    def __init__(self, parent: Path) -> None:
        """Make a directory of this process's own, after removing those of processes that are gone.

        Raises:
            OSError: if `parent` cannot be written.
        """
        self._directory = OwnedDirectory(parent, _PREFIX)
        self.path = self._directory.path
        self._numbers = itertools.count()

    def add(self, rows: Array, description: Description, linkable: Path | None) -> LocalFile:
        """Keep an embedding and check it as it lies here.

        Args:
            rows: (tokens, width) as described.
            linkable: the store's file that `rows` maps, if it does.

        Raises:
            OSError: if there is no room.
            ValueError: if it is not the embedding described, or holds values that are not finite.
        """
        name = str(next(self._numbers))
        (self.path / name).mkdir(mode=0o700)
        try:
            place = self.path / name / FILE_NAME
            if linkable is None or not _link(linkable, place):
                create(place, description)[:] = rows
            if not all_finite(read(self.path, name, description), description.dtype):
                raise ValueError("the embedding holds NaN or infinite values")
        except BaseException:
            self.remove(name)
            raise
        return LocalFile(str(self.path), name, description)

    def remove(self, name: str) -> None:
        """Whoever has it mapped keeps it."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def close(self) -> None:
        """Remove all of them."""
        self._directory.close()


def _link(source: Path, place: Path) -> bool:
    """False where the two are on different file systems, or the source is gone."""
    try:
        os.link(source, place, follow_symlinks=False)
    except OSError:
        return False
    return True
