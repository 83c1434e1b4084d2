"""An embedding as a picture, so that a person sees at a glance that order and orientation are right.

Each token's place in the photo is tinted with its first three principal components as red, green and blue. Tokens that
look alike to the tower share a colour: where colours follow the outlines, the rows are in the right order; where
they form a mirror image, stripes or noise, they are not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sidecar.vision.grid import Grid

Floats = npt.NDArray[np.floating[Any]]

_COLOURS = 3
_GAP_PIXELS = 8
# A few tokens of a vision transformer are far out and would leave one colour to all others: the outermost hundredth on
# either side is cut off.
_PERCENTILES = (1.0, 99.0)
# Subspace iteration with more vectors than are wanted: each round shrinks the error by (eigenvalue 17 / eigenvalue 3).
_SUBSPACE = 16
_ROUNDS = 8


def draw_components(
    photo_rgb: npt.NDArray[np.uint8],
    embedding: npt.NDArray[np.float32],
    grid: Grid,
    merge: int,
    *,
    opacity: float = 0.75,
) -> Image.Image:
    """Photo and tinted photo side by side, a white gap between them.

    Args:
        photo_rgb: uint8 (height, width, 3), upright, as the model saw it before resizing.
        embedding: (tokens, width), rows in raster order.
        grid: the item's size in patches; an image's, so t is 1.
        merge: patches along a token's side (`spatial_merge_size`).
        opacity: of the colours over the photo, 0…1.

    Returns:
        An RGB picture of the photo's height; the same arguments always give the same pixels.

    Raises:
        ValueError: if the rows do not fill the grid, the grid is a video's, or a value is not finite.
    """
    rows, columns = grid.h // merge, grid.w // merge
    if grid.t != 1 or embedding.ndim != 2 or len(embedding) != rows * columns or not embedding.size:
        raise ValueError(f"an image of grid {tuple(grid)} has {rows} × {columns} tokens, got rows of {embedding.shape}")
    if not np.isfinite(embedding).all():
        raise ValueError("the embedding has values that are not finite")
    height, width, _ = photo_rgb.shape
    colours = _as_bytes(principal_components(embedding)).reshape(rows, columns, _COLOURS)
    photo = Image.fromarray(photo_rgb)
    tint = Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)
    picture = Image.new("RGB", (2 * width + _GAP_PIXELS, height), "white")
    picture.paste(photo, (0, 0))
    picture.paste(Image.blend(photo, tint, opacity), (width + _GAP_PIXELS, 0))
    return picture


def principal_components(rows: Floats) -> Floats:
    """The first three principal components of rows (n, width), as (n, 3); zero where there are fewer.

    A direction's sign is arbitrary, so it is fixed: the entry that is largest in size is positive.
    """
    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    # A few products with thin matrices instead of a decomposition whose time grows with width³ (6 s at 3584).
    start = np.random.default_rng(0).standard_normal((centred.shape[1], min(_SUBSPACE, *centred.shape)))
    basis, _ = np.linalg.qr(start)
    for _ in range(_ROUNDS):
        basis, _ = np.linalg.qr(centred.T @ (centred @ basis))
    _, _, rotation = np.linalg.svd(centred @ basis, full_matrices=False)
    directions = (basis @ rotation.T)[:, :_COLOURS]
    largest = np.abs(directions).argmax(axis=0)
    directions *= np.where(directions[largest, np.arange(directions.shape[1])] < 0, -1.0, 1.0)
    components = np.zeros((len(rows), _COLOURS))
    components[:, : directions.shape[1]] = centred @ directions
    return components


def _as_bytes(components: Floats) -> npt.NDArray[np.uint8]:
    """Each column stretched to 0…255, a constant one to the middle."""
    low, high = np.percentile(components, _PERCENTILES, axis=0)
    span = high - low
    # What is left of a constant column is rounding.
    flat = span <= 1e-6 * max(float(np.abs(components).max()), np.finfo(np.float64).tiny)
    scaled = np.clip((components - low) / np.where(flat, 1.0, span), 0.0, 1.0)
    return np.where(flat, 127.5, scaled * 255.0).round().astype(np.uint8)
