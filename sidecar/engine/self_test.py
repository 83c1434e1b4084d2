"""The self-test of a lane: it encodes sealed reference items and compares the result with their sealed embeddings.

A lane passes it before it is ready, after a fault, and once a minute. Where no reference is sealed (a directory
that `optimum-cli` wrote), the lane's own first result must be finite and not zero, and is what later results must equal.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from sidecar.engine.cost import CostModel, Work
from sidecar.runtimes.base import Runtime, RuntimeFault
from sidecar.vision.dtypes import DType, to_float32
from sidecar.vision.grid import Grid
from sidecar.vision.pixels import Patches
from sidecar.vision.reference import Deviation, Reference
from sidecar.vision.spec import TowerSpec

# Sizes in tokens (h, w) that are measured beside the references, so that the cost is known where pictures are.
_MEASURED_TOKENS = ((16, 16), (32, 32))
# Where an artifact seals no reference: a size with ragged windows and one of a whole window, as export seals them.
_PATTERN_TOKENS = ((5, 6), (4, 4))

# Another machine rounds differently: its error may be so many times what export measured, or this much where that was less.
# The products of bfloat16 and int8 differ between instruction sets (VNNI quantises activations that AMX does not).
_TIMES_SEALED = 3.0
_LEAST_ROW_ERROR = {"f32": 1e-3, "bf16": 0.02, "int8": 0.05}
# How far its scale may be from the one that export found.
_GAIN_ERROR = {"f32": 1e-3, "bf16": 3e-3, "int8": 6e-3}
# What storing a row in its dtype may add: a unit in the last place of the significand, since OpenVINO cuts off what it does not
# round, and half of that on average.
_STORING = {DType.FLOAT32: 2.0**-23, DType.FLOAT16: 2.0**-10, DType.BFLOAT16: 2.0**-7}


class SelfTestError(RuntimeFault):
    """The lane computes something else than the artifact says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """The largest deviation from a reference that passes: see `Deviation`. `gain_error` is the distance from the sealed gain."""

    row_error: float
    gain: float
    gain_error: float

    @classmethod
    def beside(cls, sealed: Deviation, precision: str, dtype: DType) -> Self:
        """What passes where export measured `sealed`. `precision`: `f32`, `bf16` or `int8`; `dtype`: of the lane's rows."""
        storing = _STORING[dtype] / 2
        return cls(
            row_error=max(_TIMES_SEALED * sealed.row_error, _LEAST_ROW_ERROR[precision]) + storing,
            gain=sealed.gain,
            gain_error=_GAIN_ERROR[precision] + storing / 2,
        )

    def passes(self, found: Deviation) -> bool:
        return found.row_error <= self.row_error and abs(found.gain - self.gain) <= self.gain_error


class SelfTest:
    """Runs on a lane's runtime, on the thread of whoever calls.

    Attributes:
        passed: whether it has ever passed.
    """

    def __init__(
        self, runtime: Runtime, tower: TowerSpec, references: Sequence[Reference] = (), sealed: Sequence[Deviation] = ()
    ) -> None:
        """`sealed`: the deviation of each reference that export measured for the variant that the runtime has loaded."""
        self._runtime = runtime
        self._tower = tower
        self._references = [
            (reference, Allowed.beside(deviation, runtime.precision, runtime.output_dtype))
            for reference, deviation in zip(references, sealed, strict=True)
        ]
        self.passed = False

    def predicted_ms(self, cost: CostModel) -> float:
        """What `run` takes by a lane's cost model; 0 where nothing is known of it."""
        return sum(cost.ms(Work.of([reference.patches.grid])) for reference, _ in self._references)

    def run(self, cost: CostModel | None = None) -> None:
        """Encode every reference and compare; `cost` learns what it took.

        Raises:
            SelfTestError: if a result is not its reference.
            BaseException: whatever the runtime raises.
        """
        for reference in self._references or self._recorded():
            work, ms = self._check([reference])
            if cost is not None:
                cost.learn(work, ms)
        self.passed = True

    def warm_up(self, cost: CostModel, budget_s: float) -> None:
        """Pass the test and measure items of growing size, each twice, since the first run at a size sets things up. Larger items
        run only while the time lasts. Raises as `run` does."""
        ends = time.monotonic() + budget_s
        references = self._references or self._recorded()
        # Each by itself, and all in one run: items that share a run keep their own rows.
        for together in (*([reference] for reference in references), references):
            self._check(together)
            cost.anchor(*self._check(together))
        for tokens in _MEASURED_TOKENS:
            item = blank(_grid(tokens, self._tower), self._tower)
            work = Work.of([item.grid])
            if 2 * cost.ms(work) > (ends - time.monotonic()) * 1e3:
                break
            self._time([item])
            cost.anchor(work, self._time([item])[1])
        self.passed = True

    def _check(self, references: Sequence[tuple[Reference, Allowed]]) -> tuple[Work, float]:
        """Encode them in one run, and compare. Returns what that was and the milliseconds that it took."""
        items = [reference.patches for reference, _ in references]
        rows, ms = self._time(items)
        ends = np.cumsum([item.grid.tokens(self._tower) for item in items])
        for part, (reference, allowed) in zip(np.split(rows, ends[:-1]), references, strict=True):
            found = Deviation.between(to_float32(part, self._runtime.output_dtype), reference.rows)
            if not allowed.passes(found):
                raise SelfTestError(
                    f"{self._described()} does not reproduce the reference: cosine {found.cosine_min:.5f}, error of a row "
                    f"{found.row_error:.4g} (at most {allowed.row_error:.4g}), scale {found.gain:.4f} ({allowed.gain:.4f} ± "
                    f"{allowed.gain_error:.4f})"
                )
        return Work.of(item.grid for item in items), ms

    def _recorded(self) -> list[tuple[Reference, Allowed]]:
        """Make the lane's own results the references, if they can be that."""
        runtime = self._runtime
        equal = Deviation(cosine_min=1.0, row_error=0.0, gain=1.0)
        allowed = Allowed.beside(equal, runtime.precision, runtime.output_dtype)
        recorded = []
        for tokens in _PATTERN_TOKENS:
            item = pattern(tokens, self._tower)
            rows = to_float32(self._time([item])[0], runtime.output_dtype)
            if not (np.isfinite(rows).all() and rows.any(axis=1).all()):
                raise SelfTestError(f"{self._described()} gives embeddings that are zero or not finite")
            recorded.append((Reference(item, rows), allowed))
        self._references = recorded
        return recorded

    def _time(self, items: Sequence[Patches]) -> tuple[np.ndarray, float]:
        started = time.monotonic()
        values = items[0].values if len(items) == 1 else np.concatenate([item.values for item in items])
        tokens = sum(item.grid.tokens(self._tower) for item in items)
        rows = np.empty((tokens, self._tower.out_hidden_size), self._runtime.output_dtype.storage)
        rows.view(np.uint8)[:] = 0xFF  # NaN in every dtype: what the runtime does not write is not taken for its result
        self._runtime.run(values, [item.grid for item in items], rows)
        return rows, (time.monotonic() - started) * 1e3

    def _described(self) -> str:
        runtime = self._runtime
        return f"{runtime.name} {runtime.version} on {runtime.device}, {runtime.precision},"


def blank(grid: Grid, tower: TowerSpec) -> Patches:
    """A black item of this size."""
    return Patches(np.zeros((grid.patches, tower.patch_width), np.uint8), grid)


def pattern(tokens: tuple[int, int], tower: TowerSpec) -> Patches:
    """An item of h × w tokens in which every patch differs from the others; always the same one."""
    grid = _grid(tokens, tower)
    values = np.random.default_rng(0).integers(0, 256, (grid.patches, tower.patch_width), np.uint8)
    values[0, 0] = 255
    return Patches(values, grid)


def _grid(tokens: tuple[int, int], tower: TowerSpec) -> Grid:
    merge = tower.spatial_merge_size
    return Grid(1, tokens[0] * merge, tokens[1] * merge)
