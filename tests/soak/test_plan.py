"""The planner tells beforehand what the load tool then gets.

The sidecars are real, but for runs that sleep: what they cost does not change while others use the machine. bench/plan.py does
the same with real runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from slow_sidecar import SlowSidecar, start

from bench.plan import HEADING, Against
from sidecar.load.mix import parse_sizes
from sidecar.load.tally import percentile
from sidecar.plan.answer import capacity_per_s
from sidecar.plan.measure import answers_of, costs_of
from sidecar.plan.simulation import CPU, GPU, Fleet, simulate
from sidecar.plan.traffic import generated, recorded

pytestmark = pytest.mark.soak

SIZE = "112x112,224x224:2,336x336"
TURN_S, MEASURE_S = 15.0, 4.0
# What is promised, where nothing else runs, is 0.2.
NEAR = 0.25


@pytest.fixture
def slow(toy_artifact: Path, tmp_path: Path) -> Iterator[list[SlowSidecar]]:
    """A slow one and one five times as slow, whose fixed cost is worth sharing."""
    sidecars = [
        start(toy_artifact, tmp_path / f"{number}", fixed_ms, patch_ms, "--precision", "f32")
        for number, (fixed_ms, patch_ms) in enumerate(((40.0, 0.1), (200.0, 0.5)))
    ]
    yield sidecars
    for sidecar in sidecars:
        sidecar.end()


def test_one_sidecar_under_three_loads(slow: list[SlowSidecar], tmp_path: Path) -> None:
    against = Against(slow[0].address, SIZE, tmp_path)
    print(f"\n{HEADING}")
    for load in (0.3, 0.6, 0.85):
        compared = against.compare(load, 1, TURN_S, MEASURE_S, seed=1)
        print(compared.line())
        for percent in (50, 95):
            assert compared.around_ms[percent] == pytest.approx(compared.measured_ms[percent], rel=NEAR), compared


def test_two_unequal_sidecars_behind_one_client(slow: list[SlowSidecar], tmp_path: Path) -> None:
    fast, slower = (
        costs_of(Against(sidecar.address, SIZE, tmp_path).measured(MEASURE_S), sidecar.device)[0] for sidecar in slow
    )
    fleet = Fleet(gpus=1, cpus=1, gpu=fast, cpu=slower)
    rate = 0.6 * capacity_per_s(generated(2000, parse_sizes(SIZE), 0, rate_per_s=1.0), fleet)
    both, record = f"ipv4:{slow[0].address},{slow[1].address}", tmp_path / "both.jsonl"
    Against(both, SIZE, tmp_path).send(record, rate, 2 * TURN_S, seed=2)
    answered, simulated = answers_of(record), simulate(recorded(record), fleet)
    share = sum(slow[1].device in answer.lane for answer in answered) / len(answered)
    predicted_share = simulated.items[CPU] / (simulated.items[CPU] + simulated.items[GPU])
    print(f"\nshare of the slower {share:.1%}, predicted {predicted_share:.1%}", end="")
    assert predicted_share == pytest.approx(share, abs=0.06)
    for percent in (50, 95):
        measured = percentile([answer.latency_ms for answer in answered], percent)
        predicted = percentile(simulated.latencies_ms, percent)
        print(f", p{percent} {measured:.0f} ms, predicted {predicted:.0f} ms", end="")
        assert predicted == pytest.approx(measured, rel=NEAR)
