"""A directory of compiled models that can be believed: what a runtime left there is used again only if nobody changed it.

The artifact's seal does not cover it, and a runtime takes a blob with a flipped bit for a model.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from sidecar.runtimes.tried import SUFFIXES

_SUM = ".sha256"
# What is no model, and loses nothing by being changed.
_OTHERS = (_SUM, *SUFFIXES)


def discard_changed(directory: Path) -> None:
    """Remove every file whose sha256 was not recorded, or is another now."""
    for path in _blobs(directory):
        recorded = path.with_name(path.name + _SUM)
        if not recorded.is_file() or recorded.read_text() != _sha256(path):
            path.unlink()


def record(directory: Path) -> None:
    """Note the sha256 of every file, after the runtime that wrote them succeeded."""
    for path in _blobs(directory):
        path.with_name(path.name + _SUM).write_text(_sha256(path))


def _blobs(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and path.suffix not in _OTHERS]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
