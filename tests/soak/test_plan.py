"""The planner tells beforehand what the load tool then gets.

The sidecars are real, but for runs that sleep: what they cost does not change while others use the machine. bench/plan.py does
the same with real runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

# Not for CI: what it compares is times, and a machine that others use has others from one minute to the next.
pytestmark = pytest.mark.slow

SIZE = "112x112,224x224:2,336x336"
TURN_S, MEASURE_S = 15.0, 4.0
# What is promised, where nothing else runs, is 0.2.
NEAR = 0.25


@pytest.fixture
def begin(toy_artifact: Path, tmp_path: Path) -> Iterator[Callable[[float, float], SlowSidecar]]:
    """begin(fixed_ms, patch_ms): a sidecar whose runs take so long."""
    sidecars: list[SlowSidecar] = []

    def started(fixed_ms: float, patch_ms: float) -> SlowSidecar:
        directory = tmp_path / f"{len(sidecars)}"
        sidecars.append(start(toy_artifact, directory, fixed_ms, patch_ms, "--precision", "f32"))
        return sidecars[-1]

    yield started
    for sidecar in sidecars:
        sidecar.end()


def test_one_sidecar_under_three_loads(begin: Callable[[float, float], SlowSidecar], tmp_path: Path) -> None:
    against = Against(begin(40.0, 0.1).address, SIZE, tmp_path)  # a fixed cost that is worth sharing
    print(f"\n{HEADING}")
    for load in (0.3, 0.6, 0.85):
        compared = against.compare(load, 1, TURN_S, MEASURE_S, seed=1)
        print(compared.line())
        for percent in (50, 95):
            assert compared.around_ms[percent] == pytest.approx(compared.measured_ms[percent], rel=NEAR), compared


def test_two_unequal_sidecars_behind_one_client(begin: Callable[[float, float], SlowSidecar], tmp_path: Path) -> None:
    sidecars = begin(1.0, 0.2), begin(2.0, 0.8)
    fast, slow = (costs_of(Against(one.address, SIZE, tmp_path).measured(MEASURE_S), one.device)[0] for one in sidecars)
    fleet = Fleet(gpus=1, cpus=1, gpu=fast, cpu=slow, cold=True)
    rate = 0.5 * capacity_per_s(generated(2000, parse_sizes(SIZE), 0, rate_per_s=1.0), fleet)
    both, record = f"ipv4:{sidecars[0].address},{sidecars[1].address}", tmp_path / "both.jsonl"
    Against(both, SIZE, tmp_path).send(record, rate, 2 * TURN_S, seed=2)
    answered, simulated = answers_of(record), simulate(recorded(record), fleet)
    share = sum(sidecars[1].device in answer.lane for answer in answered) / len(answered)
    predicted_share = simulated.items[CPU] / (simulated.items[CPU] + simulated.items[GPU])
    measured_ms, predicted_ms = (
        [percentile(values, percent) for percent in (50, 95)]
        for values in ([answer.latency_ms for answer in answered], simulated.latencies_ms)
    )
    print(f"\nthe slower's share {share:.1%}, predicted {predicted_share:.1%}; p50 and p95 in ms ", end="")
    print(
        f"{measured_ms[0]:.0f} and {measured_ms[1]:.0f}, predicted {predicted_ms[0]:.0f} and {predicted_ms[1]:.0f}",
        end="",
    )
    assert predicted_share == pytest.approx(share, abs=0.05)
    assert predicted_ms[0] == pytest.approx(measured_ms[0], rel=NEAR)
