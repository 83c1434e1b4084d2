"""The planner against reality: what it predicts for a sidecar on this machine, and what the load tool then gets from it.

    python -m bench.plan --artifact DIR [--loads 0.3 0.6 0.85] [--size 448x448:3,672x672:2,896x896:1]

A load is sent in several turns, and costs are measured before, between and after them: a shared machine is not equally fast all
the time. `load --record` keeps what it sent and when, which is then replayed: arrivals are the same, and only the model is
tested. It is asked twice: with the costs as measured around the load, and with how long runs took during it, which leaves out how
fast the machine was just then. Further flags are the server's; without any, its lane has one thread.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.server import serving
from sidecar.client import AsyncEncoderClient
from sidecar.engine.cost import NOTHING
from sidecar.load.mix import parse_sizes
from sidecar.load.tally import percentile
from sidecar.plan.answer import capacity_per_s
from sidecar.plan.costs import Costs, spread
from sidecar.plan.measure import Answer, answers, answers_of, costs_of, runs_of
from sidecar.plan.simulation import Fleet, simulate
from sidecar.plan.traffic import generated, recorded

PERCENTS = (50, 90, 95)
SEEDS = 10  # a record is short, and how long each run takes is drawn
HEADING = f"{'load':>5} {'requests':>9}" + "".join(
    f"{f'p{percent} measured':>14}{'around':>10} {'ratio':>5}{'during':>10} {'ratio':>5}" for percent in PERCENTS
)


@dataclass(frozen=True, slots=True)
class Compared:
    """One load: its part of what the lane can do, and by percentile, in ms, what was measured, what was predicted from the costs
    around it, and what with the durations during it."""

    load: float
    requests: int
    measured_ms: dict[int, float]
    around_ms: dict[int, float]
    during_ms: dict[int, float]

    def line(self) -> str:
        return f"{self.load:5.0%} {self.requests:9}" + "".join(self._cells(percent) for percent in PERCENTS)

    def _cells(self, percent: int) -> str:
        measured = self.measured_ms[percent]
        predicted = (self.around_ms[percent], self.during_ms[percent])
        return f"{measured:14.1f}" + "".join(f"{ms:10.1f} {ms / measured:5.2f}" for ms in predicted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.6, 0.85])
    parser.add_argument("--size", default="448x448:3,672x672:2,896x896:1")
    parser.add_argument("--seconds", type=float, default=12.0, help="of a load's turn")
    parser.add_argument("--turns", type=int, default=4, help="of each load")
    parser.add_argument("--measure-seconds", type=float, default=5.0, help="before, between and after the turns")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a directory for the records")
    arguments, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.keep or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        with serving(arguments.artifact, directory / "log", *(flags or ["--threads", "1"])) as server:
            against = Against(server.address, arguments.size, directory)
            print(HEADING)
            for load in arguments.loads:
                compared = against.compare(
                    load, arguments.turns, arguments.seconds, arguments.measure_seconds, arguments.seed
                )
                print(compared.line(), flush=True)


@dataclass(frozen=True, slots=True)
class Against:
    """A sidecar that runs, the sizes it is sent, and where records of it lie."""

    address: str
    size: str
    directory: Path

    def compare(self, load: float, turns: int, seconds: float, measure_seconds: float, seed: int) -> Compared:
        """A load, which is a part of what the sidecar can do, in so many turns of so many seconds."""
        around = [self.measured(measure_seconds)]
        rate = load * self.capacity(costs_of(around[0], self.address)[0])
        records = [self.directory / f"load-{load:g}-{turn}.jsonl" for turn in range(turns)]
        for turn, record in enumerate(records):
            self.send(record, rate, seconds, seed + turn)
            around.append(self.measured(measure_seconds))
        return replayed(records, around, load)

    def measured(self, seconds: float) -> list[Answer]:
        async def run() -> list[Answer]:
            async with AsyncEncoderClient(self.address) as client:
                return await answers(client, parse_sizes(self.size), seconds)

        return asyncio.run(run())

    def capacity(self, costs: Costs) -> float:
        """Requests a second."""
        traffic = generated(2000, parse_sizes(self.size), 0, rate_per_s=1.0)
        return capacity_per_s(traffic, alone(costs))

    def send(self, record: Path, rate: float, seconds: float, seed: int) -> None:
        """The load tool itself, in a process of its own."""
        command = [sys.executable, "-m", "sidecar", "load", "--server", self.address, "--size", self.size]
        command += ["--rate", str(rate), "--duration", str(seconds), "--seed", str(seed)]
        subprocess.run([*command, "--record", str(record), "--json"], check=True, stdout=subprocess.PIPE)


def alone(costs: Costs) -> Fleet:
    return Fleet(gpus=0, cpus=1, gpu=None, cpu=costs)


def replayed(records: Sequence[Path], around: Sequence[Sequence[Answer]], load: float) -> Compared:
    """The records' own latencies, and the planner's for the same arrivals. `around`: answers before, between and after them."""
    costs = costs_of([answer for some in around for answer in some], "around")[
        0
    ]  # with the curve that the lane decides by
    latencies: list[list[float]] = [[], [], []]
    for record, before, after in zip(records, around, around[1:], strict=False):
        answered = answers_of(record)
        latencies[0] += [answer.latency_ms for answer in answered]
        for values, measured in zip(latencies[1:], ([*before, *after], answered), strict=True):
            then = replace(costs_of(measured, "then")[0], run=costs.run, spread=spread_of(measured, costs))
            for seed in range(SEEDS):
                values += simulate(recorded(record), alone(then), seed).latencies_ms
    return Compared(load, len(latencies[0]), *map(_percentiles, latencies))


def spread_of(answered: Sequence[Answer], costs: Costs) -> dict[int, list[float]]:
    """What their runs took over what the curve says."""
    ratios = []
    for run in runs_of(answered):
        work = sum((answer.picture.work for answer in run), NOTHING)
        ratios.append((work.patches, run[0].stages_ms["run"] / costs.run.ms(work.patches, work.pairs)))
    return spread(ratios)


def _percentiles(values: Sequence[float]) -> dict[int, float]:
    return {percent: percentile(values, percent) for percent in PERCENTS}


if __name__ == "__main__":
    main()
