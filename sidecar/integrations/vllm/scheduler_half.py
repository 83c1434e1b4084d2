"""The connector's half in vLLM's scheduler: which request waits for which embedding, and which file is needed until when.

vLLM's scheduler polls `ensure_cache_available` at every step; nothing here waits. A file is needed

- while a request is to be prefilled with it,
- while vLLM's encoder cache holds the embedding: it may be evicted between the moment a request was told that all is ready and
  the moment its items are scheduled, and must then be loaded again,
- until every step that was scheduled with it has run, for the workers read it in theirs.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from sidecar.integrations.vllm.features import UnsupportedFeatureError, Wanted, has_pixels, wanted_of
from sidecar.integrations.vllm.fetcher import Fetch
from sidecar.integrations.vllm.files import LocalFile
from sidecar.integrations.vllm.tally import Tally
from sidecar.vision.spec import TowerSpec

logger = logging.getLogger("vllm." + __name__)

# Until the first embedding has come, one is counted in bfloat16, which artifacts give unless told otherwise.
_VALUE_BYTES = 2
_SAY_EVERY_S = 1.0
_NAMED_TWICE = "its uuid was given to another picture before"


class Obtains(Protocol):
    """What starts and ends fetches."""

    def start(self, wanted: Wanted) -> Fetch: ...
    def cancel(self, fetch: Fetch) -> None: ...


class Removes(Protocol):
    """What removes files."""

    def remove(self, name: str) -> None: ...


@dataclass(slots=True)
class _Entry:
    fetch: Fetch
    users: set[str] = field(default_factory=set)
    cached_by_vllm: bool = False


@dataclass(slots=True)
class _Request:
    """What is known of a request: `own` are the indices of items that sidecars are not asked for (any more)."""

    wanted: dict[int, Wanted] = field(default_factory=dict)
    own: set[int] = field(default_factory=set)
    to_prefill: set[int] = field(default_factory=set)
    nbytes: int = 0
    admitted: bool = False
    failed: bool = False


class SchedulerHalf:
    """One thread's, vLLM's scheduler's."""

    def __init__(
        self,
        fetcher: Obtains,
        files: Removes,
        tally: Tally,
        tower: TowerSpec,
        *,
        encodes_locally: bool,
        ahead_bytes: int,
        cached_tokens: int = 1 << 17,
    ) -> None:
        """
        Args:
            encodes_locally: whether vLLM's own tower takes what sidecars could not give.
            ahead_bytes: most that embeddings of waiting requests may take; one request always may.
            cached_tokens: more than vLLM's encoder cache ever holds.
        """
        self._fetcher, self._files, self._tally, self._tower = fetcher, files, tally, tower
        self._encodes_locally = encodes_locally
        self._ahead_bytes = ahead_bytes
        self._cached_tokens = cached_tokens
        self._value_bytes = _VALUE_BYTES
        self._entries: dict[str, _Entry] = {}
        self._cached: dict[str, int] = {}
        self._requests: dict[str, _Request] = {}
        self._admitted_bytes = 0
        self._unavailable: set[str] = set()
        self._loads: dict[str, LocalFile] = {}
        self._scheduled = 0
        self._run = 0
        self._leaving: deque[tuple[int, str]] = deque()
        self._said, self._unsaid = -math.inf, 0

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        """Whether every embedding that the request still needs is at hand. Asks for those that are not."""
        known = self._requests.get(request.request_id)
        if known is None:
            known = self._requests[request.request_id] = _Request()
        if len(known.wanted) + len(known.own) < len(request.mm_features):  # a session's later parts add some
            self._know(request, known)
        if known.failed:  # vLLM takes notice of it after the step
            return False
        to_prefill = [
            index
            for index, feature in enumerate(request.mm_features)
            if feature.mm_position.offset + feature.mm_position.length > num_computed_tokens
        ]
        for index in known.own.intersection(to_prefill):
            if self._is_named_as_another(request.mm_features[index]):
                return self._give_up(request.request_id, known, index, _NAMED_TWICE, has_pixels=False)
        needed = [index for index in to_prefill if index not in known.own]
        if not needed:
            return True
        if not known.admitted:
            if self._admitted_bytes and self._admitted_bytes + known.nbytes > self._ahead_bytes:
                return False
            self._admit(known, needed)
        # All are asked for before any is looked at, so that they are encoded side by side.
        fetches = {index: self._fetch_of(request.request_id, known.wanted[index]) for index in needed}
        missing = [index for index in needed if not self._is_at_hand(request, known, index, fetches[index])]
        return not missing

    def has_cache_item(self, identifier: str) -> bool:
        entry = self._entries.get(identifier)
        return entry is not None and entry.fetch.file is not None

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        """vLLM has made room for the item in this step: workers are to load it, if it came from a sidecar."""
        identifier = request.mm_features[index].identifier
        entry = self._entries.get(identifier)
        if entry is not None and entry.fetch.file is not None:
            entry.cached_by_vllm = True
            self._cached[identifier] = entry.fetch.wanted.tokens
            self._loads[identifier] = entry.fetch.file

    def update_state_after_free(self, request: Any, index: int) -> None:
        """The item has been prefilled. A request that is preempted after that asks again."""
        known = self._requests.get(request.request_id)
        if known is None:
            return
        known.to_prefill.discard(index)
        if not known.to_prefill:
            self._withdraw(known)
        still = {known.wanted[other].key for other in known.to_prefill if other in known.wanted}
        if index in known.wanted and (key := known.wanted[index].key) not in still:
            self._leave(key, request.request_id)

    def request_finished(self, request: Any) -> None:
        """It was answered, failed, or was aborted by its client."""
        known = self._requests.pop(request.request_id, None)
        if known is None:
            return
        self._withdraw(known)
        for key in {wanted.key for wanted in known.wanted.values()}:
            self._leave(key, request.request_id)

    def take_loads(self, evicted: Iterable[str]) -> dict[str, LocalFile]:
        """End of a step's scheduling: what its workers are to load, by identifier.

        `evicted`: what vLLM's encoder cache has dropped since the last step.
        """
        loads, self._loads = self._loads, {}
        self._scheduled += 1
        for identifier in evicted:
            if identifier not in loads:
                self._has_been_evicted(identifier)
        # vLLM tells nobody when it resets its cache; what is in it no longer would stay here for good.
        while loads and sum(self._cached.values()) > self._cached_tokens:
            self._has_been_evicted(next(iter(self._cached)))
        return loads

    def _has_been_evicted(self, identifier: str) -> None:
        self._cached.pop(identifier, None)
        entry = self._entries.get(identifier)
        if entry is not None:
            entry.cached_by_vllm = False
            self._drop_if_unneeded(identifier, entry)

    @property
    def steps_under_way(self) -> int:
        return self._scheduled - self._run

    def step_has_run(self) -> None:
        """The oldest step that was scheduled has run on every worker."""
        self._run += 1
        self._remove_left()

    def _remove_left(self) -> None:
        while self._leaving and self._leaving[0][0] <= self._run:
            self._files.remove(self._leaving.popleft()[1])

    def take_unavailable_requests(self) -> set[str]:
        taken, self._unavailable = self._unavailable, set()
        return taken

    def _know(self, request: Any, known: _Request) -> None:
        self._withdraw(known)
        for index, feature in enumerate(request.mm_features):
            if index in known.wanted or index in known.own:
                continue
            try:
                each = wanted_of(feature, self._tower)
            except UnsupportedFeatureError as error:
                self._give_up(request.request_id, known, index, str(error), has_pixels=has_pixels(feature))
                continue
            if each is None:
                known.own.add(index)
            else:
                known.wanted[index] = each
        tokens = {each.key: each.tokens for each in known.wanted.values()}
        known.nbytes = sum(tokens.values()) * self._tower.out_hidden_size * self._value_bytes

    def _admit(self, known: _Request, needed: list[int]) -> None:
        known.admitted = True
        known.to_prefill = set(needed)
        self._admitted_bytes += known.nbytes

    def _withdraw(self, known: _Request) -> None:
        if known.admitted:
            known.admitted = False
            self._admitted_bytes -= known.nbytes

    def _fetch_of(self, request_id: str, wanted: Wanted) -> Fetch:
        entry = self._entries.get(wanted.key)
        if entry is not None and not entry.users and not self._may_answer(entry, wanted):
            entry.cached_by_vllm = False
            self._drop_if_unneeded(wanted.key, entry)
            entry = None
        if entry is None:
            entry = self._entries[wanted.key] = _Entry(self._fetcher.start(wanted))
        elif entry.fetch.failure is not None and entry.fetch.wanted.grid == wanted.grid:
            by_key_only = entry.fetch.wanted.pixels is None and wanted.pixels is not None
            if request_id not in entry.users or by_key_only:
                entry.fetch = self._fetcher.start(wanted)  # somebody else's failure is not this request's
        entry.users.add(request_id)
        return entry.fetch

    def _may_answer(self, entry: _Entry, wanted: Wanted) -> bool:
        """Whether what is kept for vLLM's encoder cache alone is of this content. vLLM may have reset that cache, which it tells
        nobody, and its caller may have given the uuid to another picture since. One of another grid is told apart elsewhere.
        """
        return entry.fetch.wanted.grid != wanted.grid or wanted.is_of(entry.fetch.wanted)

    def _is_at_hand(self, request: Any, known: _Request, index: int, fetch: Fetch) -> bool:
        if fetch.wanted.grid != known.wanted[index].grid:
            return self._give_up(request.request_id, known, index, _NAMED_TWICE, has_pixels=False)
        if fetch.failure is not None:
            sendable = known.wanted[index].pixels is not None
            return self._give_up(request.request_id, known, index, fetch.failure, has_pixels=sendable)
        if fetch.file is not None:
            self._value_bytes = fetch.file.description.dtype.storage.itemsize
        return fetch.file is not None

    def _is_named_as_another(self, feature: Any) -> bool:
        """Whether vLLM, which asks by identifier alone, would be told that an embedding of another size is at hand for it."""
        entry = self._entries.get(feature.identifier)
        return entry is not None and entry.fetch.wanted.tokens != feature.mm_position.get_num_embeds()

    def _give_up(self, request_id: str, known: _Request, index: int, reason: str, *, has_pixels: bool) -> bool:
        """Leave the item to vLLM's own tower, or fail the request; whether it can go on."""
        if has_pixels and self._encodes_locally:
            known.own.add(index)
            self._tally.given_up("encoded_locally")
            self._say(f"request {request_id}, item {index}: vLLM encodes it itself: {reason}")
            return True
        known.failed = True
        self._tally.given_up("failed")
        self._unavailable.add(request_id)
        self._say(f"request {request_id} fails for want of the embedding of its item {index}: {reason}")
        return False

    def _say(self, message: str) -> None:
        """At most once a second: a sidecar that is gone costs every request a line."""
        now = time.monotonic()
        if now - self._said < _SAY_EVERY_S:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} more since the last such line)" if self._unsaid else ""
        logger.warning("%s%s", message, more)
        self._said, self._unsaid = now, 0

    def _leave(self, key: str, request_id: str) -> None:
        entry = self._entries.get(key)
        if entry is not None and request_id in entry.users:
            entry.users.discard(request_id)
            self._drop_if_unneeded(key, entry)

    def _drop_if_unneeded(self, key: str, entry: _Entry) -> None:
        if entry.users or entry.cached_by_vllm:
            return
        del self._entries[key]
        if entry.fetch.file is not None:
            # A step that is being scheduled now counts if it is to load the file.
            last_step = self._scheduled + (key in self._loads)
            self._leaving.append((last_step, entry.fetch.file.name))
            self._remove_left()
        else:
            self._fetcher.cancel(entry.fetch)
