"""What encoding costs in a sidecar that runs now: by sending it pictures, from a record of such, or from its status page.

Pictures are sent one at a time, which tells what each size costs, and then several at once, which tells what runs cost that are
shared. How a run was shared is nowhere in an answer, but the items of one have its time in common, to the last digit.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from sidecar.client import AsyncEncoderClient, Embedding
from sidecar.engine.cost import NOTHING
from sidecar.load.pictures import PatchRules, Plate, Size, plate
from sidecar.plan.costs import Costs, CostsError, Line, Picture, Run, Samples, spread
from sidecar.plan.traffic import rows

# Beside the sizes that are asked about: without small ones nothing tells a run's fixed part from the rest.
_SMALL = (Size(112, 112), Size(224, 224))
_TOGETHER = 8
_LEAST_ROUNDS = 2
_ALONE_SHARE = 0.75  # of the time
_NEAR = 64  # answers of one run have no more of others between them
_MANY = 5  # that have waited, and none shared a run: it does not pay
_INFO_TIMEOUT_S, _TIMEOUT_S = 10.0, 300.0


class Answer(NamedTuple):
    """Of one picture. `stages_ms` as the server measured them, by name; `latency_ms` as the caller did."""

    lane: str
    picture: Picture
    stages_ms: Mapping[str, float]
    latency_ms: float


async def measure(client: AsyncEncoderClient, where: str, sizes: Iterable[Size], seconds: float) -> list[Costs]:
    """Of each kind of lane, in about so many seconds, or as long as two pictures of each size take.

    Raises:
        EncodeError: if the sidecar cannot be asked.
        CostsError: if it encoded none.
        GridError: if its model takes no picture of one of the sizes.
    """
    found = costs_of(await answers(client, sizes, seconds), where)
    # Lanes of one kind cannot be told apart in an answer. Together they are as one lane of so many streams.
    alike = Counter(_name(lane) for lane in (await client.info(_INFO_TIMEOUT_S)).lanes)
    return [replace(costs, streams=max(1, alike[costs.name])) for costs in found]


async def answers(client: AsyncEncoderClient, sizes: Iterable[Size], seconds: float) -> list[Answer]:
    """Raises as `measure`."""
    rules = PatchRules.of(await client.info(_INFO_TIMEOUT_S))
    every = sorted({*sizes, *_SMALL}, key=lambda size: size.width * size.height)
    # Other pictures than the last time's, which may be in the sidecar's store.
    seed = secrets.randbelow(1 << 31)
    for size in every:
        rules.resized(size)
    plates = [(size, plate(size, "jpeg", rules, seed)) for size in every]
    numbers = itertools.count()
    await _round(client, plates, numbers, 1)  # the first at a size sets things up
    alone = await _rounds(client, plates, numbers, 1, seconds * _ALONE_SHARE)
    return alone + await _rounds(client, plates[: len(_SMALL) + 1], numbers, _TOGETHER, seconds * (1 - _ALONE_SHARE))


def answers_of(record: Path) -> list[Answer]:
    """Of a file that `load --record` wrote.

    Raises:
        CostsError: if it is none.
        TrafficError, OSError: if it cannot be read.
    """
    found = []
    for number, line in rows(record):
        if line.get("outcome") != "answered" or line.get("cached") or line.get("coalesced"):
            continue
        try:
            picture = Picture(line["patches"], line["width"] * line["height"])
            found.append(Answer(line["lane"], picture, line["stages"], line["latency_ms"]))
        except (KeyError, TypeError) as error:
            raise CostsError(f"{record}, line {number}: not of a record that `load --record` wrote") from error
    return found


def costs_of(answers: Iterable[Answer], where: str) -> list[Costs]:
    """Of each lane, the one with the most runs first.

    Raises:
        CostsError: if there are no answers.
    """
    answers = list(answers)
    lanes: dict[str, Samples] = defaultdict(Samples)
    waited: Counter[str] = Counter()  # behind others that could have shared a run with them
    shared: set[str] = set()  # lanes on which any did
    for answer in answers:
        stages, samples = answer.stages_ms, lanes[answer.lane]
        waited[answer.lane] += stages["queue"] > 2 * stages["run"]
        samples.prepare.append((answer.picture, stages["decode"] + stages["preprocess"]))
        samples.publish.append((answer.picture, stages["publish"]))
        samples.overhead.append((answer.picture, max(0.0, answer.latency_ms - sum(stages.values()))))
    for run in runs_of(answers):
        work = sum((answer.picture.work for answer in run), NOTHING)
        lanes[run[0].lane].run.append((work, run[0].stages_ms["run"]))
        if len(run) > 1:
            shared.add(run[0].lane)
    for lane, samples in lanes.items():
        samples.unshared = lane not in shared and waited[lane] >= _MANY
    if not lanes:
        raise CostsError(f"{where}: nothing was encoded, so nothing is known of its cost")
    by_runs = sorted(lanes.items(), key=lambda lane: -len(lane[1].run))
    return [samples.costs(lane, f"{where}, {len(samples.run)} runs of {lane}") for lane, samples in by_runs]


def runs_of(answers: Iterable[Answer]) -> list[list[Answer]]:
    """Answers by the run that they came of, which are near each other."""
    runs: list[list[Answer]] = []
    latest: dict[tuple[str, float], tuple[int, list[Answer]]] = {}
    for number, answer in enumerate(answers):
        key = answer.lane, answer.stages_ms["run"]
        last, run = latest.get(key, (-_NEAR, []))
        if number - last >= _NEAR:  # another run that happened to take as long
            run = []
            runs.append(run)
        run.append(answer)
        latest[key] = number, run
    return runs


def costs_in(status: Mapping[str, Any], where: str) -> list[Costs]:
    """Of each kind of lane, from a status page's JSON: the curve that the lane itself goes by, and the last minute's medians,
    spread evenly over the patches of the items so far. How long the call itself takes is not in it.

    Raises:
        CostsError: if it is none, or the sidecar has encoded nothing yet.
    """
    try:
        stages, lanes = status["stages"], status["engine"]["lanes"]
        found: dict[str, Costs] = {}
        for costs in (_lane_costs(lane, stages, where) for lane in lanes if lane["items"]):
            before = found.get(costs.name)
            found[costs.name] = replace(before, streams=before.streams + costs.streams) if before else costs
        if not found:
            raise KeyError("items")
        return list(found.values())
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CostsError(
            f"{where}: no status page of a sidecar that has encoded something in the last minute"
        ) from error


def _lane_costs(lane: Mapping[str, Any], stages: Mapping[str, Mapping[str, float]], where: str) -> Costs:
    name = f"{lane['runtime']}/{lane['device']}/{lane['precision']}"
    run = Run(**{part: lane["cost"][part] for part in Run.__slots__})
    mean_patches = lane["patches"] / lane["items"]

    def part(*names: str) -> Line:
        return Line(per_patch_ms=sum(stages[name]["p50_ms"] for name in names if name in stages) / mean_patches)

    # Of a shared run only the patches are known, not what they were squared.
    certain = lane["runs"] == lane["items"] or run.per_pair_ms == 0
    ratios = [(patches, ms / run.ms(patches, patches**2)) for patches, ms in lane["cost"]["samples"]] if certain else []
    return Costs(
        name=name,
        source=f"{where}, {lane['runs']} runs of {name}",
        run=run,
        streams=lane["streams"],
        spread=spread(ratios),
        prepare=part("decode", "preprocess"),
        publish=part("publish"),
    )


async def _rounds(
    client: AsyncEncoderClient,
    plates: Sequence[tuple[Size, Plate]],
    numbers: Iterable[int],
    together: int,
    seconds: float,
) -> list[Answer]:
    """For so long, but a few at least where pictures are sent alone and one where they are not."""
    ends = time.monotonic() + seconds
    found: list[Answer] = []
    left = _LEAST_ROUNDS if together == 1 else 1
    while left > 0 or time.monotonic() < ends:
        found += await _round(client, plates, numbers, together)
        left -= 1
    return found


async def _round(
    client: AsyncEncoderClient, plates: Sequence[tuple[Size, Plate]], numbers: Iterable[int], together: int
) -> list[Answer]:
    """So many of each size at once, one size after another."""
    found = []
    for size, one in plates:
        items = [one.item(number) for number in itertools.islice(numbers, together)]
        asked = time.monotonic()
        async with aclosing(client.encode_stream(items, _TIMEOUT_S)) as results:
            async for _, result in results:
                if isinstance(result, Embedding) and not result.cached:
                    found.append(_answer(result, size, (time.monotonic() - asked) * 1e3))
    return found


def _answer(embedding: Embedding, size: Size, latency_ms: float) -> Answer:
    lane = embedding.lane
    stages_ms = {name.removesuffix("_ms"): value for name, value in asdict(embedding.times).items()}
    picture = Picture(embedding.grid.patches, size.width * size.height)
    return Answer(_name(lane) if lane else "?", picture, stages_ms, latency_ms)


def _name(lane: Any) -> str:
    return f"{lane.runtime}/{lane.device}/{lane.precision}"
