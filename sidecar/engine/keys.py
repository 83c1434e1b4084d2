"""The identity of an item's content."""

from __future__ import annotations

import hashlib
import re

from sidecar.vision.pixels import Patches

_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,128}")


def content_key(patches: Patches) -> str:
    """A key for what the tower will see: equal patches and grid, equal key, whatever they were made from."""
    digest = hashlib.sha256(f"{patches.values.dtype} {tuple(patches.grid)}\n".encode())
    digest.update(patches.values.data)
    return digest.hexdigest()


def file_name(key: str) -> str:
    """A name for the file system: the key itself where it is plain, else its hash. Keys are data, never paths."""
    if _PLAIN.fullmatch(key) and not key.startswith("."):
        return key
    return "sha256-" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
