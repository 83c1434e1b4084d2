"""The self-test of a lane: a runtime that computes something else than the artifact says is found, and one that rounds is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from lanes import TOWER as NARROW

from sidecar.engine.cost import CostModel
from sidecar.engine.self_test import Allowed, SelfTest, SelfTestError, pattern
from sidecar.runtimes.base import Runtime
from sidecar.vision.dtypes import Array, DType, from_float32
from sidecar.vision.grid import Grid
from sidecar.vision.reference import Deviation, Reference

Rows = np.ndarray
TOWER = replace(NARROW, out_hidden_size=128)
# What export measured for random weights of 3B size, by precision.
SEALED = {
    "f32": Deviation(cosine_min=1.0, row_error=2e-6, gain=1.0),
    "bf16": Deviation(cosine_min=0.9996, row_error=0.027, gain=0.9995),
    "int8": Deviation(cosine_min=0.9963, row_error=0.086, gain=0.9971),
}


def embedding(patches: Array, grids: Sequence[Grid]) -> Rows:
    """Something that depends on every patch: (tokens, width)."""
    projection = np.random.default_rng(1).normal(size=(TOWER.patch_width, TOWER.out_hidden_size))
    rows = (patches.astype(np.float64) - 127.5) @ projection
    merged = rows.reshape(-1, TOWER.merge_unit, TOWER.out_hidden_size)
    return (merged * [[1.0], [2.0], [3.0], [4.0]]).sum(1).astype(np.float32)


class Computing(Runtime):
    """Gives the embedding, as `change` changes it."""

    name, version, device = "fake", "1.2.3", "nowhere"

    def __init__(self, precision: str, dtype: DType, change: Callable[[Rows], Rows] = lambda rows: rows) -> None:
        self.precision, self.output_dtype, self.change = precision, dtype, change

    def run(self, patches: Array, grids: Sequence[Grid], out: Array) -> None:
        rows = self.change(embedding(patches, grids)) * SEALED[self.precision].gain
        out[:] = from_float32(rows.astype(np.float32), self.output_dtype)


def references() -> list[Reference]:
    items = [pattern((5, 6), TOWER), pattern((4, 4), TOWER)]
    return [Reference(item, embedding(item.values, [item.grid])) for item in items]


def rounded(error: float) -> Callable[[Rows], Rows]:
    """Independent errors, of `error` times each row's length."""

    def change(rows: Rows) -> Rows:
        noise = np.random.default_rng(2).normal(size=rows.shape)
        noise *= error * np.linalg.norm(rows, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
        return rows + noise

    return change


WRONG: dict[str, Callable[[Rows], Rows]] = {
    "zeros": np.zeros_like,
    "rows in another order": lambda rows: rows[::-1],
    "two rows swapped": lambda rows: np.concatenate([rows[1::-1], rows[2:]]),
    "noise": lambda rows: np.random.default_rng(3).normal(size=rows.shape) * np.abs(rows).mean(),
    "one percent too large": lambda rows: rows * 1.01,
    "one percent too small": lambda rows: rows * 0.99,
    "negated": lambda rows: -rows,
    "columns lost": lambda rows: rows * (np.arange(rows.shape[1]) > 2),
    "the last row missing": lambda rows: rows * (np.arange(len(rows)) < len(rows) - 1)[:, None],
    "NaN": lambda rows: rows * np.nan,
    "infinite": lambda rows: rows + np.inf,
}


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16])
@pytest.mark.parametrize("precision", SEALED)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_wrong_result_does_not_pass(wrong: str, precision: str, dtype: DType) -> None:
    scale = 0.1 if dtype is DType.FLOAT16 else 1.0  # float16 ends at 65504
    sealed = [Reference(one.patches, one.rows * np.float32(scale)) for one in references()]
    runtime = Computing(precision, dtype, lambda rows: WRONG[wrong](rows * scale))
    test = SelfTest(runtime, TOWER, sealed, [SEALED[precision]] * 2)
    with pytest.raises(
        SelfTestError, match=r"^fake 1\.2\.3 on nowhere, (f32|bf16|int8), does not reproduce .* cosine "
    ):
        test.run()
    with pytest.raises(SelfTestError):
        test.warm_up(CostModel(), 0.0)
    assert not test.passed


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
@pytest.mark.parametrize("precision", SEALED)
def test_rounding_as_on_another_machine_passes(precision: str, dtype: DType) -> None:
    """Twice the error that export measured on its own machine, and a scale off by a part in 500."""
    error = rounded(2 * SEALED[precision].row_error)
    runtime = Computing(precision, dtype, lambda rows: error(rows) * (1.0 if precision == "f32" else 1.002))
    test = SelfTest(runtime, TOWER, references(), [SEALED[precision]] * 2)
    test.warm_up(CostModel(), 10.0)
    assert test.passed


def test_items_that_share_a_run_must_keep_their_own_rows() -> None:
    class Crossing(Computing):
        def run(self, patches: Array, grids: Sequence[Grid], out: Array) -> None:
            super().run(patches, grids, out)
            if len(grids) > 1:
                out[:] = np.roll(out, 1, axis=0)

    test = SelfTest(Crossing("f32", DType.FLOAT32), TOWER, references(), [SEALED["f32"]] * 2)
    with pytest.raises(SelfTestError):
        test.warm_up(CostModel(), 10.0)


def test_without_a_sealed_reference_the_first_result_must_be_possible_and_is_the_reference() -> None:
    runtime = Computing("bf16", DType.BFLOAT16, np.zeros_like)
    test = SelfTest(runtime, TOWER)
    with pytest.raises(SelfTestError, match="zero or not finite"):
        test.run()
    runtime.change = lambda rows: rows
    test.run()
    runtime.change = lambda rows: rows[::-1]
    with pytest.raises(SelfTestError, match="does not reproduce"):
        test.run()


@pytest.mark.parametrize("precision", SEALED)
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16])
def test_one_percent_is_never_within_what_is_allowed(precision: str, dtype: DType) -> None:
    allowed = Allowed.beside(SEALED[precision], precision, dtype)
    assert min(allowed.row_error, allowed.gain_error) < 0.01
    assert allowed.row_error < 0.5


def test_deviation_of_an_equal_array_is_none() -> None:
    rows = references()[0].rows
    found = Deviation.between(rows, rows)
    assert (found.cosine_min, found.row_error, found.gain) == pytest.approx((1.0, 0.0, 1.0))
