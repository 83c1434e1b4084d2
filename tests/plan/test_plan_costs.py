"""What encoding costs: given, kept in a file, measured already, or found in answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sidecar.plan.costs import Costs, CostsError, Line, Picture, Run, given, load, measured, parse, save
from sidecar.plan.measure import Answer, answers_of, costs_in, costs_of

ROOT = Path(__file__).parents[2]
RUN = Run(fixed_ms=5.0, per_patch_ms=0.02, per_pair_ms=1e-6)


def answer(patches: int, run_ms: float, queue_ms: float = 0.0, publish_ms: float = 0.5) -> Answer:
    """Of a picture with 200 pixels a patch, which takes 0.01 ms a patch to prepare, and 3 ms for the call."""
    picture = Picture(patches, 200 * patches)
    stages = {"decode": 0.004 * patches, "preprocess": 0.006 * patches, "queue": queue_ms, "run": run_ms}
    return Answer(
        "openvino/CPU/f32", picture, {**stages, "publish": publish_ms}, sum(stages.values()) + publish_ms + 3.0
    )


def test_numbers_are_a_curve() -> None:
    assert given("2.5,0.004").run == Run(fixed_ms=2.5, per_patch_ms=0.004)
    assert given("2.5,.004,1e-6").run == Run(fixed_ms=2.5, per_patch_ms=0.004, per_pair_ms=1e-6)


@pytest.mark.parametrize("text", ["2.5", "a,b", "1,2,3,4", "-1,2", "127.0.0.1:50051", "costs.json", ""])
def test_what_is_no_list_of_numbers_is_something_else(text: str) -> None:
    assert given(text) is None


@pytest.mark.parametrize("text", ["0,0", "0,0,0", "1,1e400"])
def test_a_run_costs_something_and_ends(text: str) -> None:
    with pytest.raises(CostsError, match="above 0"):
        given(text)


def test_a_file_holds_what_was_saved(tmp_path: Path) -> None:
    costs = Costs(
        name="cpu",
        source="here",
        run=RUN,
        streams=2,
        spread={1024: [0.9, 1.1]},
        prepare=Line(per_megapixel_ms=3.0),
        overhead=Line(fixed_ms=1.0),
    )
    save(tmp_path / "costs.json", [costs])
    assert load(tmp_path / "costs.json") == [costs]
    assert costs.unmeasured == ["publish"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not a file of costs"),
        ("[]", "not a file of costs"),
        ('{"costs": []}', "no costs in it"),
        ('{"costs": [{"name": "x"}]}', "not a file of costs"),
        (
            '{"costs": [{"name": "x", "source": "y", "run": {"fixed_ms": -1}}]}',
            "fixed_ms must be at least 0 and below a day, got -1",
        ),
        (
            '{"costs": [{"name": "x", "source": "y", "run": {"fixed_ms": "1"}}]}',
            "fixed_ms must be at least 0 and below a day, got '1'",
        ),
        ('{"costs": [{"name": "x", "source": "y", "run": {"fixed_ms": 1e-310}}]}', "a run must cost something"),
        ('{"costs": [{"name": 3, "source": "y", "run": {"fixed_ms": 1}}]}', "name and source must be texts"),
        ('{"costs": [{"name": "x", "source": "y", "samples": [[1e308, 1]]}]}', "not a file of costs"),
        ('{"costs": [{"name": "x", "source": "y", "samples": [[0, 1], [100, 0]]}]}', "not a file of costs"),
        ("[" * 100_000, "not a file of costs"),
        ('{"costs": [{"name": "x", "source": "y", "run": {"fixed": 1}}]}', "not a file of costs"),
        (
            '{"costs": [{"name": "x", "source": "y", "run": {"fixed_ms": 1}, "streams": 0}]}',
            "streams must be 1 to 1024, got 0",
        ),
        ('{"costs": [{"name": "x", "source": "y", "run": {"fixed_ms": 1}, "spread": {"9": [0]}}]}', "ratios above 0"),
    ],
)
def test_a_file_that_is_none_is_told_with_its_name(text: str, told: str) -> None:
    with pytest.raises(CostsError, match=told) as caught:
        parse(text, "some.json")
    assert str(caught.value).startswith("some.json: ") and "\n" not in str(caught.value)


def test_what_was_measured_already_says_where_and_is_what_was_measured() -> None:
    entries = json.loads((ROOT / "sidecar" / "plan" / "measured.json").read_text())["costs"]
    known = measured()
    assert set(known) == {entry["name"] for entry in entries}
    for entry in entries:
        document, _, rest = entry["source"].partition(": ")
        assert (ROOT / document).is_file() and rest, entry["source"]
        for patches, ms in entry.get("samples", ()):
            assert f"{ms}" in (ROOT / document).read_text()
            assert known[entry["name"]].run.ms(patches, patches**2) == pytest.approx(ms, rel=0.2)


def test_costs_are_found_in_answers() -> None:
    sizes = (64, 256, 1024, 4096)
    (costs,) = costs_of([answer(n, RUN.ms(n, n**2) * (1 + 1e-6 * i)) for n in sizes for i in range(5)], "there")
    assert costs.run.ms(2304, 2304**2) == pytest.approx(RUN.ms(2304, 2304**2), rel=0.01)
    assert costs.run.fixed_ms == pytest.approx(5.0, rel=0.01)
    assert costs.prepare.ms(Picture(1024, 200 * 1024)) == pytest.approx(10.24, rel=0.01)
    assert costs.overhead.ms(Picture(1024, 1)) == pytest.approx(3.0, rel=0.01)
    assert costs.alone_ms(Picture(1024, 204800)) == pytest.approx(RUN.ms(1024, 1024**2) + 10.24 + 3.5, rel=0.01)
    assert set(costs.spread) == set(sizes)


def test_answers_with_one_run_time_are_one_run() -> None:
    shared = [[answer(64, RUN.ms(8 * 64, 8 * 64**2) + 1e-6 * i)] * 8 for i in range(3)]
    alone = [answer(n, RUN.ms(n, n**2)) for n in (64, 256, 1024, 4096)]
    (costs,) = costs_of([*alone, *(one for run in shared for one in run)], "there")
    assert costs.run.ms(512, 8 * 64**2) == pytest.approx(RUN.ms(512, 8 * 64**2), rel=0.01)
    assert len(costs.spread[512]) == 3


def test_where_items_waited_and_none_shared_a_run_sharing_does_not_pay() -> None:
    sizes = (1000, 1010)  # too much alike to tell fixed from growing
    waiting = [answer(n, 100.0 + n / 1e5 + i * 1e-3, queue_ms=500.0) for n in sizes for i in range(9)]
    (costs,) = costs_of(waiting, "there")
    two = costs.run.ms(2000, 2 * 1000**2)
    assert costs.run.fixed_ms <= 0.1 * two
    mean = sum(costs.spread[1000]) / len(costs.spread[1000])
    assert costs.run.ms(1000, 1000**2) * mean == pytest.approx(100.0, rel=0.01)  # and a run takes what it took


def test_a_status_page_tells_a_lane_curve() -> None:
    (costs,) = costs_in(status(), "http://there")
    assert costs.run == RUN
    assert costs.prepare.ms(Picture(1000, 1)) == pytest.approx(8.0)
    assert costs.unmeasured == ["overhead"]
    assert costs.spread[500] == [pytest.approx(20.0 / RUN.ms(500, 500**2), abs=1e-3)]


@pytest.mark.parametrize("broken", [{}, {"engine": None, "stages": {}}, {"engine": {"lanes": [{}]}, "stages": {}}])
def test_what_is_no_status_page_is_told(broken: dict[str, Any]) -> None:
    with pytest.raises(CostsError, match="http://there: no status page of a sidecar that has encoded something"):
        costs_in(broken, "http://there")


def test_a_sidecar_that_has_encoded_nothing_knows_no_costs() -> None:
    idle = status()
    idle["engine"]["lanes"][0] |= {"items": 0, "patches": 0, "runs": 0}
    with pytest.raises(CostsError, match="encoded something"):
        costs_in(idle, "http://there")


def test_a_trace_that_load_did_not_record_tells_no_costs(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"time_s": 1, "outcome": "answered"}\n')
    with pytest.raises(CostsError, match="line 1: not of a record"):
        answers_of(trace)


def status() -> dict[str, Any]:
    cost = {"fixed_ms": 5.0, "per_patch_ms": 0.02, "per_pair_ms": 1e-6, "samples": [[500, 20.0]]}
    lane = {"runtime": "openvino", "device": "CPU", "precision": "f32", "streams": 1, "cost": cost}
    stages = {"decode": {"p50_ms": 3.0}, "preprocess": {"p50_ms": 5.0}, "publish": {"p50_ms": 0.1}}
    return {"engine": {"lanes": [{**lane, "items": 4, "runs": 4, "patches": 4000}]}, "stages": stages}
