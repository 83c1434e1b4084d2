"""What a caller's key stands for while it comes alone: the embedding of the content that it was last sent with.

An entry's own name says of which content it is, so whoever sends content needs nothing of this. It is for those who ask by key:
`Fetch`, items without content, and vLLM's ECExampleConnector, which reads `<store>/<key>/encoder_cache.safetensors`.

Where a key was used for two contents, the later one counts, at once and as a whole. The exception: a lease on the earlier one may
mean that a reader has been sent there by the key, and that reader must not find another picture. Then the key stands for nothing
until it is used again after those leases have ended. To find nothing is an error that is seen; a wrong picture is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sidecar.engine.store_directory import StoreDirectory

if TYPE_CHECKING:
    from sidecar.engine.store import Entry


@dataclass(slots=True)
class _Key:
    """`entry`: what it stands for, if anything; `leased`: what it has stood for, or would, were it not for another's lease."""

    entry: Entry | None = None
    leased: list[Entry] = field(default_factory=list)


class StoreKeys:
    """Keys by name, each also as a link in the store's directory. To be used under the store's lock."""

    def __init__(self, directory: StoreDirectory) -> None:
        self._directory = directory
        self._keys: dict[str, _Key] = {}

    def find(self, key: str) -> Entry | None:
        known = self._keys.get(key)
        return None if known is None else known.entry

    def use(self, key: str, name: str, entry: Entry | None) -> None:
        """A key has been sent with content.

        Args:
            key: the key's own name.
            name: of the key and content.
            entry: the embedding; None if the store does not have it.

        Raises:
            OSError: if the key could not be linked: readers of the directory do not find it, `find` does.
        """
        known = self._keys.get(key)
        if known is not None and known.entry is not None and known.entry.name == name and entry in (None, known.entry):
            return
        known = known or _Key()
        before = [*known.leased, *([known.entry] if known.entry else [])]
        others = [each for each in before if each is not entry and each.leases]
        contested = any(each.name != name for each in others)
        known.entry = None if contested else entry
        known.leased = [*others, entry] if contested and entry is not None else others
        if known.entry is None:
            self._directory.unlink(key)
            self._keep(key, known)
            return
        self._keys[key] = known
        try:
            self._directory.link(key, name)
        except OSError:
            self._directory.unlink(key)
            raise

    def forget(self, key: str, entry: Entry) -> None:
        """An entry goes. To be called while it is still there, so that no link ever leads nowhere."""
        known = self._keys.get(key)
        if known is None:
            return
        if known.entry is entry:
            self._directory.unlink(key)
            known.entry = None
        known.leased = [each for each in known.leased if each is not entry]
        self._keep(key, known)

    def _keep(self, key: str, known: _Key) -> None:
        if known.entry is None and not known.leased:
            self._keys.pop(key, None)
        else:
            self._keys[key] = known
