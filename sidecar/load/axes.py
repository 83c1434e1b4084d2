"""Axes for plots: where a value goes, and which values get a label. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_STEPS = (1, 2, 5)  # of every decade, as on rulers
_NOTHING = 1e-9  # an axis that would end below has no values on it, and ends at 1


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high` on pixels from `start` to `end`, which may run backwards.

    `ticks` are the values that get a label; a logarithmic axis has none at or below 0, and takes what lies there for `low`.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """The pixel of a value; of one that lies outside, the nearer end's."""
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)


def linear_axis(high: float, start: float, end: float, *, most_ticks: int, round_up: bool = True) -> Axis:
    """From 0 to `high`, or to the next tick above it, in steps of 1, 2 or 5 times a power of ten."""
    high = high if high > _NOTHING else 1.0
    step = _step_at_least(high / most_ticks)
    high = math.ceil(high / step - 1e-9) * step if round_up else high
    ticks = [index * step for index in range(math.floor(high / step + 1e-9) + 1)]
    return Axis(0.0, high, start, end, ticks)


def logarithmic_axis(values: Iterable[float], start: float, end: float, *, least: float) -> Axis:
    """Around all values, from tick to tick, with at least a decade; a value below `least` lies there."""
    known = [max(value, least) for value in values] or [1.0]
    low, high = _step_at_most(min(known)), _step_at_least(max(known))
    if high < 10 * low:
        low = _step_at_most(high / 10)
    return Axis(low, high, start, end, _steps_between(low, high), logarithmic=True)


def _step_at_least(value: float) -> float:
    decade = 10.0 ** math.floor(math.log10(value))
    return next(step * decade for step in (*_STEPS, 10) if step * decade >= value * (1 - 1e-9))


def _step_at_most(value: float) -> float:
    decade = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return next(step * decade for step in reversed(_STEPS) if step * decade <= value * (1 + 1e-9))


def _steps_between(low: float, high: float) -> list[float]:
    """All steps if they are few, else the decades."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    steps = _STEPS if last - first <= 4 else _STEPS[:1]
    every = (step * 10.0**decade for decade in range(first, last + 1) for step in steps)
    return [value for value in every if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
