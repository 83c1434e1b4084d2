"""What arrives when: at random, in bursts, or as a file says. Knows nothing of who encodes it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sidecar.load.mix import cumulative
from sidecar.load.pictures import PatchRules, Size
from sidecar.plan.costs import Picture
from sidecar.vision.grid import GridError
from sidecar.vision.spec import PixelSpec

# Qwen2.5-VL's, where no model says otherwise.
RULES = PatchRules(14, 2, PixelSpec().min_pixels, PixelSpec().max_pixels)

# Whatever the beginning is, a date too; and what no picture has.
_LATEST_S, _MOST = 1e12, 1 << 31


class TrafficError(ValueError):
    """There is no such traffic."""


class Arrival(NamedTuple):
    """One picture. Those of one request have its number and its time."""

    at_ms: float
    request: int
    picture: Picture


@dataclass(frozen=True, slots=True)
class Traffic:
    """Arrivals in the order of time, from about 0 on; `about` says in words what they are."""

    arrivals: Sequence[Arrival]
    about: str
    skipped: int = 0  # of a record: known already when they came, or given up

    @property
    def requests(self) -> int:
        return len({arrival.request for arrival in self.arrivals})

    @property
    def rate_per_s(self) -> float:
        """Requests a second."""
        span_ms = self.arrivals[-1].at_ms - self.arrivals[0].at_ms
        return (self.requests - 1) / span_ms * 1e3 if span_ms else math.inf

    @property
    def pictures(self) -> set[Picture]:
        return {arrival.picture for arrival in self.arrivals}

    def at_speed(self, speed: float, most: int | None = None) -> Traffic:
        """The same so many times as fast; `most`: only the first so many pictures, of whole requests."""
        arrivals = self.arrivals
        if most is not None and len(arrivals) > most:
            arrivals = [arrival for arrival in arrivals if arrival.request < arrivals[most].request] or arrivals
        quick = [Arrival(at_ms / speed, request, picture) for at_ms, request, picture in arrivals]
        return Traffic(quick, self.about, self.skipped)


def picture_of(size: Size, rules: PatchRules = RULES) -> Picture:
    """Raises TrafficError if the model takes no picture of that size."""
    try:
        resized = rules.resized(size)
    except GridError as error:
        raise TrafficError(str(error)) from error
    return Picture(resized.width * resized.height // rules.patch_size**2, size.width * size.height)


def generated(
    requests: int,
    sizes: Mapping[Size, float],
    seed: int,
    *,
    rate_per_s: float | None = None,
    burst: int = 0,
    every_s: float = 0.0,
    items_per_request: int = 1,
    rules: PatchRules = RULES,
) -> Traffic:
    """So many requests: at random with a rate, `burst` of them at once in every so many seconds, or both together.

    Raises:
        TrafficError: if neither is given, or the model takes no picture of one of the sizes.
    """
    if not rate_per_s and not burst:
        raise TrafficError("give --rate, --burst with --every, or --trace: nothing arrives")
    random = np.random.default_rng(seed)
    pictures = [picture_of(size, rules) for size in sizes]
    times_ms: list[float] = []
    if rate_per_s:
        times_ms += (np.cumsum(random.exponential(1e3 / rate_per_s, requests))).tolist()
    if burst:
        times_ms += [1e3 * every_s * (number // burst) for number in range(requests)]
    shares = cumulative(np.array(list(sizes.values())))
    drawn = np.searchsorted(shares, random.random(requests * items_per_request), side="right").tolist()
    arrivals = [
        Arrival(at_ms, request, pictures[drawn[request * items_per_request + item]])
        for request, at_ms in enumerate(sorted(times_ms)[:requests])
        for item in range(items_per_request)
    ]
    parts = [f"{rate_per_s:g} requests/s at random"] if rate_per_s else []
    parts += [f"{burst} at once every {every_s:g} s"] if burst else []
    many = f", {items_per_request} pictures each" if items_per_request > 1 else ""
    return Traffic(arrivals, " and ".join(parts) + many)


def recorded(path: Path, rules: PatchRules = RULES) -> Traffic:
    """A trace: lines of JSON, or CSV with a heading, with `time_s` and either `patches` or `width` and `height`, or all three;
    items with one `request` belong together. What `load --record` wrote is one; there, items that no lane encoded are left out.

    Raises:
        TrafficError: if a line is not of that form, saying which.
        OSError: if the file cannot be read.
    """
    found: list[tuple[float, object, Picture]] = []
    skipped = 0
    for number, line in rows(path):
        if line.get("cached") is True or line.get("coalesced") is True or line.get("outcome") == "cancelled":
            skipped += 1
            continue
        try:
            found.append(_entry(line, number, rules))
        except (TrafficError, ValueError, TypeError, OverflowError) as error:
            raise TrafficError(f"{path}, line {number}: {error}") from error
    if len(found) < 2:
        raise TrafficError(f"{path}: a trace must have two items at least, got {len(found)}")
    found.sort(key=lambda entry: entry[0])
    began_s = found[0][0]
    numbers: dict[object, int] = {}
    arrivals = [
        Arrival((at_s - began_s) * 1e3, numbers.setdefault(name, len(numbers)), picture)
        for at_s, name, picture in found
    ]
    return Traffic(arrivals, f"{path.name}, {arrivals[-1].at_ms / 1e3:.0f} s of it", skipped)


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line's number and values. Raises as `recorded`."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix.lower() == ".csv":
                yield from enumerate(csv.DictReader(file, skipinitialspace=True), 2)
            else:
                yield from _json_rows(path, file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise TrafficError(f"{path}: neither lines of JSON nor CSV") from error


def _json_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError) as error:
            raise TrafficError(
                f"{path}, line {number}: no JSON; a trace is .csv, or a line of JSON for each item"
            ) from error
        if not isinstance(line, dict):
            raise TrafficError(f"{path}, line {number}: must be an object with time_s, got {text.strip()[:40]}")
        if line:
            yield number, line


def _entry(line: Mapping[str, Any], number: int, rules: PatchRules) -> tuple[float, object, Picture]:
    """When, of which request (its own, if it names none), and what."""
    if line.get("time_s") in (None, ""):
        raise TrafficError("time_s is missing: seconds since any beginning")
    at_s = float(line["time_s"])
    if not abs(at_s) < _LATEST_S:
        raise TrafficError(f"time_s must be a number of seconds, got {line['time_s']}")
    request = line.get("request")
    name = ("", number) if request in (None, "") else str(request)
    return at_s, name, _picture(line, rules)


def _picture(line: Mapping[str, Any], rules: PatchRules) -> Picture:
    width, height, patches = (_whole(line, name) for name in ("width", "height", "patches"))
    if patches is None:
        if width is None or height is None:
            raise TrafficError("give patches, or width and height in pixels")
        return picture_of(Size(width, height), rules)
    pixels = width * height if width and height else patches * rules.patch_size**2
    return Picture(patches, pixels)


def _whole(line: Mapping[str, Any], name: str) -> int | None:
    value = line.get(name)
    if value in (None, ""):
        return None
    number = int(value)
    if not 1 <= number < _MOST:
        raise TrafficError(f"{name} must be at least 1 and below {_MOST}, got {str(value)[:40]}")
    return number
