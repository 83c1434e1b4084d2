"""The circuit breaker: longer pauses after each failure, one attempt after each pause."""

from __future__ import annotations

from itertools import pairwise

from sidecar.engine.circuit_breaker import FIRST_PAUSE_S, LONGEST_PAUSE_S, CircuitBreaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_opens_for_longer_and_longer_up_to_a_limit() -> None:
    clock = Clock()
    breaker = CircuitBreaker(clock)
    pauses = []
    for _ in range(10):
        pauses.append(breaker.trip())
        assert breaker.is_open and breaker.retry_in_s == pauses[-1]
        clock.now += pauses[-1]
    assert pauses[0] == FIRST_PAUSE_S and pauses[-1] == LONGEST_PAUSE_S
    assert all(later == min(2 * earlier, LONGEST_PAUSE_S) for earlier, later in pairwise(pauses))


def test_of_several_threads_one_makes_the_attempt() -> None:
    clock = Clock()
    breaker = CircuitBreaker(clock)
    assert not breaker.take_attempt()  # closed: there is nothing to try
    breaker.trip()
    assert not breaker.take_attempt()
    clock.now += FIRST_PAUSE_S
    assert [breaker.take_attempt(), breaker.take_attempt()] == [True, False]
    assert breaker.is_open


def test_a_success_closes_it_and_the_pauses_begin_anew() -> None:
    clock = Clock()
    breaker = CircuitBreaker(clock)
    breaker.trip()
    breaker.trip()
    breaker.reset()
    assert (breaker.is_open, breaker.retry_in_s) == (False, 0.0)
    assert breaker.trip() == FIRST_PAUSE_S
