"""The queue between clients: in order for each, fair between them, and no way to the front by leaving or by asking for more."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sidecar.engine.fair_queue import FairQueue

CLIENTS = st.sampled_from("abcd")
COSTS = st.integers(1, 100)
# Pushes (client, cost), and pops in between (None).
STEPS = st.lists(st.one_of(st.tuples(CLIENTS, COSTS), st.none()), max_size=80)

Item = tuple[str, int, int]  # client, number, cost


def play(queue: FairQueue[Item], steps: list[tuple[str, int] | None]) -> tuple[list[Item], list[Item]]:
    """What was pushed and what was popped."""
    pushed: list[Item] = []
    popped: list[Item] = []
    for number, step in enumerate(steps):
        if step is not None:
            client, cost = step
            pushed.append((client, number, cost))
            queue.push(client, pushed[-1], cost)
        elif (item := queue.pop()) is not None:
            popped.append(item)
    return pushed, popped


def fill(queue: FairQueue[Any], **items: int) -> None:
    """So many items of cost 1 for each client."""
    for client, count in items.items():
        for number in range(count):
            queue.push(client, (client, number), 1)


def turns(queue: FairQueue[Any], most: int = 10_000) -> list[str]:
    """The clients of the next items."""
    return [item[0] for _ in range(most) if (item := queue.pop()) is not None]


@given(st.lists(st.one_of(st.tuples(CLIENTS, COSTS), st.none(), st.integers(0, 80)), max_size=80))
def test_everything_pushed_is_popped_once_or_removed_and_each_clients_items_in_their_order(
    steps: list[tuple[str, int] | int | None],
) -> None:
    queue: FairQueue[Item] = FairQueue()
    pushed: list[Item] = []
    popped: list[Item] = []
    for number, step in enumerate(steps):
        if isinstance(step, tuple):
            pushed.append((step[0], number, step[1]))
            queue.push(step[0], pushed[-1], step[1])
        elif step is None:
            popped += [item] if (item := queue.pop()) else []
        elif pushed:
            unwanted = pushed[step % len(pushed)]
            assert queue.remove(unwanted[0], unwanted) == (unwanted not in popped)
            if unwanted not in popped:
                pushed.remove(unwanted)
        left = set(pushed) - set(popped)
        assert (len(queue), queue.clients) == (len(left), len({client for client, _, _ in left}))
    popped += queue.clear()
    assert sorted(popped) == sorted(pushed)
    for client in "abcd":
        assert [item for item in popped if item[0] == client] == [item for item in pushed if item[0] == client]
    assert (len(queue), queue.clients, queue.pop()) == (0, 0, None)


@given(st.dictionaries(CLIENTS, st.integers(1, 30), min_size=1))
def test_nobody_gets_more_than_one_item_ahead_of_another_that_waits(waiting: dict[str, int]) -> None:
    queue: FairQueue[Any] = FairQueue()
    fill(queue, **waiting)
    had: Counter[str] = Counter()
    for client in turns(queue):
        for other, left in waiting.items():
            if had[other] < left:
                assert had[client] <= had[other] or client == other
        had[client] += 1
    assert had == waiting


@given(STEPS)
def test_two_that_both_wait_differ_by_no_more_than_an_item_of_each(steps: list[tuple[str, int] | None]) -> None:
    """The bound of start-time fair queueing, over every stretch of time in which both have something waiting."""
    queue: FairQueue[Item] = FairQueue()
    waiting: Counter[str] = Counter()
    # What the one has had more than the other, at its most over a stretch in which both were waiting.
    ahead: dict[tuple[str, str], int] = {}
    dearest = dict.fromkeys("abcd", 0)
    for number, step in enumerate([*steps, *[None] * len(steps)]):
        if step is not None:
            client, cost = step
            queue.push(client, (client, number, cost), cost)
            waiting[client] += 1
            dearest[client] = max(dearest[client], cost)
            continue
        if (item := queue.pop()) is None:
            break
        client, _, cost = item
        for other in "abcd":
            if other == client:
                continue
            if waiting[other] and waiting[client]:
                lead = max(0, ahead.get((client, other), 0)) + cost
                ahead[client, other] = lead
                ahead[other, client] = max(0, ahead.get((other, client), 0) - cost)
                assert lead <= dearest[client] + dearest[other]
        waiting[client] -= 1
        if not waiting[client]:
            ahead = {pair: lead for pair, lead in ahead.items() if client not in pair}


@given(crowd=st.integers(1, 1000), served=st.integers(0, 20), cost=COSTS, mine=COSTS)
def test_a_thousand_items_of_one_delay_anothers_single_one_by_no_more_than_one(
    crowd: int, served: int, cost: int, mine: int
) -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(crowd):
        queue.push("crowd", "theirs", cost)
    for _ in range(min(served, crowd)):
        queue.pop()
    queue.push("somebody", "mine", mine)
    assert "mine" in (queue.pop(), queue.pop())


def test_who_asks_for_dearer_items_gets_fewer() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(50):
        queue.push("dear", "d", 10)
    for _ in range(500):
        queue.push("cheap", "c", 1)
    first = Counter(queue.pop() for _ in range(110))
    assert first == {"c": 100, "d": 10}


def test_idling_saves_nothing_up() -> None:
    queue: FairQueue[Any] = FairQueue()
    fill(queue, busy=1000, idle=1)
    turns(queue, 500)
    fill(queue, idle=1000)
    assert Counter(turns(queue, 100)) == {"busy": 50, "idle": 50}


def test_leaving_and_coming_back_is_no_way_to_the_front() -> None:
    """One keeps its items in line, the other has a single one there and pushes the next when it has had its turn."""
    queue: FairQueue[Any] = FairQueue()
    fill(queue, stays=100, comes=1)
    had: Counter[str] = Counter()
    for _ in range(100):
        (client,) = turns(queue, 1)
        had[client] += 1
        if client == "comes":
            fill(queue, comes=1)
    assert 45 <= had["comes"] <= 50
    # And for whoever has had more than its share in one go.
    queue = FairQueue()
    queue.push("greedy", "g", 100)
    fill(queue, patient=200)
    assert queue.pop() == "g"
    queue.push("greedy", "g", 100)
    assert [queue.pop() for _ in range(100)] == [("patient", number) for number in range(100)]
    assert "g" in (queue.pop(), queue.pop())


@given(st.integers(1, 20))
def test_removing_and_pushing_again_is_no_way_to_the_front(times: int) -> None:
    queue: FairQueue[Any] = FairQueue()
    mine = object()
    queue.push("crowd", ("crowd", 0), 1)
    queue.push("somebody", mine, 1)
    fill(queue, crowd=5)
    assert queue.pop() == ("crowd", 0)
    assert queue.pop() is mine
    for _ in range(times):
        queue.push("somebody", mine, 1)
        assert queue.remove("somebody", mine)
    queue.push("somebody", mine, 1)
    assert queue.pop() == ("crowd", 0)


def test_what_is_removed_has_no_turn_and_costs_nothing() -> None:
    queue: FairQueue[Any] = FairQueue()
    items = [["x"], ["x"], ["x"]]  # equal, and told apart all the same
    for item in items:
        queue.push("a", item, 5)
    assert queue.remove("a", items[1])
    assert not queue.remove("a", items[1])
    assert not queue.remove("b", items[0])
    assert (len(queue), queue.clients) == (2, 1)
    assert queue.ahead_of("a", 1) == 10
    assert queue.pop() is items[0]
    assert queue.remove("a", items[2])
    assert (len(queue), queue.clients, queue.pop()) == (0, 0, None)


def test_an_item_that_does_not_fit_keeps_its_turn() -> None:
    queue: FairQueue[int] = FairQueue()
    for client, item in (("a", 9), ("b", 1), ("a", 2)):
        queue.push(client, item, 1)
    assert queue.pop(lambda item: item < 5) is None
    assert len(queue) == 3
    assert [queue.pop(), queue.pop(), queue.pop()] == [9, 1, 2]


@given(STEPS, CLIENTS, COSTS)
def test_what_is_ahead_is_never_less_than_ones_own_nor_more_than_all(
    steps: list[tuple[str, int] | None], client: str, cost: int
) -> None:
    queue: FairQueue[Item] = FairQueue()
    pushed, popped = play(queue, steps)
    left = set(pushed) - set(popped)
    own = sum(cost for name, _, cost in left if name == client)
    assert own <= queue.ahead_of(client, cost) <= sum(cost for _, _, cost in left)


@given(st.dictionaries(CLIENTS, st.integers(1, 30)))
def test_what_is_ahead_comes_true_among_equals(waiting: dict[str, int]) -> None:
    queue: FairQueue[Any] = FairQueue()
    fill(queue, **waiting)
    expected = queue.ahead_of("late", 1)
    queue.push("late", "mine", 1)
    before = 0
    while queue.pop() != "mine":
        before += 1
    assert before == expected


@given(STEPS)
def test_who_has_gone_is_forgotten_once_the_queue_is_empty(steps: list[tuple[str, int] | None]) -> None:
    queue: FairQueue[Item] = FairQueue()
    play(queue, steps)
    queue.clear()
    assert not queue._ahead and not queue._clients
