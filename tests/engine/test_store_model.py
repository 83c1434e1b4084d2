"""The store against a plain model of it: whatever is done in whatever order, both hold the same and it adds up."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from contextlib import ExitStack

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from stores import LANE, description, holds, shared_memory, taken_bytes

from sidecar.engine.store import Draft, Entry, Lease, Store
from sidecar.engine.store_directory import StoreDirectory
from sidecar.store_file import file_bytes

LEASE_S = 10.0
ONE = file_bytes(description())
NAMES = st.sampled_from("abcd")


class StoreMachine(RuleBasedStateMachine):
    """The model: entries in the order of their use, and when each of their leases ends. All entries are of one size."""

    leases = Bundle("leases")
    drafts = Bundle("drafts")

    @initialize(room=st.integers(0, 3))
    def begin(self, room: int) -> None:
        self.undone = ExitStack()
        self.now, self.room, self.value, self.fingerprint = 0.0, room, 0, "model-0"
        place = self.undone.enter_context(shared_memory())
        self.store = Store(
            StoreDirectory(place / "store"), room * ONE + ONE // 2, LEASE_S, self.fingerprint, lambda: self.now
        )
        self.entries: OrderedDict[str, tuple[Entry, int]] = OrderedDict()
        self.held: dict[str, tuple[Entry, float]] = {}
        self.drafted = 0

    def leased(self, entry: Entry) -> bool:
        return any(entry is held for held, _ in self.held.values())

    def settle(self) -> None:
        """What time ends, and what then goes with another model."""
        self.held = {id: (entry, ends) for id, (entry, ends) in self.held.items() if ends > self.now}
        for name, (entry, _) in list(self.entries.items()):
            if entry.description.fingerprint != self.fingerprint and not self.leased(entry):
                del self.entries[name]

    def make_room(self, name: str) -> bool:
        if name in self.entries or not self.room:
            return False
        while len(self.entries) + self.drafted >= self.room:
            oldest = next((name for name, (entry, _) in self.entries.items() if not self.leased(entry)), None)
            if oldest is None:
                return False
            del self.entries[oldest]
        return True

    @rule(target=drafts, name=NAMES)
    def write(self, name: str) -> tuple[Draft, str, int, bool]:
        self.settle()
        self.value += 1
        draft = self.store.write(name, description(fingerprint=self.fingerprint))
        draft.rows[:] = self.value
        kept = self.make_room(name)
        self.drafted += kept
        return draft, name, self.value, kept

    @rule(name=NAMES)
    def keep(self, name: str) -> None:
        self.end_draft(self.write(name), True)

    @rule(draft=drafts, publish=st.booleans())
    def end_draft(self, draft: tuple[Draft, str, int, bool], publish: bool) -> None:
        made, name, value, kept = draft
        if kept and made._into is not None:
            self.drafted -= 1
            fits = name not in self.entries and made._into[2].fingerprint == self.fingerprint
        else:
            fits = False
        if not publish:
            made.discard()
            return
        entry = made.publish(LANE)
        assert (entry is not None) == fits
        if entry is not None:
            self.entries[name] = (entry, value)
        assert (made.rows == value).all()

    @rule(target=leases, name=NAMES)
    def lease(self, name: str) -> object:
        self.settle()
        entry = self.store.find(name, self.fingerprint)
        known = self.entries.get(name)
        assert (entry is None) == (known is None or known[0].description.fingerprint != self.fingerprint)
        if entry is None or known is None:
            return multiple()
        assert entry is known[0]
        assert holds(self.store, entry, known[1])
        self.entries.move_to_end(name)
        lease = self.store.lease(entry)
        assert lease is not None
        self.held[lease.id] = (entry, self.now + LEASE_S)
        return lease

    @rule(lease=leases)
    def release(self, lease: Lease) -> None:
        self.settle()
        assert self.store.release([lease.id]) == (lease.id in self.held)
        self.held.pop(lease.id, None)
        self.settle()

    @rule(seconds=st.sampled_from([1.0, 4.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=NAMES)
    def somebody_deletes(self, name: str) -> None:
        if self.value % 4:  # seldom, too
            return
        self.settle()
        self.store.leased()
        shutil.rmtree(self.store.directory / name, ignore_errors=True)
        if name in self.entries:
            entry, _ = self.entries.pop(name)
            assert self.store.lease(entry) is None

    @rule(number=st.sampled_from([None, None, None, 0, 1]))
    def turn_over(self, number: int | None) -> None:
        if number is None:  # seldom, or nothing would ever be found
            return
        self.settle()
        self.store.leased()
        self.fingerprint = f"model-{number}"
        self.store.turn_over(self.fingerprint)
        self.settle()

    @invariant()
    def it_adds_up(self) -> None:
        self.settle()
        status = self.store.status()
        assert list(self.store._entries) == list(self.entries)
        assert status.entries == len(self.entries)
        assert status.leases == len(self.held)
        assert status.used_bytes == (len(self.entries) + self.drafted) * ONE <= status.capacity_bytes
        assert taken_bytes(self.store.directory) <= status.used_bytes
        on_disk = {path.name for path in self.store.directory.iterdir() if not path.name.startswith(".")}
        assert on_disk == set(self.entries)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.undone.close()


TestWhateverIsDone = StoreMachine.TestCase
TestWhateverIsDone.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
