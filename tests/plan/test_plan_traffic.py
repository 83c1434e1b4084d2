"""What arrives when."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sidecar.load.pictures import Size
from sidecar.plan.costs import Picture
from sidecar.plan.traffic import TrafficError, generated, picture_of, recorded

SMALL, LARGE = Size(448, 448), Size(896, 896)
ALIKE = {SMALL: 1.0}


def test_arrivals_are_at_random_with_the_rate_asked_for() -> None:
    traffic = generated(20_000, {SMALL: 3.0, LARGE: 1.0}, seed=1, rate_per_s=50.0)
    gaps = np.diff([arrival.at_ms for arrival in traffic.arrivals])
    assert traffic.rate_per_s == pytest.approx(50.0, rel=0.03)
    assert gaps.mean() == pytest.approx(20.0, rel=0.03) and gaps.std() == pytest.approx(20.0, rel=0.05)
    large = sum(arrival.picture.patches == 4096 for arrival in traffic.arrivals)
    assert large / 20_000 == pytest.approx(0.25, abs=0.02)


def test_one_seed_is_one_traffic() -> None:
    first, again, other = (generated(100, ALIKE, seed, rate_per_s=5.0).arrivals for seed in (1, 1, 2))
    assert first == again != other


def test_bursts_come_at_once_and_beside_a_rate() -> None:
    bursts = generated(40, ALIKE, 0, burst=20, every_s=3.0)
    assert [arrival.at_ms for arrival in bursts.arrivals] == [0.0] * 20 + [3000.0] * 20
    both = generated(1000, ALIKE, 0, rate_per_s=10.0, burst=20, every_s=2.0)
    assert both.requests == 1000 and both.rate_per_s == pytest.approx(20.0, rel=0.1)
    assert sorted(arrival.at_ms for arrival in both.arrivals) == [arrival.at_ms for arrival in both.arrivals]


def test_pictures_of_a_request_come_together() -> None:
    traffic = generated(10, ALIKE, 0, rate_per_s=1.0, items_per_request=3)
    assert len(traffic.arrivals) == 30 and traffic.requests == 10
    assert all(len({a.at_ms for a in traffic.arrivals if a.request == number}) == 1 for number in range(10))


def test_sizes_become_what_the_model_makes_of_them() -> None:
    assert picture_of(SMALL) == Picture(1024, 448 * 448)
    assert picture_of(Size(8000, 4000)).patches <= 1280 * 4  # resized to the model's bound, and decoded in full
    assert picture_of(Size(8000, 4000)).pixels == 32_000_000
    with pytest.raises(TrafficError, match="aspect ratio"):
        picture_of(Size(30, 10_000))


def test_nothing_that_arrives_is_told() -> None:
    with pytest.raises(TrafficError, match="nothing arrives"):
        generated(10, ALIKE, 0)


def test_a_trace_is_csv(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("time_s, width, height, patches, request\n12.5,448,448,,b\n10.0,,,64,a\n12.5,896,896,999,b\n")
    traffic = recorded(trace)
    assert traffic.arrivals == [
        (0.0, 0, Picture(64, 64 * 196)),
        (2500.0, 1, Picture(1024, 448 * 448)),
        (2500.0, 1, Picture(999, 896 * 896)),
    ]


def test_a_trace_is_lines_of_json_without_what_needed_no_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"time_s": 1, "patches": 64}\n\n{"time_s": 2, "patches": 64, "cached": true}\n'
        '{"time_s": 3, "patches": 64, "cached": false, "outcome": "refused"}\n'
        '{"time_s": 4, "patches": 64, "outcome": "cancelled"}\n'
    )
    traffic = recorded(trace)
    assert [arrival.at_ms for arrival in traffic.arrivals] == [0.0, 2000.0]
    assert traffic.requests == traffic.skipped == 2


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("t.csv", "time_s,patches\n1,64\n2,none\n", "t.csv, line 3: "),
        (
            "t.csv",
            "time_s,patches\n1,64\n2,-4\n",
            "t.csv, line 3: patches must be at least 1 and below 2147483648, got -4",
        ),
        ("t.csv", "when,patches\n1,64\n", "line 2: time_s is missing"),
        ("t.csv", "time_s,width,height\n1,448,\n", "line 2: give patches, or width and height"),
        ("t.csv", "time_s,width,height\n1,448,1\n", "line 2: a picture of 448×1 pixels has an aspect ratio"),
        ("t.jsonl", '{"time_s": "nan", "patches": 1}\n', "line 1: time_s must be a number of seconds, got nan"),
        ("t.jsonl", '{"time_s": 1, "patches": 64}\nnothing\n', "t.jsonl, line 2: no JSON"),
        ("t.jsonl", '{"time_s": 1, "patches": Infinity}\n', "line 1: "),
        ("t.jsonl", '{"time_s": 1, "patches": 1e300}\n', "line 1: patches must be at least 1 and below"),
        ("t.jsonl", '{"time_s": -1e308, "patches": 1}\n', "line 1: time_s must be a number of seconds"),
        ("t.jsonl", '{"time_s": 1' + "0" * 400 + ', "patches": 1}\n', "line 1: "),
        ("t.jsonl", "[" * 100_000, "line 1: no JSON"),
        ("t.jsonl", "[1, 2]\n", "line 1: must be an object with time_s"),
        ("t.jsonl", '{"time_s": 1, "patches": 64}\n', "two items at least, got 1"),
        ("t.jsonl", "", "two items at least, got 0"),
    ],
)
def test_a_bad_line_is_told_with_its_number(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(TrafficError) as caught:
        recorded(tmp_path / name)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_binary_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TrafficError, match="neither lines of JSON nor CSV"):
        recorded(tmp_path / "t.csv")


def test_twice_as_fast_is_the_same_in_half_the_time() -> None:
    traffic = generated(100, ALIKE, 0, rate_per_s=10.0, items_per_request=2)
    fast = traffic.at_speed(2.0, most=51)
    assert fast.rate_per_s == pytest.approx(20.0, rel=0.5)
    assert [arrival.at_ms * 2 for arrival in fast.arrivals] == [arrival.at_ms for arrival in traffic.arrivals[:50]]
