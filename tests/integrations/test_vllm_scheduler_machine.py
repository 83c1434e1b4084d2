"""The scheduler half through any course of events: requests, fetches, steps, evictions, aborts and preemptions."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from scheduler_fakes import LARGE, SMALL, TOKEN_BYTES, Half, Picture, Request, request

from sidecar.integrations.vllm.files import LocalFile


@dataclass
class Step:
    """Loads of a step that workers have not run yet, and who was prefilled in it up to where."""

    loads: dict[str, LocalFile]
    prefilled: list[tuple[Request, int]] = field(default_factory=list)


KEYS = "abcde"
CAPACITY = 3
AHEAD_BYTES = 3 * TOKEN_BYTES


class Scheduler(RuleBasedStateMachine):
    """vLLM's scheduler as far as it touches the half (vllm/v1/core/sched/scheduler.py, encoder_cache_manager.py), async
    scheduling included: steps run later than they are scheduled. A token of the prompt is a token of an embedding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.half = Half(local=True, ahead=AHEAD_BYTES)
        self.sidecars = self.half.sidecars
        self.requests: list[Request] = []
        self.steps: deque[Step] = deque()
        self.number = 0
        # Identifier → requests that refer to it; the oldest without any goes first.
        self.cache: OrderedDict[str, set[str]] = OrderedDict()
        self.rows: dict[str, int] = {}
        # Requests that vLLM itself fails: their uuid is in its cache with another number of rows.
        self.mismatched: set[str] = set()
        self.evicted: list[str] = []
        self.reported: list[str] = []

    @rule(
        pictures=st.lists(
            st.builds(
                Picture,
                st.sampled_from(KEYS),
                st.sampled_from([SMALL, SMALL, SMALL, LARGE]),
                brings=st.sampled_from(["pixels", "pixels", "pixels", "nothing", "embeds"]),
            ),
            min_size=1,
            max_size=3,
        )
    )
    def arrives(self, pictures: list[Picture]) -> None:
        self.number += 1
        self.requests.append(request(f"r{self.number}", *pictures))

    @precondition(lambda self: self.sidecars.under_way)
    @rule(data=st.data(), well=st.booleans())
    def a_fetch_ends(self, data: st.DataObject, well: bool) -> None:
        fetch = data.draw(st.sampled_from(self.sidecars.under_way))
        self.sidecars.succeed(fetch) if well else self.sidecars.fail(fetch)

    @rule(most_tokens=st.integers(1, 4))
    def a_step_is_scheduled(self, most_tokens: int) -> None:
        step = Step({})
        for each in self.requests:
            if each.computed >= each.length:
                continue
            if not self.half.ensure_cache_available(each, each.computed):
                continue
            each.running = True
            end = self._schedule_items(each, min(each.length, each.computed + most_tokens))
            if end > each.computed:
                step.prefilled.append((each, end))
                each.computed = end
        freed = [key for key in self.evicted if key not in self.cache]
        self.evicted = []
        step.loads = self.half.take_loads(freed)
        self.steps.append(step)

    def _schedule_items(self, each: Request, end: int) -> int:
        """Make room for what lies between `computed` and `end`; returns how far there was room."""
        for index, feature in enumerate(each.mm_features):
            key, place = feature.identifier, feature.mm_position
            if not each.computed < place.offset + place.length or not place.offset < end:
                continue
            if key in self.cache:
                if self.rows[key] != place.length:
                    self.mismatched.add(each.request_id)
                    return place.offset
                self.cache[key].add(each.request_id)
                continue
            if len(self.cache) == CAPACITY:
                free = next((old for old, users in self.cache.items() if not users), None)
                if free is None:
                    return place.offset
                del self.cache[free]
                self.evicted.append(free)
            own = self.half._requests[each.request_id].own
            promised = self.half.has_cache_item(key)
            assert promised or index in own, f"{key} of {each.request_id} was to be there and is not"
            self.cache[key], self.rows[key] = {each.request_id}, place.length
            self.half.update_state_after_alloc(each, index)
            if promised:
                assert self.half._loads[key].description.tokens == place.length, f"{key} has rows of another picture"
        return end

    @precondition(lambda self: self.steps)
    @rule()
    def a_step_runs(self) -> None:
        step = self.steps.popleft()
        for file in step.loads.values():
            assert file.name in self.sidecars.files, f"{file.name} was removed before its step ran"
        for each, end in step.prefilled:
            if each not in self.requests or end > each.computed:
                continue
            for index, feature in enumerate(each.mm_features):
                if feature.mm_position.offset + feature.mm_position.length <= end:
                    self._free(each, index)
            if end == each.length and each.computed == end:
                self._finish(each)
        self.half.step_has_run()
        unavailable = self.half.take_unavailable_requests()
        self.reported += unavailable
        failed, self.mismatched = unavailable | self.mismatched, set()
        for each in [each for each in self.requests if each.request_id in failed]:
            self._finish(each)

    def _free(self, each: Request, index: int) -> None:
        users = self.cache.get(each.mm_features[index].identifier)
        if users is None or each.request_id not in users:
            return
        users.discard(each.request_id)
        self.half.update_state_after_free(each, index)

    def _finish(self, each: Request) -> None:
        self.requests.remove(each)
        self.half.request_finished(each)
        self._forget(each)

    def _forget(self, each: Request) -> None:
        for users in self.cache.values():
            users.discard(each.request_id)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def a_client_goes(self, data: st.DataObject) -> None:
        self._finish(data.draw(st.sampled_from(self.requests)))

    @precondition(lambda self: any(each.running for each in self.requests))
    @rule(data=st.data())
    def a_request_is_preempted(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from([each for each in self.requests if each.running]))
        each.running, each.computed = False, 0
        self._forget(each)

    @invariant()
    def nobody_is_reported_twice(self) -> None:
        assert len(self.reported) == len(set(self.reported))

    @invariant()
    def what_is_ahead_stays_within_the_bound(self) -> None:
        admitted = [known for known in self.half._requests.values() if known.admitted]
        assert self.half._admitted_bytes == sum(known.nbytes for known in admitted)
        assert len(admitted) < 2 or self.half._admitted_bytes <= AHEAD_BYTES

    @invariant()
    def nobody_is_asked_for_twice_at_once(self) -> None:
        keys = [fetch.wanted.key for fetch in self.sidecars.under_way]
        assert len(keys) == len(set(keys))

    def teardown(self) -> None:
        """When all is over, nothing is left."""
        for each in list(self.requests):
            self._finish(each)
        self.steps.append(Step(self.half.take_loads([*self.evicted, *self.cache])))
        while self.steps:
            self.a_step_runs()
        assert self.sidecars.under_way == []
        assert self.sidecars.files == set()
        assert self.half._admitted_bytes == 0
        assert self.half._entries == {} and self.half._requests == {} and not self.half._leaving


class TowerlessScheduler(Scheduler):
    def __init__(self) -> None:
        super().__init__()
        self.half = Half(local=False, ahead=AHEAD_BYTES)
        self.sidecars = self.half.sidecars


_settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestWithATower = Scheduler.TestCase
TestWithATower.settings = _settings
TestTowerless = TowerlessScheduler.TestCase
TestTowerless.settings = _settings
