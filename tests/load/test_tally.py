"""Outcomes, sums and the report's words."""

from __future__ import annotations

import json

import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from hypothesis import given
from hypothesis import strategies as st
from virtual_time import embedding

from sidecar.client import ClientError, EncodeError, ItemError, ProtocolError, RequestTooLargeError
from sidecar.load.report import lines, sum_holds, summary
from sidecar.load.tally import Kind, Tally, percentile

OVERLOADED = ItemError("RESOURCE_EXHAUSTED", "the queue is full", (ErrorInfo(reason="OVERLOADED"),))


def tally_of(*errors: ItemError | ClientError) -> Tally:
    tally = Tally(began=100.0)
    for error in errors:
        tally.note_sent(1, 0.0)
        tally.note_error(error, 100.0, 100.5)
    return tally


def text(tally: Tally) -> str:
    return "\n".join(lines(summary(tally, {"concurrency": 1, "rate": None}, {"address": "here"})))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OVERLOADED, Kind.REFUSED),
        (EncodeError("RESOURCE_EXHAUSTED", "Concurrent RPC limit exceeded!"), Kind.REFUSED),
        (RequestTooLargeError("RESOURCE_EXHAUSTED", "too large"), Kind.FAILED),
        (EncodeError("UNAVAILABLE", "going", (ErrorInfo(reason="SHUTTING_DOWN"),)), Kind.REFUSED),
        (EncodeError("UNAVAILABLE", "connection reset"), Kind.FAILED),
        (ItemError("DEADLINE_EXCEEDED", "cannot", (ErrorInfo(reason="DEADLINE_CANNOT_BE_MET"),)), Kind.REFUSED),
        (EncodeError("DEADLINE_EXCEEDED", "Deadline Exceeded"), Kind.EXPIRED),
        (ItemError("INTERNAL", "broken", (ErrorInfo(reason="LANE_FAULT"),)), Kind.FAILED),
        (EncodeError("CANCELLED", "by somebody else"), Kind.FAILED),
        (ProtocolError("nonsense"), Kind.FAILED),
    ],
)
def test_each_error_is_of_one_kind(error: ItemError | ClientError, kind: Kind) -> None:
    counts = tally_of(error).counts()
    assert counts == {other: int(other is kind) for other in Kind}


def test_refusals_are_told_apart_by_code_and_reason() -> None:
    tally = tally_of(OVERLOADED, EncodeError("INTERNAL", "oh"), OVERLOADED)
    assert "2 RESOURCE_EXHAUSTED OVERLOADED, first: the queue is full" in text(tally)
    assert "1 INTERNAL, first: oh" in text(tally)


def test_a_sum_that_holds_is_shown() -> None:
    tally = tally_of(OVERLOADED)
    tally.note_sent(2, 0.0)
    tally.note_embedding(embedding(), 100.0, 100.1)
    tally.note_cancelled(100.0, 100.2)
    assert tally.missing == 0
    assert "3 = 1 + 1 + 0 + 1 + 0" in text(tally)


def test_a_lost_item_is_told_loudly() -> None:
    tally = tally_of(OVERLOADED)
    tally.note_sent(3, 0.0)
    assert not sum_holds(summary(tally, {}, {}))
    assert "SUM BROKEN" in text(tally)
    assert "3 items were LOST" in text(tally)


def test_an_item_answered_twice_is_told_loudly() -> None:
    tally = tally_of(OVERLOADED)
    tally.note_embedding(embedding(), 100.0, 100.1)
    assert "1 items were answered TWICE" in text(tally)


def test_what_came_from_the_store_is_told_apart() -> None:
    tally = Tally(began=0.0)
    for number, cached in enumerate((True, False, True)):
        tally.note_sent(1, 0.0)
        tally.note_embedding(embedding(cached=cached), 0.0, 0.001 + number)
    figures = summary(tally, {}, {})
    assert figures["from_store"] == 2
    assert figures["latency_ms"]["encoded"]["p50"] == pytest.approx(1001)
    assert figures["latency_ms"]["from_store"]["max"] == pytest.approx(2001)
    assert figures["server_ms"]["run"] == {"p50": 3.0, "p95": 3.0}
    assert figures["per_second"]["patches"] == pytest.approx(48 / 2.001, rel=1e-3)
    assert figures["per_second"]["tokens"] == pytest.approx(12 / 2.001, rel=1e-3)
    assert "3, 2 from the store" in text(tally)


def test_a_sender_that_was_late_says_so() -> None:
    tally = tally_of(OVERLOADED)
    assert "went out" not in text(tally)
    tally.note_sent(1, 400.0)
    assert "requests went out 400 ms late (p99)" in text(tally)


def test_a_run_without_anything_has_a_report() -> None:
    figures = summary(Tally(began=0.0), {}, {})
    json.dumps(figures, allow_nan=False)
    assert "0 = 0 + 0 + 0 + 0 + 0" in "\n".join(lines(figures))


@given(st.lists(st.floats(0, 1e6), min_size=1), st.integers(1, 100))
def test_a_percentile_is_a_value_that_occurred(values: list[float], percent: int) -> None:
    value = percentile(values, percent)
    assert value in values
    assert sum(other <= value for other in values) >= len(values) * percent / 100
    assert sum(other < value for other in values) < len(values) * percent / 100
