"""A reference item with its embedding, and how far another embedding of it lies from that.

An artifact seals references; every lane encodes them where it serves, so that a runtime that computes something else is found
before its first caller is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from sidecar.vision.pixels import Patches

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """An item, and the embedding that the checkpoint's tower gives it in float32.

    Attributes:
        patches: the item.
        rows: (tokens, out_hidden_size), float32.
    """

    patches: Patches
    rows: Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """The distance between an embedding and its reference.

    Attributes:
        cosine_min: the least cosine between corresponding rows.
        row_error: the largest ‖row − reference row‖ / ‖reference row‖.
        gain: ⟨rows, reference⟩ / ⟨reference, reference⟩. Rounding errors of thousands of values cancel out in it, so that it
            shows a wrong scale of one percent under the noise of bfloat16 or int8.
    """

    cosine_min: float
    row_error: float
    gain: float

    @classmethod
    def between(cls, rows: Rows, reference: Rows) -> Self:
        """Compare two arrays of shape (tokens, width). Rows that are not finite are infinitely far from any reference."""
        if not np.isfinite(rows).all():
            return cls(cosine_min=-1.0, row_error=float("inf"), gain=0.0)
        left, right = rows.astype(np.float64), reference.astype(np.float64)
        products = (left * right).sum(1)
        left_norm, right_norm = np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1)
        tiny = np.finfo(np.float64).tiny
        return cls(
            cosine_min=float((products / np.maximum(left_norm * right_norm, tiny)).min()),
            row_error=float((np.linalg.norm(left - right, axis=1) / np.maximum(right_norm, tiny)).max()),
            gain=float(products.sum() / max(np.square(right_norm).sum(), tiny)),
        )
