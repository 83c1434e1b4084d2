"""A fleet in virtual time does as queueing theory and the real one do."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import pytest

from sidecar.load.pictures import Size
from sidecar.load.tally import percentile
from sidecar.plan.costs import Costs, Line, Picture, Run
from sidecar.plan.sidecar import Limits
from sidecar.plan.simulation import CPU, GPU, Fleet, Simulated, simulate
from sidecar.plan.traffic import Arrival, Traffic, generated

PICTURE = Picture(1024, 448 * 448)
SIZES = {Size(448, 448): 1.0}


def costs(fixed_ms: float, patch_ms: float, **others: Any) -> Costs:
    return Costs(name="some", source="", run=Run(fixed_ms=fixed_ms, per_patch_ms=patch_ms), **others)


def fleet(cpu: Costs, **others: Any) -> Fleet:
    return Fleet(**{"gpus": 0, "cpus": 1, "gpu": None, "cpu": cpu, **others})


def at(*times_ms: float, request: int | None = None) -> Traffic:
    arrivals = [
        Arrival(at_ms, number if request is None else request, PICTURE) for number, at_ms in enumerate(times_ms)
    ]
    return Traffic(arrivals, "")


def p95(simulated: Simulated) -> float:
    return percentile(simulated.latencies_ms, 95)


def test_alone_a_picture_takes_what_its_parts_take() -> None:
    around = {"prepare": Line(per_megapixel_ms=10.0), "publish": Line(fixed_ms=0.5), "overhead": Line(fixed_ms=2.0)}
    one = costs(3.0, 0.01, **around)
    assert simulate(at(0.0, 1000.0), fleet(one)).latencies_ms == [pytest.approx(one.alone_ms(PICTURE))] * 2


@pytest.mark.parametrize("load", [0.3, 0.6, 0.85])
def test_the_mean_wait_is_what_pollaczek_and_khinchine_say(load: float) -> None:
    service_ms = 10.24
    traffic = generated(60_000, SIZES, 3, rate_per_s=load / service_ms * 1e3)
    wait_ms = statistics.fmean(simulate(traffic, fleet(costs(0.0, 0.01))).latencies_ms) - service_ms
    assert wait_ms == pytest.approx(load * service_ms / (2 * (1 - load)), rel=0.1)


def test_runs_scatter_as_they_were_measured_to() -> None:
    scattered = costs(0.0, 0.01, spread={1024: [0.5, 1.5] * 5, 9999: [7.0]})
    latencies = simulate(at(*(1000.0 * number for number in range(200))), fleet(scattered)).latencies_ms
    assert {round(ms, 6) for ms in latencies} == {5.12, 15.36}
    assert 0.35 < sum(ms < 10 for ms in latencies) / 200 < 0.65


def test_one_slow_run_does_not_stand_for_its_size() -> None:
    lone = costs(0.0, 0.01, spread={1024: [9.0], 1000: [1.0] * 19})
    latencies = simulate(at(*(1000.0 * number for number in range(200))), fleet(lone)).latencies_ms
    assert sum(ms > 90 for ms in latencies) < 30


def test_a_request_ends_with_its_slowest_picture() -> None:
    simulated = simulate(at(0.0, 0.0, 0.0, request=7), fleet(costs(0.0, 0.01)))
    assert simulated.latencies_ms == [pytest.approx(30.72)]
    assert simulated.item_latencies_ms == [pytest.approx(ms) for ms in (10.24, 20.48, 30.72)]


def test_pictures_share_a_run_while_its_fixed_part_is_worth_it() -> None:
    dear = simulate(at(*[0.0] * 9), fleet(costs(100.0, 0.001)))  # the first is run alone, and the others together
    assert dear.item_latencies_ms == [pytest.approx(101.024)] + [pytest.approx(101.024 + 108.192)] * 8
    cheap = simulate(at(*[0.0] * 9), fleet(costs(1.0, 0.1)))
    assert cheap.item_latencies_ms[-1] == pytest.approx(9 * 103.4)
    bounded = simulate(at(*[0.0] * 9), fleet(costs(100.0, 0.001), limits=Limits(batch_patches=2048)))
    assert bounded.item_latencies_ms[-1] == pytest.approx(101.024 + 4 * 102.048)


def test_streams_run_side_by_side() -> None:
    assert simulate(at(0.0, 0.0), fleet(costs(0.0, 0.01, streams=2))).latencies_ms == [pytest.approx(10.24)] * 2


def test_few_preprocessing_threads_hold_a_fast_lane_up() -> None:
    decoding = costs(0.0, 0.001, prepare=Line(fixed_ms=50.0))
    times = [simulate(at(*[0.0] * 8), fleet(decoding, limits=Limits(preprocess_threads=n))) for n in (1, 2, 8)]
    assert [max(one.latencies_ms) for one in times] == [pytest.approx(ms, abs=10) for ms in (400, 200, 50)]


def test_what_does_not_fit_is_refused_or_taken_by_another() -> None:
    small = Limits(max_queue_items=2)
    one = simulate(at(*[0.0] * 8), fleet(costs(0.0, 0.01), limits=small))
    assert one.refused == 6 / 8 and len(one.latencies_ms) == 2
    three = simulate(at(*[0.0] * 8), fleet(costs(0.0, 0.01), cpus=3, limits=small))
    assert three.refused == 2 / 8
    by_patches = simulate(at(*[0.0] * 8), fleet(costs(0.0, 0.01), limits=Limits(max_queue_patches=3072)))
    assert by_patches.refused == 5 / 8


def test_what_cannot_be_done_in_time_is_refused() -> None:
    patient, hasty = (simulate(at(*[0.0] * 10), fleet(costs(0.0, 0.01), timeout_s=s)) for s in (60.0, 0.05))
    assert patient.refused == 0
    assert 0.4 <= hasty.refused < 0.8 and max(hasty.latencies_ms) <= 50.0


def test_sidecars_are_weighed_by_their_rates() -> None:
    uneven = Fleet(gpus=1, cpus=2, gpu=costs(0.0, 0.001), cpu=costs(0.0, 0.01))
    simulated = simulate(generated(20_000, SIZES, 1, rate_per_s=600.0), uneven)
    assert simulated.items[GPU] / 20_000 == pytest.approx(1 / 1.2, rel=0.02)
    assert simulated.utilisation[GPU] == pytest.approx(simulated.utilisation[CPU], rel=0.05)


def test_callers_who_have_just_connected_weigh_all_alike_for_two_seconds() -> None:
    uneven = Fleet(gpus=1, cpus=1, gpu=costs(0.0, 0.001), cpu=costs(0.0, 0.004), cold=True)
    traffic = generated(200, SIZES, 1, rate_per_s=100.0)
    simulated = simulate(traffic, uneven)
    assert simulated.items[CPU] == pytest.approx(100, abs=20)
    assert simulate(traffic, replace(uneven, cold=False)).items[CPU] == pytest.approx(40, abs=10)


def test_lanes_of_one_sidecar_take_what_they_finish_soonest() -> None:
    fast, slow = costs(0.0, 0.001), costs(0.0, 0.05)
    beside = Fleet(gpus=1, cpus=1, gpu=fast, cpu=slow, joined=True)
    calm = simulate(generated(5000, SIZES, 1, rate_per_s=200.0), beside)
    assert calm.items[CPU] == 0  # it would always be later
    busy = generated(5000, SIZES, 1, rate_per_s=950.0)
    assert simulate(busy, beside).items[CPU] > 0
    assert p95(simulate(busy, beside)) <= p95(simulate(busy, replace(beside, cpus=0)))


def test_apart_a_slow_sidecar_costs_latency_that_a_lane_does_not() -> None:
    fast, slow = costs(0.0, 0.001), costs(0.0, 0.01)
    traffic = generated(5000, SIZES, 1, rate_per_s=300.0)
    alone, apart, joined = (
        simulate(traffic, Fleet(gpus=1, cpus=cpus, gpu=fast, cpu=slow, joined=lanes))
        for cpus, lanes in ((0, False), (1, False), (1, True))
    )
    assert p95(apart) > p95(alone) * 1.5
    assert p95(joined) <= p95(alone) * 1.02


def test_one_seed_is_one_outcome() -> None:
    scattered = fleet(costs(0.0, 0.01, spread={1024: [0.5, 1.0, 1.5]}), cpus=2)
    traffic = generated(500, SIZES, 1, rate_per_s=100.0)
    first, again, other = (simulate(traffic, scattered, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.latencies_ms != other.latencies_ms
