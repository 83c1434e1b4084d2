"""bfloat16 without a numpy dtype: bit for bit what torch does."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sidecar.vision.dtypes import DType, all_finite, bfloat16_to_float32, float32_to_bfloat16, from_float32, to_float32


def test_every_bfloat16_widens_as_in_torch() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(bfloat16_to_float32(bits), expected)


@given(arrays.arrays(np.float32, 64, elements=st.floats(width=32, allow_nan=False)))
def test_narrowing_rounds_as_in_torch(values: np.ndarray) -> None:
    expected = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(float32_to_bfloat16(values), expected)


def test_nan_stays_nan() -> None:
    assert np.isnan(bfloat16_to_float32(float32_to_bfloat16(np.array([np.nan], np.float32)))).all()


def test_values_that_are_not_finite_are_noticed_in_every_dtype() -> None:
    for dtype in (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16):
        good = from_float32(np.array([1.5, -2.0, 0.0], np.float32), dtype)
        assert all_finite(good, dtype)
        np.testing.assert_array_equal(to_float32(good, dtype), [1.5, -2.0, 0.0])
        for bad in (np.nan, np.inf, -np.inf):
            assert not all_finite(from_float32(np.array([1.0, bad], np.float32), dtype), dtype), (dtype, bad)
