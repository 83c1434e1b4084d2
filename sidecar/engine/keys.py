"""Names under which embeddings are stored. Keys are data, never paths; a name is a plain file name.

An embedding is stored under a hash of all that shapes it: the item's content, its bounds, and its key where it has one. So a
caller who sends content is never answered with the embedding of other content, whatever the key says.

A key alone stands for the content that it was last sent with (see `sidecar.engine.store_keys`). Its name is the key itself where
that is a plain file name, else a hash. Hashes have a prefix, and a caller's key of that look is hashed again, so that no key that
a caller makes up can stand for an embedding's name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable

_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,128}")
_MADE = re.compile(r"(key|bounded|content|keyed)-[0-9a-f]{64}")


def name_of_key(key: str) -> str:
    """The key itself where it is a plain file name, else its hash."""
    if _PLAIN.fullmatch(key) and not key.startswith(".") and not _MADE.fullmatch(key):
        return key
    return "key-" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def name_of_bounded(key: str, min_pixels: int, max_pixels: int) -> str:
    """For a key whose item has bounds of its own, which give the same content another embedding."""
    return "bounded-" + hashlib.sha256(json.dumps([key, min_pixels, max_pixels]).encode()).hexdigest()


def name_of_content(*parts: bytes) -> str:
    """For an item without a key: of all that shapes its embedding, in parts, so that nothing large needs to be copied."""
    return "content-" + _digest(parts)


def name_of_keyed(key_name: str, *parts: bytes) -> str:
    """For an item with a key, whose own name (`name_of_key`, `name_of_bounded`) is `key_name`, and with content."""
    return "keyed-" + _digest((key_name.encode(), *parts))


def name_to_fetch(key: str) -> str:
    """The name that a key or a name stands for."""
    return key if _MADE.fullmatch(key) else name_of_key(key)


def _digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of the parts and where each ends. It has to resist forgery: whoever sends pictures may choose every byte."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
