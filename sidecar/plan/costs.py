"""What encoding costs in one kind of sidecar, by measurement: the run, what comes before and after it, and how far runs scatter.

A file of costs is JSON: {"costs": [{…}, …]}, each with

    name, source                what was measured; how, where and by whom
    streams                     runs that its lane carries out side by side
    run                         fixed_ms + per_patch_ms · N + per_pair_ms · Q, as in sidecar.engine.cost
    samples                     instead of `run`: [patches, ms] of single pictures, to which the curve is fitted
    spread                      what runs of so many patches took over what the curve says, equally likely each, such as
                                {"1024": [0.98, 1.01]}; left out: all take what it says
    prepare, publish, overhead  fixed_ms + per_patch_ms · N + per_megapixel_ms · decoded megapixels: decoding and resizing, on a
                                preprocessing thread; handing a result out, on the lane's; the call itself. Left out: not measured
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import numpy as np

from sidecar.engine.cost import Work, fit

# As in sidecar.engine.lane: items share a run while its fixed part is more than this part of it.
WORTHWHILE = 0.1
_MOST_STREAMS = 1024
_SHORTEST_MS, _LONGEST_MS = 1e-6, 86_400_000.0
_QUANTILES = 25  # of the spread
_NUMBER = r"\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?"
_NUMBERS = re.compile(rf"(?:{_NUMBER})(?:,(?:{_NUMBER})){{1,2}}")


class CostsError(ValueError):
    """What was given is no costs."""


@dataclass(frozen=True, slots=True)
class Picture:
    """What the costs depend on. `pairs`: squared patches of each frame, summed; `pixels`: decoded, before resizing."""

    patches: int
    pixels: int

    @property
    def pairs(self) -> float:
        return float(self.patches) ** 2

    @property
    def work(self) -> Work:
        return Work(self.patches, self.pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A cost that grows evenly."""

    fixed_ms: float = 0.0
    per_patch_ms: float = 0.0
    per_megapixel_ms: float = 0.0

    def ms(self, picture: Picture) -> float:
        return self.fixed_ms + self.per_patch_ms * picture.patches + self.per_megapixel_ms * picture.pixels / 1e6

    @classmethod
    def fitted(cls, samples: Sequence[tuple[Picture, float]]) -> Self:
        """To measured milliseconds, and with their sum; no part is negative."""
        if not samples:
            return cls()
        work = [(Work(picture.patches, picture.pixels / 1e6), ms) for picture, ms in samples]
        parts = fit(work, [1.0] * len(work))
        line = cls(**dict(zip(cls.__slots__, parts, strict=True)))
        # The fit is to the relative error, and thinks little of the few that took long.
        took = sum(ms for _, ms in samples) / max(1e-9, sum(line.ms(picture) for picture, _ in samples))
        return cls(**dict(zip(cls.__slots__, (part * took for part in parts), strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run's curve, as in `sidecar.engine.cost`."""

    fixed_ms: float = 0.0
    per_patch_ms: float = 0.0
    per_pair_ms: float = 0.0

    def ms(self, patches: float, pairs: float) -> float:
        return self.fixed_ms + self.per_patch_ms * patches + self.per_pair_ms * pairs

    @classmethod
    def fitted(cls, samples: Sequence[tuple[Work, float]]) -> Self:
        # A size that was run often is not to outweigh the others: the curve is for all of them.
        often = Counter(work.patches for work, _ in samples)
        weights = [1.0 / often[work.patches] for work, _ in samples]
        return cls(**dict(zip(cls.__slots__, fit(samples, weights), strict=True)))


@dataclass(frozen=True, kw_only=True)
class Costs:
    """One kind of sidecar's lane, and what its items cost around it. None: not measured, and counted as nothing.

    Raises:
        CostsError: if a figure is no number of its kind.
    """

    name: str
    source: str
    run: Run
    streams: int = 1
    spread: Mapping[int, Sequence[float]] = field(default_factory=dict)
    prepare: Line | None = None
    publish: Line | None = None
    overhead: Line | None = None

    def __post_init__(self) -> None:
        if not _SHORTEST_MS < self.run.ms(1024, 1024.0**2) < _LONGEST_MS:
            raise CostsError(
                f"{self.name}: a run must cost something, and end; give milliseconds above 0 and below a day"
            )
        if not isinstance(self.streams, int) or not 1 <= self.streams <= _MOST_STREAMS:
            raise CostsError(f"{self.name}: streams must be 1 to {_MOST_STREAMS}, got {self.streams}")
        if not all(
            patches > 0 and ratios and all(1e-6 < ratio < 1e6 for ratio in ratios)
            for patches, ratios in self.spread.items()
        ):
            raise CostsError(f"{self.name}: spread must be ratios above 0 for each number of patches")

    @cached_property
    def unmeasured(self) -> list[str]:
        return [part for part in ("prepare", "publish", "overhead") if getattr(self, part) is None]

    def borrowing(self, other: Costs | None) -> Costs:
        """With the other's figures where this has none: decoding and calls are the host's work, whatever the lane's device is."""
        missing = {part: getattr(other, part) for part in self.unmeasured if other is not None}
        return replace(self, **missing)

    def alone_ms(self, picture: Picture) -> float:
        """A picture's time in an empty sidecar."""
        around = sum(part.ms(picture) for part in (self.prepare, self.publish, self.overhead) if part)
        return self.run.ms(picture.patches, picture.pairs) + around

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(slots=True)
class Samples:
    """What was measured of one lane: (picture or work, ms) each. `unshared`: pictures waited, and each was run alone."""

    run: list[tuple[Work, float]] = field(default_factory=list)
    prepare: list[tuple[Picture, float]] = field(default_factory=list)
    publish: list[tuple[Picture, float]] = field(default_factory=list)
    overhead: list[tuple[Picture, float]] = field(default_factory=list)
    unshared: bool = False

    def costs(self, name: str, source: str, streams: int = 1) -> Costs:
        """Raises CostsError if there are no runs."""
        if not self.run:
            raise CostsError(f"{source}: nothing was encoded, so nothing is known of its cost")
        run = Run.fitted(self.run)
        if self.unshared:
            # Else the lane would have had two of the smallest share a run. Sizes that are much alike leave the fixed part open.
            least = min((work for work, _ in self.run), key=lambda work: work.patches)
            varies_ms = run.ms(2 * least.patches, 2 * least.pairs) - run.fixed_ms
            run = replace(run, fixed_ms=min(run.fixed_ms, WORTHWHILE * varies_ms))
        return Costs(
            name=name,
            source=source,
            run=run,
            streams=streams,
            spread=spread((work.patches, ms / run.ms(work.patches, work.pairs)) for work, ms in self.run),
            prepare=Line.fitted(self.prepare) if self.prepare else None,
            publish=Line.fitted(self.publish) if self.publish else None,
            overhead=Line.fitted(self.overhead) if self.overhead else None,
        )


def spread(measured: Iterable[tuple[int, float]]) -> dict[int, list[float]]:
    """Of (patches, measured over predicted): by patches, quantiles in the middle of equal shares."""
    ratios: dict[int, list[float]] = defaultdict(list)
    for patches, ratio in measured:
        ratios[patches].append(ratio)
    return {patches: _quantiles(ratios[patches]) for patches in sorted(ratios)}


def _quantiles(values: Sequence[float]) -> list[float]:
    count = min(_QUANTILES, len(values))
    return [round(float(value), 4) for value in np.quantile(values, (np.arange(count) + 0.5) / count)]


def given(text: str) -> Costs | None:
    """`fixed,per_patch[,per_pair]` in milliseconds; None if the text is no such list.

    Raises:
        CostsError: if they are all 0.
    """
    if not _NUMBERS.fullmatch(text):
        return None
    return Costs(
        name=text, source="as given", run=Run(**dict(zip(Run.__slots__, map(float, text.split(",")), strict=False)))
    )


def measured() -> dict[str, Costs]:
    """What was measured already, by name."""
    return {
        one.name: one for one in parse((files("sidecar.plan") / "measured.json").read_text("utf-8"), "measured.json")
    }


def load(path: Path) -> list[Costs]:
    """Raises:
    CostsError: if the file holds no costs.
    OSError: if it cannot be read.
    """
    try:
        return parse(path.read_text("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise CostsError(f"{path}: not a file of costs; `plan --save-costs` writes one") from error


def save(path: Path, costs: Sequence[Costs]) -> None:
    """Raises OSError if it cannot be written."""
    path.write_text(
        json.dumps({"costs": [one.as_json() for one in costs]}, indent=2, ensure_ascii=False) + "\n", "utf-8"
    )


def parse(text: str, where: str) -> list[Costs]:
    """Raises CostsError if it is no file of costs."""
    try:
        costs = [_parsed(entry) for entry in json.loads(text)["costs"]]
    except CostsError as error:
        raise CostsError(f"{where}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CostsError(f"{where}: not a file of costs; `plan --save-costs` writes one") from error
    if not costs:
        raise CostsError(f"{where}: no costs in it")
    return costs


def _parsed(entry: dict[str, Any]) -> Costs:
    values = dict(entry)
    if not all(isinstance(values[part], str) for part in ("name", "source")):
        raise CostsError("name and source must be texts")
    if (samples := values.pop("samples", None)) is not None:
        values["run"] = asdict(Run.fitted([(Work(patches, float(patches) ** 2), ms) for patches, ms in samples]))
        curve = Run(**values["run"])
        values["spread"] = spread((patches, ms / curve.ms(patches, float(patches) ** 2)) for patches, ms in samples)
    lines = {part: Line(**_figures(values[part])) for part in ("prepare", "publish", "overhead") if values.get(part)}
    ratios = {int(patches): list(values) for patches, values in values.get("spread", {}).items()}
    values |= {"run": Run(**_figures(values["run"])), "spread": ratios, **lines}
    return Costs(**values)


def _figures(values: dict[str, Any]) -> dict[str, float]:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _LONGEST_MS:
            raise CostsError(f"{name} must be at least 0 and below a day, got {value!r}")
    return values
