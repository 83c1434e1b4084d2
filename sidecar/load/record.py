"""What was sent and what became of it, a line of JSON for each item in the order of arrival: for `python -m sidecar plan`, and
for whoever wants to look closer than at percentiles.

    time_s       when it arrived, since the run began
    request      the request's number; items of one have the same
    width, height, patches      of the picture as sent, and of what the model makes of it
    outcome      answered, refused, expired, cancelled, failed
    latency_ms   from its arrival to its end

and of one that was answered: `cached`, `coalesced`, the `lane`, and its `stages` by name, in milliseconds as the server measured
them. Items that shared a run have the same `run`, to the last digit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from sidecar.load.mix import Mix
from sidecar.load.pictures import PatchRules, Size
from sidecar.load.tally import Kind, Outcome, Tally
from sidecar.vision.grid import GridError
from sidecar.vision.pixels import PixelError


def write_record(target: Path, tally: Tally, mix: Mix, rules: PatchRules) -> None:
    """Raises OSError if the file cannot be written."""
    with target.open("w", encoding="utf-8") as file:
        for line in record(tally, mix, rules):
            file.write(json.dumps(line, separators=(",", ":")) + "\n")


def record(tally: Tally, mix: Mix, rules: PatchRules) -> Iterator[dict[str, object]]:
    for outcome in sorted(tally.outcomes, key=lambda one: (_arrived_s(one), one.place or (0, 0))):
        if outcome.place is not None:
            yield _line(outcome, _size(mix, *outcome.place), rules)


def _line(outcome: Outcome, size: Size | None, rules: PatchRules) -> dict[str, object]:
    assert outcome.place is not None
    patches = outcome.patches or _patches(size, rules)
    line: dict[str, object] = {
        "time_s": round(_arrived_s(outcome), 6),
        "request": outcome.place.request,
        **({"width": size.width, "height": size.height} if size else {}),
        **({"patches": patches} if patches else {}),
        "outcome": str(outcome.kind),
        "latency_ms": outcome.latency_ms,
    }
    if outcome.kind is Kind.ANSWERED:
        line |= {"cached": outcome.cached, "coalesced": outcome.coalesced, "stages": dict(outcome.stage_ms)}
        if outcome.lane is not None:
            line["lane"] = f"{outcome.lane.runtime}/{outcome.lane.device}/{outcome.lane.precision}"
    return line


def _arrived_s(outcome: Outcome) -> float:
    return outcome.finished_s - outcome.latency_ms / 1e3


def _size(mix: Mix, request: int, position: int) -> Size | None:
    try:
        return mix.sizes(request)[position]
    except PixelError:  # a file that is sent to see it refused
        return None


def _patches(size: Size | None, rules: PatchRules) -> int:
    """0 where the model takes none of that size."""
    try:
        resized = rules.resized(size) if size else Size(0, 0)
    except GridError:
        return 0
    return resized.width * resized.height // rules.patch_size**2
