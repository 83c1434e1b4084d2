"""What vLLM's scheduler knows of one image or video, as what a sidecar is to be asked for.

`request.mm_features[i]` (vllm/multimodal/inputs.py) has an `identifier`, its place in the prompt, and `data.get_data()`: a
Qwen2.5-VL item's `pixel_values` and `image_grid_thw`, or `pixel_values_videos` and `video_grid_thw`. Recent versions hand on
uint8 pixels and normalise on the device; older ones, and `--no-mm-device-do-normalize`, hand on what the processor normalised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sidecar.items import Item, patches_item
from sidecar.vision.dtypes import Array, DType
from sidecar.vision.grid import Grid
from sidecar.vision.pixels import PixelError, given_patches
from sidecar.vision.spec import PixelSpec, TowerSpec

_KEYS = {
    "image": ("pixel_values", "image_grid_thw", "image_embeds"),
    "video": ("pixel_values_videos", "video_grid_thw", "video_embeds"),
}


class UnsupportedFeatureError(ValueError):
    """An item that no sidecar can encode as vLLM would."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One embedding that a request needs.

    Attributes:
        key: vLLM's identifier of the content: its hash of the picture, or the caller's uuid. A sidecar is told it only where
            there are no pixels to send. vLLM's hash covers no setting of its server that changes pixels, another vLLM may use
            a uuid for another picture, and a client may send any hash as its uuid; so pixels go without a name, and the
            sidecar, which hashes them, names them.
        tokens: rows that vLLM has kept room for.
        pixels: its patches as vLLM has them, (N, values) of a torch tensor; None where the request brought none, and the
            embedding is to be found under its key.
    """

    key: str
    grid: Grid
    tokens: int
    pixels: Any | None

    def item(self, tower: TowerSpec, pixels: PixelSpec | None) -> Item:
        """The contract's item: in uint8 where that loses nothing, and an image's equal temporal slices once. Takes
        milliseconds for a large image.

        Raises:
            ValueError: if the patches do not fit the grid.
        """
        values, dtype = _array(self.pixels)
        if dtype is not DType.UINT8 and pixels is not None:
            values, dtype = _as_pixels(values, dtype, self.grid, tower, pixels)
        half = _one_slice(values, tower) if self.grid.t == 1 else None
        return patches_item(values if half is None else half, self.grid, dtype, single_slice=half is not None)

    def is_of(self, other: Wanted) -> bool:
        """Whether an embedding of `other` may be taken for this one: its pixels are the same, or this has none, and comes under
        the same key. Milliseconds for large images, unless vLLM's cache of processed inputs gave both.
        """
        ours, theirs = self.pixels, other.pixels
        if ours is None or ours is theirs:
            return True
        return theirs is not None and ours.dtype == theirs.dtype and bool(ours.equal(theirs))


def wanted_of(feature: Any, tower: TowerSpec) -> Wanted | None:
    """What a sidecar is to be asked for; None where the request brought the embedding itself.

    Raises:
        UnsupportedFeatureError: if no sidecar can encode it as this vLLM would.
    """
    if feature.modality not in _KEYS:
        raise UnsupportedFeatureError(f"sidecars encode images and videos, not {feature.modality}")
    if feature.mm_hash is not None and feature.identifier != feature.mm_hash:
        raise UnsupportedFeatureError("the request's LoRA changes the vision tower, which sidecars do not know")
    data = feature.data.get_data() if feature.data is not None else {}
    pixels, grid_thw, embeds = _KEYS[feature.modality]
    if embeds in data:
        return None
    if grid_thw not in data:
        raise UnsupportedFeatureError(f"vLLM's scheduler has no {grid_thw} of it")
    grid = Grid(*(int(side) for side in data[grid_thw].reshape(-1).tolist()))
    tokens = int(feature.mm_position.get_num_embeds())
    if grid.tokens(tower) != tokens:
        raise UnsupportedFeatureError(
            f"grid {tuple(grid)} means {grid.tokens(tower)} embeddings, the prompt has room for {tokens}; "
            "sidecars do not prune videos (--video-pruning-rate)"
        )
    return Wanted(feature.identifier, grid, tokens, data.get(pixels))


def has_pixels(feature: Any) -> bool:
    """Whether vLLM's own tower could encode it."""
    return feature.data is not None and any(keys[0] in feature.data.get_data() for keys in _KEYS.values())


def _array(tensor: Any) -> tuple[Array, DType]:
    """A torch tensor's values; bfloat16 as the uint16 of its bits."""
    dtype = DType(str(tensor.dtype).removeprefix("torch."))
    tensor = tensor.detach().cpu()
    if dtype is DType.BFLOAT16:
        import torch

        return tensor.view(torch.uint16).numpy(), dtype
    return tensor.numpy(), dtype


def _as_pixels(values: Array, dtype: DType, grid: Grid, tower: TowerSpec, pixels: PixelSpec) -> tuple[Array, DType]:
    try:
        whole = given_patches(values, grid, tower, pixels, normalised=True).values
    except PixelError:  # the sidecar will say what is wrong with them
        return values, dtype
    return (whole, DType.UINT8) if whole.dtype == np.uint8 else (values, dtype)


def _one_slice(values: Array, tower: TowerSpec) -> Array | None:
    """(N, C, T, P·P) → (N, C·P·P) where all temporal slices are the same, else None."""
    if values.ndim != 2 or values.shape[1] != tower.patch_width:
        return None
    slices = values.reshape(len(values), tower.in_channels, tower.temporal_patch_size, -1)
    first = slices[:, :, :1]
    return np.ascontiguousarray(first).reshape(len(values), -1) if (slices == first).all() else None
