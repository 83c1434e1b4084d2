"""How many CPU sidecars, and from which rate on they help, in words, data and a picture."""

from __future__ import annotations

import json
import math
from typing import Any
from xml.etree import ElementTree

import pytest

from sidecar.load.pictures import Size
from sidecar.plan.answer import Crossover, Plan, Row, Target, capacity_per_s, plan
from sidecar.plan.costs import Costs, Run
from sidecar.plan.plot import draw
from sidecar.plan.report import answer, as_json, crossover, lines
from sidecar.plan.sidecar import Limits
from sidecar.plan.simulation import Fleet, Simulated
from sidecar.plan.traffic import Traffic, generated

GPU = Costs(name="gpu", source="made up", run=Run(per_patch_ms=0.01))  # 97.7 requests/s
CPU = Costs(name="cpu", source="made up", run=Run(per_patch_ms=0.05))  # 19.5 requests/s


def traffic(rate_per_s: float, requests: int = 3000) -> Traffic:
    return generated(requests, {Size(448, 448): 1.0}, 1, rate_per_s=rate_per_s)


def planned(rate_per_s: float, target_ms: float | None = None, *, curves: bool = False, **others: Any) -> Plan:
    fleet = Fleet(**{"gpus": 1, "cpus": 0, "gpu": GPU, "cpu": CPU, **others})
    return plan(traffic(rate_per_s), fleet, range(9), target_ms and Target(95, target_ms), curves=curves)


def test_gpus_that_are_enough_need_no_cpu() -> None:
    found = planned(50.0, 100.0)
    assert [row.cpus for row in found.rows] == [0]
    assert answer(found).startswith("none: 1 GPU alone is enough, p95 ")


def test_the_least_number_that_meets_the_target_is_chosen() -> None:
    found = planned(130.0, 400.0)
    assert found.chosen is found.rows[-1] and found.chosen.cpus >= 2
    assert [row.cpus for row in found.rows] == list(range(found.chosen.cpus + 1))
    assert not any(found.target.met(row) for row in found.rows[:-1])
    assert answer(found).startswith(f"{found.chosen.cpus} CPU sidecars beside 1 GPU: p95 ")


def test_what_cannot_be_reached_is_said_with_the_best_there_is() -> None:
    found = planned(95.0, 1.0)
    assert found.chosen is None and len(found.rows) == 9
    assert "not with up to 8 CPU sidecars beside 1 GPU: p95 within 1 ms is out of reach, and the best is" in answer(
        found
    )


def test_cpus_can_be_all_there_is() -> None:
    found = planned(40.0, 300.0, gpus=0, gpu=None)
    assert found.rows[0].cpus == 1 and found.chosen is not None and found.chosen.cpus >= 3
    assert found.crossover is None and crossover(found) == ""
    assert "beside" not in answer(found)


def test_a_request_that_is_refused_never_ends() -> None:
    row = Row.of(1, Simulated([1.0] * 93, [1.0] * 93, 0.07, {"gpu": 1.0}, {"gpu": 93}))
    assert row.latency_ms == {50: 1.0, 90: 1.0, 95: math.inf, 99: math.inf}
    assert not Target(95, 1e9).met(row) and Target(90, 1.0).met(row)


def test_all_refused_is_no_latency_at_all() -> None:
    row = Row.of(1, Simulated([], [], 1.0, {"gpu": 1.0}, {"gpu": 0}))
    assert set(row.latency_ms.values()) == {math.inf}


def test_the_crossover_is_where_the_cpu_begins_to_help() -> None:
    found = planned(70.0).crossover
    assert found.cpus == 1 and found.rate_per_s is not None
    below, above = (plan(traffic(found.rate_per_s * part, 2500), fleet(), (0, 1), None).rows for part in (0.85, 1.1))
    assert below[0].latency_ms[95] < below[1].latency_ms[95]
    assert above[0].latency_ms[95] > above[1].latency_ms[95]


def test_a_lane_beside_helps_sooner_than_a_sidecar_beside() -> None:
    apart, joined = planned(70.0).crossover, planned(70.0, joined=True).crossover
    assert joined.rate_per_s < apart.rate_per_s


def test_a_cpu_that_is_far_too_slow_never_helps() -> None:
    slow = Costs(name="cpu", source="made up", run=Run(per_patch_ms=100.0))
    found = planned(70.0, cpu=slow, joined=True)
    assert found.crossover == Crossover(1, None, pytest.approx(1.2 * 97.7, rel=0.01))
    assert crossover(found).startswith("1 CPU lane beside 1 GPU never lowers p95 at these costs, up to 117")


def test_capacity_counts_shared_runs() -> None:
    sharing = Costs(name="gpu", source="", run=Run(fixed_ms=10.0, per_patch_ms=0.001))
    alone = fleet(gpu=sharing, limits=Limits(batch_patches=0))
    assert capacity_per_s(traffic(1.0), alone) == pytest.approx(1e3 / 11.024)
    assert capacity_per_s(traffic(1.0), fleet(gpu=sharing)) == pytest.approx(8e3 / 18.192)


def test_words_and_data_say_the_same() -> None:
    found = planned(120.0, 500.0)
    text, data = "\n".join(lines(found)), json.loads(json.dumps(as_json(found), allow_nan=False))
    assert data["answer"]["sentence"] in text and data["crossover"]["sentence"] in text
    assert data["answer"]["cpus"] == found.chosen.cpus
    for row in data["rows"]:
        p95 = row["latency_ms"]["p95"]
        assert ("—" if p95 is None else f"{p95:,.1f}") in text
    assert "not measured, and counted as nothing: prepare, publish, overhead" in text


def test_overload_is_told() -> None:
    assert "overloaded: the longer, the later" in "\n".join(lines(planned(130.0)))


def test_the_picture_has_a_line_for_each_number_of_sidecars() -> None:
    found = planned(120.0, 500.0, curves=True)
    root = ElementTree.fromstring(draw(found))
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "1 GPU alone" in texts and f"1 GPU + {found.chosen.cpus} CPUs" in texts
    assert any(text.startswith("target 500 ms") for text in texts)
    assert f"{found.chosen.cpus} CPU sidecars beside 1 GPU: " in texts[1] and "beside 1 GPU lower" in texts[2]
    assert len(found.curves) >= 2 and all(len(curve.points) > 12 for curve in found.curves)
    assert not any(text.startswith("Curves:") for text in texts)


def test_the_picture_s_lines_are_of_what_table_and_crossover_say() -> None:
    found = planned(90.0, 100.0, curves=True)
    table = {row.cpus: row.latency_ms[95] for row in found.rows}
    points = {curve.cpus: dict(curve.points) for curve in found.curves}
    asked = pytest.approx(found.traffic.rate_per_s)
    assert found.crossover is not None and len(table.keys() & points.keys()) >= 2
    for cpus in table.keys() & points.keys():
        assert [ms for rate, ms in points[cpus].items() if rate == asked] == [table[cpus]]
    at = found.crossover.rate_per_s
    assert points[found.crossover.cpus][at] < points[0][at]


def test_a_picture_of_a_part_of_the_traffic_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.plan.answer.MOST_SCANNED", 1000)
    assert "Curves: the first 1,000 of 3,000 pictures; answer: all" in draw(planned(90.0, curves=True))


def fleet(**others: Any) -> Fleet:
    return Fleet(**{"gpus": 1, "cpus": 0, "gpu": GPU, "cpu": CPU, **others})
