"""What a run costs: a curve from patches to milliseconds, fitted to what runs really took.

    ms = fixed + per_patch · N + per_pair · Q,   N = Σ t·h·w,   Q = Σ t·(h·w)²

over the items of a run: the linear layers and windows grow with N, the full-attention blocks with Q, since a patch there sees its
own frame. No part is negative, so the curve never falls.

Small items say nothing of Q. So each patch brings the share of Q that the network's arithmetic gives it (`attention_share`), and
only what runs take beyond that is fitted: a size that was never run is not taken for cheap.

The curve changes slowly, from many runs. The drift, by how much the latest runs lie above or below it, multiplies it and follows
at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sidecar.engine.status import CostCurve
from sidecar.vision.grid import Grid
from sidecar.vision.spec import TowerSpec

_SAMPLES = 128
_REFIT_EVERY = 8
_KEPT_ANCHORS = 16
# The first run at a new size sets things up and may take ten times as long: it counts for so many times its prediction at most.
_MOST_SURPRISE = 4.0
# A new sample outweighs an old one of the same size by so much for each sample that came between.
_FORGETTING = 0.97
# The drift is that of the latest runs, with faster forgetting; a run that took so many times its prediction, or that part of it,
# makes it forget all runs before.
_DRIFT_SAMPLES = 8
_DRIFT_FORGETTING = 0.7
_DRIFT_JUMP = 2.0
_LEAST_MS = 1e-3


@dataclass(frozen=True, slots=True)
class Work:
    """What the curve looks at: patches and Q, summed over the items of a run."""

    patches: int
    pairs: float

    @staticmethod
    def of(grids: Iterable[Grid]) -> Work:
        grids = list(grids)
        return Work(sum(grid.patches for grid in grids), float(sum(grid.t * (grid.h * grid.w) ** 2 for grid in grids)))

    def __add__(self, other: Work) -> Work:
        return Work(self.patches + other.patches, self.pairs + other.pairs)

    def __sub__(self, other: Work) -> Work:
        return Work(self.patches - other.patches, self.pairs - other.pairs)


NOTHING = Work(0, 0.0)


# Parts of the curve by their place in it, the simplest first. The one without a part that grows comes last: where runs were all
# of one size it would explain them as well, and make larger ones look free.
_CHOICES = ([1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2], [0])


class CostModel:
    """Learns from every run. One owner; reading `ms` from other threads is safe, since a fit is replaced as a whole."""

    def __init__(self, attention_share: float = 0.0) -> None:
        """`attention_share`: see the function of that name."""
        self._attention_share = attention_share
        self._anchors: list[tuple[Work, float]] = []  # of the warm-up: sizes that traffic may not have
        self._recent: deque[tuple[Work, float]] = deque(maxlen=_SAMPLES)
        self._drifting: deque[tuple[Work, float]] = deque(maxlen=_DRIFT_SAMPLES)
        self._largest = 0  # patches in the largest run that it knows of
        self._since_fit = 0
        self._curve = (0.0, 0.0, 0.0)
        self._fit = (0.0, 0.0, 0.0)  # the curve times the drift

    def anchor(self, work: Work, ms: float) -> None:
        """Learn from a warm-up run."""
        self._largest = max(self._largest, work.patches)
        self._anchors = [*self._anchors, (work, ms)][-_KEPT_ANCHORS:]
        self._refit()

    def learn(self, work: Work, ms: float) -> None:
        """Learn from a run under load."""
        self._largest = max(self._largest, work.patches)
        if (expected := self.ms(work)) > 0:
            ms = min(ms, _MOST_SURPRISE * expected)
            if not expected / _DRIFT_JUMP <= ms <= expected * _DRIFT_JUMP:
                self._drifting.clear()
        self._recent.append((work, ms))
        self._drifting.append((work, ms))
        self._since_fit += 1
        if self._since_fit >= _REFIT_EVERY or expected <= 0:
            self._refit()
        else:
            self._follow()

    def ms(self, work: Work) -> float:
        """Predicted duration of a run."""
        return _on(self._fit, work)

    def is_measured(self, work: Work) -> bool:
        """Whether a run of about this size was measured, so that the prediction is more than an extrapolation."""
        return work.patches <= 2 * self._largest

    @property
    def fixed_ms(self) -> float:
        """What a run costs however small it is: what is saved for each item that shares one."""
        return self._fit[0]

    def curve(self) -> CostCurve:
        fixed, per_patch, per_pair = self._fit
        samples = tuple((work.patches, ms) for work, ms in [*self._anchors, *self._recent])
        return CostCurve(fixed_ms=fixed, per_patch_ms=per_patch, per_pair_ms=per_pair, samples=samples)

    def _refit(self) -> None:
        self._since_fit = 0
        samples = [*self._anchors, *self._recent]
        newest = len(self._recent)
        # Warm-up is worth as much as the oldest of the recent samples: it decides where there are no others.
        ages = [newest] * len(self._anchors) + [newest - 1 - index for index in range(newest)]
        # A run that was much quicker than the curve says would outweigh all others, since errors are relative to what a run took.
        trust = [min(1.0, ms / max(ms, _on(self._curve, work), _LEAST_MS)) ** 2 for work, ms in samples]
        weights = [_FORGETTING**age * part for age, part in zip(ages, trust, strict=True)]
        self._curve = fit(samples, weights, self._attention_share)
        self._follow()

    def _follow(self) -> None:
        """Bring the drift up to the latest run: the weighted geometric mean of measured over expected times."""
        ratios, weights = 0.0, 0.0
        for age, (work, ms) in enumerate(reversed(self._drifting)):
            if (expected := _on(self._curve, work)) > _LEAST_MS:
                ratios += _DRIFT_FORGETTING**age * math.log(max(ms, _LEAST_MS) / expected)
                weights += _DRIFT_FORGETTING**age
        drift = math.exp(ratios / weights) if weights else 1.0
        fixed, per_patch, per_pair = self._curve
        self._fit = (fixed * drift, per_patch * drift, per_pair * drift)


def attention_share(tower: TowerSpec) -> float:
    """What a pair of patches costs in the full-attention blocks, as a part of what a patch costs in all else, by multiply-adds.

    Real runs spend more on a pair than that, since attention runs at a lower rate than the large products do, and never less.
    """
    hidden, merged = tower.hidden_size, tower.hidden_size * tower.merge_unit
    full = len(tower.fullatt_block_indexes)
    block = 4 * hidden * hidden + 3 * hidden * tower.intermediate_size
    windows = (tower.depth - full) * 2 * hidden * tower.window_patches
    merger = (merged * merged + merged * tower.out_hidden_size) / tower.merge_unit
    return 2 * full * hidden / (tower.patch_width * hidden + tower.depth * block + windows + merger)


def _on(curve: tuple[float, float, float], work: Work) -> float:
    fixed, per_patch, per_pair = curve
    return fixed + per_patch * work.patches + per_pair * work.pairs


def fit(
    samples: Sequence[tuple[Work, float]], weights: Sequence[float], attention_share: float = 0.0
) -> tuple[float, float, float]:
    """The curve with the least weighted relative error whose parts are not negative: (fixed, per_patch, per_pair) in ms.

    `per_pair` is at least `attention_share` times `per_patch`.

    Relative, because a millisecond matters more to a small item. With three unknowns every choice of parts that are zero can be
    tried, which is exact and needs no solver.
    """
    times = np.array([ms for _, ms in samples])
    features = np.array([(1.0, work.patches + attention_share * work.pairs, work.pairs) for work, _ in samples])
    scale = features.max(axis=0)
    scale[scale == 0] = 1.0
    importance = np.sqrt(np.array(weights)) / np.maximum(times, 1e-3)
    rows, target = features / scale * importance[:, None], times * importance
    best, least = np.zeros(3), np.inf
    for columns in _CHOICES:
        solution, *_ = np.linalg.lstsq(rows[:, columns], target, rcond=1e-9)
        if (solution < 0).any():
            continue
        error = float(np.square(rows[:, columns] @ solution - target).sum())
        # A further part must earn its place: with few samples it would only fit their noise.
        if error < least * 0.98:
            best, least = np.zeros(3), error
            best[columns] = solution
    fixed, per_patch, per_pair = best / scale
    return float(fixed), float(per_patch), float(per_pair + attention_share * per_patch)
