"""The two value objects that say what a vision tower is, as its checkpoint states it.

`TowerSpec` holds the network's numbers, `PixelSpec` the preprocessing's (read by `processors.py`). Both come from the
Hugging Face files and both are sealed into an artifact's manifest, so nothing downstream ever guesses a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

# How saved checkpoints begin the names of vision tensors: published Qwen2.5-VL, and transformers since 4.52.
VISION_PREFIXES = ("visual.", "model.visual.")

# What transformers' Qwen2_5_VLVisionConfig assumes where a config.json is silent (transformers 5, configuration_qwen2_5_vl).
_TOWER_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": (7, 15, 23, 31),
    "hidden_act": "silu",
}
# Names under which published config.json files write the same number.
_TOWER_ALIASES = {
    "in_channels": ("in_chans",),
    "patch_size": ("spatial_patch_size",),
    "num_heads": ("num_attention_heads",),
}

# OpenAI CLIP's statistics, the default of Qwen2VLImageProcessor.
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class SpecError(ValueError):
    """A checkpoint's configuration is missing a number, or states one that no Qwen2.5-VL tower can have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerSpec:
    """Sizes of one Qwen2.5-VL vision tower.

    Raises:
        SpecError: if the numbers contradict each other.
    """

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise SpecError(f"vision_config.{field.name} must be a positive integer, got {value!r}")
        if self.hidden_act != "silu":
            raise SpecError(f"vision_config.hidden_act must be 'silu' as in every Qwen2.5-VL, got {self.hidden_act!r}")
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise SpecError(
                f"vision_config.hidden_size {self.hidden_size} over num_heads {self.num_heads} must give a head width "
                "that is a multiple of 4 (two axes of rotary pairs)"
            )
        if self.window_size % (self.patch_size * self.spatial_merge_size):
            raise SpecError(
                f"vision_config.window_size {self.window_size} must be a multiple of patch_size × spatial_merge_size "
                f"({self.patch_size} × {self.spatial_merge_size})"
            )
        wrong = [index for index in self.fullatt_block_indexes if not 0 <= index < self.depth]
        if wrong:
            raise SpecError(f"vision_config.fullatt_block_indexes {wrong} lie outside the {self.depth} blocks")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2

    @property
    def patch_width(self) -> int:
        """Values in one patch: channels × frames × height × width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def image_patch_width(self) -> int:
        """Values in one patch of an image whose temporal slices are all the same picture and sent once."""
        return self.in_channels * self.patch_size**2

    @property
    def window_side(self) -> int:
        """A window's side in tokens."""
        return self.window_size // (self.patch_size * self.spatial_merge_size)

    @property
    def window_patches(self) -> int:
        """Patches in one full window."""
        return self.window_side**2 * self.merge_unit

    @property
    def parameters(self) -> int:
        """Number of weights in the tower, as transformers counts them."""
        hidden, mlp, merged = self.hidden_size, self.intermediate_size, self.hidden_size * self.merge_unit
        block = 2 * hidden + (3 * hidden * hidden + 3 * hidden) + (hidden * hidden + hidden)
        block += 2 * (hidden * mlp + mlp) + (mlp * hidden + hidden)
        merger = hidden + (merged * merged + merged) + (merged * self.out_hidden_size + self.out_hidden_size)
        return self.patch_width * hidden + self.depth * block + merger

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read the tower out of a parsed `config.json`, whichever of its published layouts it has.

        The numbers may sit under `vision_config`, under `thinker_config.vision_config`, or on the top level (a config
        saved for the vision part alone).

        Raises:
            SpecError: if a number that has no default is missing.
        """
        model_type = config.get("model_type", "")
        if model_type and not str(model_type).startswith("qwen2_5_vl"):
            raise SpecError(
                f"config.json is of model_type {model_type!r}; this project encodes for Qwen2.5-VL ('qwen2_5_vl')"
            )
        vision = config.get("vision_config", config)
        values: dict[str, Any] = {}
        for field in fields(cls):
            for name in (field.name, *_TOWER_ALIASES.get(field.name, ())):
                if vision.get(name) is not None:
                    values[field.name] = vision[name]
                    break
            else:
                if field.name in _TOWER_DEFAULTS:
                    values[field.name] = _TOWER_DEFAULTS[field.name]
        values.pop("rope_theta", None)
        rope = vision.get("rope_parameters") or {}
        if rope.get("rope_type", "axial") not in ("axial", "default"):
            raise SpecError(f"vision_config.rope_parameters.rope_type must be 'axial', got {rope['rope_type']!r}")
        if "rope_theta" in rope:
            values["rope_theta"] = float(rope["rope_theta"])
        missing = [f.name for f in fields(cls) if f.name not in values and f.name in _REQUIRED]
        if missing:
            raise SpecError(f"config.json lacks vision_config.{', vision_config.'.join(missing)}")
        for name in ("patch_size", "temporal_patch_size"):
            if isinstance(values[name], (list, tuple)):
                values[name] = _one_number(name, values[name])
        values["fullatt_block_indexes"] = tuple(values["fullatt_block_indexes"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fullatt_block_indexes": list(self.fullatt_block_indexes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`, strict about unknown and missing names."""
        return cls(**{**_known(cls, values), "fullatt_block_indexes": tuple(values["fullatt_block_indexes"])})


_REQUIRED = ("depth", "hidden_size", "num_heads", "intermediate_size", "out_hidden_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelSpec:
    """How pictures become patches: Qwen2-VL's image and video processors in numbers.

    `min_pixels` and `max_pixels` bound an image's area after resizing, the `video_` pair one frame's.
    """

    image_mean: tuple[float, ...] = _CLIP_MEAN
    image_std: tuple[float, ...] = _CLIP_STD
    rescale_factor: float = 1 / 255
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    video_min_pixels: int = 128 * 28 * 28
    video_max_pixels: int = 28 * 28 * 768

    def __post_init__(self) -> None:
        if len(self.image_mean) != len(self.image_std) or any(deviation <= 0 for deviation in self.image_std):
            raise SpecError(
                f"image_mean {self.image_mean} and image_std {self.image_std} must pair up, deviations above 0"
            )
        if not (math.isfinite(self.rescale_factor) and self.rescale_factor > 0):
            raise SpecError(f"rescale_factor must be a positive number, got {self.rescale_factor}")
        for kind in ("", "video_"):
            low, high = getattr(self, f"{kind}min_pixels"), getattr(self, f"{kind}max_pixels")
            if not 0 < low <= high:
                raise SpecError(
                    f"{kind}min_pixels and {kind}max_pixels must satisfy 0 < min ≤ max, got {low} and {high}"
                )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "image_mean": list(self.image_mean), "image_std": list(self.image_std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`, strict about unknown and missing names."""
        known = _known(cls, values)
        return cls(**{**known, "image_mean": tuple(known["image_mean"]), "image_std": tuple(known["image_std"])})


def _known(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(cls)}
    if names != set(values):
        raise SpecError(f"{cls.__name__}: unknown {sorted(set(values) - names)}, missing {sorted(names - set(values))}")
    return dict(values)


def _one_number(name: str, values: Any) -> int:
    if len(set(values)) != 1:
        raise SpecError(f"vision_config.{name} must be one number for all axes, got {values}")
    return int(values[0])
