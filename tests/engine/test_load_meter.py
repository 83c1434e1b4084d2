"""How busy something was: what is said of it, by the clock alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.engine.load_meter import LoadMeter


def test_nothing_done_is_idle() -> None:
    meter = LoadMeter(100.0)
    assert [meter.busy(at) for at in (100.0, 101.0, 1e6)] == [0.0, 0.0, 0.0]


def test_work_without_a_pause_comes_to_one_and_fades_when_it_ends() -> None:
    meter = LoadMeter(0.0)
    meter.begin(0.0)
    readings = [meter.busy(float(at)) for at in range(1, 61)]
    assert readings == sorted(readings)
    assert 0.15 < readings[0] < 0.25
    assert readings[-1] == pytest.approx(1.0, abs=1e-4)
    meter.end(60.0)
    fading = [meter.busy(60.0 + at) for at in range(60)]
    assert fading == sorted(fading, reverse=True)
    assert fading[0] == readings[-1]
    assert fading[-1] < 1e-4


def test_half_of_the_time_is_a_half_and_half_of_the_places_too() -> None:
    meter = LoadMeter(0.0)
    for tenth in range(1000):
        (meter.end if tenth % 2 else meter.begin)(tenth / 10)
    assert meter.busy(100.0) == pytest.approx(0.5, abs=0.02)
    wide = LoadMeter(0.0, capacity=4)
    wide.begin(0.0)
    wide.begin(0.0)
    assert wide.busy(100.0) == pytest.approx(0.5)


@given(
    steps=st.lists(st.tuples(st.floats(-1, 20), st.integers(-1, 1)), max_size=60),
    capacity=st.integers(1, 8),
)
def test_it_is_a_share_whatever_the_clock_does(steps: list[tuple[float, int]], capacity: int) -> None:
    meter, now, working = LoadMeter(0.0, capacity), 0.0, 0
    for pause, change in steps:
        now += pause
        if change > 0 and working < capacity:
            meter.begin(now)
            working += 1
        elif change < 0 and working:
            meter.end(now)
            working -= 1
        assert 0.0 <= meter.busy(now) <= 1.0


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30))
def test_how_often_one_looks_changes_nothing(looks: list[float]) -> None:
    watched, left_alone = LoadMeter(0.0), LoadMeter(0.0)
    for meter in (watched, left_alone):
        meter.begin(0.0)
    for at in sorted(looks):
        watched.busy(at)
    assert watched.busy(100.0) == pytest.approx(left_alone.busy(100.0))
