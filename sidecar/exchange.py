"""One call of `Encode` or `Fetch` from the client's side, without the calling: what to do with each part, and what follows.

Embeddings may be left in the server's store. Those that this process can read are mapped, and their leases given back unless they
are to be held. The others are fetched by a second call.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sidecar.items import Item
from sidecar.pb import encoder_pb2
from sidecar.replies import Elsewhere, Embedding, Replies, Result


class Exchange:
    """Fed with parts by `accept`, and with the end of each stream by `finish`; `to_release` is for when all is over."""

    def __init__(
        self,
        items: Sequence[Item],
        max_embedding_bytes: int,
        store: Path | None,
        *,
        hold: bool,
        timeout_s: float | None,
    ) -> None:
        self._replies = Replies(items, max_embedding_bytes=max_embedding_bytes, store=store)
        self._max_embedding_bytes = max_embedding_bytes
        self._hold = hold
        self._ends = None if timeout_s is None else time.monotonic() + timeout_s
        self._unheld: list[str] = []
        self._elsewhere: list[tuple[int, Elsewhere]] = []
        self._fetching: list[tuple[int, Elsewhere]] | None = None

    @property
    def timeout_s(self) -> float | None:
        """What is left of it."""
        return None if self._ends is None else max(0.001, self._ends - time.monotonic())

    def accept(self, response: encoder_pb2.EncodeResponse) -> tuple[int, Result] | None:
        """Take one part; return (index, result) if an item now has what the caller is to get.

        Raises:
            ProtocolError: if the part breaks the contract.
        """
        done = self._replies.accept(response)
        if done is None:
            return None
        index, result = done
        if isinstance(result, Elsewhere):
            self._elsewhere.append((index, result))
            self._unheld.append(result.lease)
            return None
        if self._fetching is not None:
            index, wanted = self._fetching[index]
            if isinstance(result, Embedding):
                result = replace(result, key=wanted.key)
        elif isinstance(result, Embedding) and result.lease and not self._hold:
            self._unheld.append(result.lease)
            result = replace(result, lease="")
        return index, result

    def finish(self) -> encoder_pb2.FetchRequest | None:
        """The stream has ended well. Returns what is to be fetched now, if anything is.

        Raises:
            ProtocolError: if an item was left unanswered.
        """
        self._replies.finish()
        if self._fetching is not None or not self._elsewhere:
            return None
        self._fetching = self._elsewhere
        names = [wanted.name for _, wanted in self._fetching]
        self._replies = Replies([Item(key=name) for name in names], max_embedding_bytes=self._max_embedding_bytes)
        return encoder_pb2.FetchRequest(keys=names)

    def to_release(self) -> encoder_pb2.ReleaseRequest | None:
        """The leases that nobody needs any more, if there are any."""
        return encoder_pb2.ReleaseRequest(leases=self._unheld) if self._unheld else None
