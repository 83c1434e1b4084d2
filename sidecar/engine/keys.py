"""Names under which embeddings are stored. Keys are data, never paths; a name is a plain file name.

Names that this module makes have a prefix and a hash. A caller's key of that look is hashed like one that is no file name, so
that no key that a caller makes up can stand for another's content.
"""

from __future__ import annotations

import hashlib
import json
import re

_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,128}")
_MADE = re.compile(r"(key|bounded|content)-[0-9a-f]{64}")


def name_of_key(key: str) -> str:
    """The key itself where it is a plain file name, else its hash."""
    if _PLAIN.fullmatch(key) and not key.startswith(".") and not _MADE.fullmatch(key):
        return key
    return "key-" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def name_of_bounded(key: str, min_pixels: int, max_pixels: int) -> str:
    """For a key whose item has bounds of its own, which give the same content another embedding."""
    return "bounded-" + hashlib.sha256(json.dumps([key, min_pixels, max_pixels]).encode()).hexdigest()


def name_of_content(content: bytes) -> str:
    """For an item without a key: of all that shapes its embedding."""
    return "content-" + hashlib.sha256(content).hexdigest()


def name_to_fetch(key: str) -> str:
    """The name that a key or a name stands for."""
    return key if _MADE.fullmatch(key) else name_of_key(key)
