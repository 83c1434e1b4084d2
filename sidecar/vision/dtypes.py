"""Element types of patches and embeddings, and bfloat16 for a numpy that has none.

A bfloat16 array is held as uint16, bit for bit; the name of its dtype travels beside it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class DType(StrEnum):
    """Named as torch and Hugging Face configs name them."""

    UINT8 = "uint8"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def storage(self) -> np.dtype[Any]:
        """The numpy dtype that holds it, little endian."""
        return np.dtype({"uint8": "u1", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[self])

    @property
    def safetensors(self) -> str:
        """Its name in a safetensors header."""
        return {"uint8": "U8", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}[self]


def bfloat16_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Widen; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def to_float32(array: Array, dtype: DType) -> npt.NDArray[np.float32]:
    """Widen an array stored as `dtype.storage`."""
    return bfloat16_to_float32(array) if dtype is DType.BFLOAT16 else array.astype(np.float32)


def from_float32(values: npt.NDArray[np.float32], dtype: DType) -> Array:
    """Narrow to an array stored as `dtype.storage`."""
    return float32_to_bfloat16(values) if dtype is DType.BFLOAT16 else values.astype(dtype.storage)


def all_finite(array: Array, dtype: DType) -> bool:
    """Whether no element is NaN or infinite."""
    if dtype is DType.BFLOAT16:
        return not bool(np.any((array & 0x7F80) == 0x7F80))
    return bool(np.isfinite(array).all())
