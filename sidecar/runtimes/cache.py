"""A directory of compiled models that can be believed: what a runtime left there is used again only if nobody changed it.

The artifact's seal does not cover it, and a runtime takes a blob with a flipped bit for a model.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from sidecar.runtimes.tried import SUFFIXES

logger = logging.getLogger(__name__)

_SUM = ".sha256"
# What is no model, and loses nothing by being changed.
_OTHERS = (_SUM, *SUFFIXES)


def discard_changed(directory: Path) -> None:
    """Remove every file whose sha256 was not recorded, or is another now, or cannot be read."""
    for path in _blobs(directory):
        try:
            # Bytes: what damaged the record may have left no text.
            unchanged = _sum_of(path).read_bytes() == _sha256(path)
        except OSError:
            unchanged = False
        if not unchanged:
            path.unlink(missing_ok=True)


def record(directory: Path) -> None:
    """Note the sha256 of every file, after the runtime that wrote them succeeded. A full disk costs the next start time only."""
    try:
        for path in _blobs(directory):
            _sum_of(path).write_bytes(_sha256(path))
    except OSError as error:
        logger.warning("compiled models will be compiled again at the next start: %s: %s", directory, error.strerror)


def _blobs(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and path.suffix not in _OTHERS]


def _sum_of(path: Path) -> Path:
    return path.with_name(path.name + _SUM)


def _sha256(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).hexdigest().encode()
