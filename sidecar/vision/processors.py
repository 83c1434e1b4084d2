"""The processors' files of a checkpoint as a `PixelSpec`, or a refusal of what the sidecar's pixels would not follow.

Every setting of transformers' Qwen2VLImageProcessor and Qwen2VLVideoProcessor (transformers 5, models/qwen2_vl) is either
honoured, known not to change pixels, or refused with its name. A setting that is ignored would give other embeddings than
vLLM's under the same fingerprint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from sidecar.vision.spec import PixelSpec, SpecError, TowerSpec

logger = logging.getLogger(__name__)

# Where transformers keeps its processors' numbers: nested in one file since version 5, before that in one each.
NESTED_PROCESSORS = "processor_config.json"
IMAGE_PROCESSOR = "preprocessor_config.json"
VIDEO_PROCESSOR = "video_preprocessor_config.json"
PROCESSOR_FILES = (NESTED_PROCESSORS, IMAGE_PROCESSOR, VIDEO_PROCESSOR)

Config = Mapping[str, Any]

_BICUBIC = 3  # PIL.Image.Resampling
# transformers appends Fast (version 4) or Pil (version 5); an unknown Qwen2_5_VL… falls back to Qwen2VL… by model_type.
_TYPES = {
    "image": ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor"),
    "video": ("Qwen2VLVideoProcessor", "Qwen2_5_VLVideoProcessor", "Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor"),
}
# The only value under which the sidecar's pixels are transformers' own, and what a file that is silent means.
_FIXED: dict[str, Any] = {"do_resize": True, "resample": _BICUBIC}
# Steps that Qwen2-VL's processors do not have; one that is asked for was meant for another processor.
_NEVER = ("do_center_crop", "do_pad", "do_thumbnail", "cap_pixels_per_frame", "crop_to_patches")
# The processors' names of the tower's numbers, and what transformers assumes where a file is silent.
_OF_TOWER = {
    "patch_size": ("patch_size", 14),
    "temporal_patch_size": ("temporal_patch_size", 2),
    "merge_size": ("spatial_merge_size", 2),
}
_HONOURED = {
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    *("size", "min_pixels", "max_pixels"),
}
# What changes no pixel: names of classes, the form of arguments and results, and which frames are taken of a film, which is
# the caller's choice. Pictures are RGB before a processor sees them, here as in vLLM, so do_convert_rgb has nothing to do.
_HARMLESS = {
    *("image_processor_type", "video_processor_type", "feature_extractor_type", "processor_class", "model_input_names"),
    *("do_convert_rgb", "default_to_square", "crop_size", "pad_size", "data_format", "input_data_format", "device"),
    *("return_tensors", "disable_grouping", "image_seq_length", "do_sample_frames", "fps", "num_frames", "min_frames"),
    *("max_frames", "max_video_tokens", "use_token_compression", "video_metadata", "return_metadata"),
    *("transformers_version", "backend", "use_fast"),
}


def processor_configs(read: Callable[[str], Config | None]) -> tuple[Config | None, Config | None]:
    """Find the image and the video processor's configuration, None where there is none.

    In transformers' order: the nested file first, then one file for each; videos fall back to the image file, as published
    Qwen2.5-VL checkpoints need it.

    Args:
        read: gives a parsed file of `PROCESSOR_FILES`, or None.
    """
    nested, image_file = read(NESTED_PROCESSORS) or {}, read(IMAGE_PROCESSOR)
    image = nested.get("image_processor") or image_file
    video = nested.get("video_processor") or read(VIDEO_PROCESSOR) or image_file
    return image, video


def pixel_spec(image: Config | None, video: Config | None, tower: TowerSpec) -> PixelSpec:
    """Read both processors' configurations, as `processor_configs` finds them; None stands for the defaults.

    Bounds appear as `min_pixels`/`max_pixels` in older files and as `size.shortest_edge`/`size.longest_edge` (areas too,
    despite the name) in newer ones.

    Raises:
        SpecError: if a setting changes pixels in a way that the sidecar does not follow, contradicts the tower, or is of a
            wrong form.
    """
    statistics = {}
    bounds: dict[str, Any] = {}
    for kind, config in (("image", image), ("video", video)):
        stated = {name: value for name, value in (config or {}).items() if value is not None}
        _check(kind, stated, tower)
        statistics[kind] = _statistics(kind, stated, tower.in_channels)
        bounds |= _bounds(kind, stated)
    if image is not None and video is not None and statistics["image"] != statistics["video"]:
        different = [name for name in statistics["image"] if statistics["image"][name] != statistics["video"][name]]
        raise SpecError(
            f"the video processor's {different[0]} is {statistics['video'][different[0]]}, the image processor's "
            f"{statistics['image'][different[0]]}; only checkpoints that normalise both alike are supported"
        )
    return PixelSpec(**statistics["image"], **bounds)


def _check(kind: str, stated: Config, tower: TowerSpec) -> None:
    """Refuse what changes pixels otherwise than the sidecar does."""
    where = f"the {kind} processor's"
    name = "video_processor_type" if kind == "video" and "video_processor_type" in stated else "image_processor_type"
    named = str(stated.get(name, stated.get("feature_extractor_type", _TYPES[kind][0])))
    if named.removesuffix("Fast").removesuffix("Pil") not in _TYPES[kind]:
        raise SpecError(f"{where} {name} is {named}; only {_TYPES[kind][0]} is supported, as in every Qwen2.5-VL")
    if "auto_map" in stated:
        raise SpecError(f"{where} auto_map names code of the checkpoint's own; only {_TYPES[kind][0]} is supported")
    for name, only in _FIXED.items():
        if stated.get(name, only) != only:
            meant = f"{only} (bicubic)" if name == "resample" else _json(only)
            raise SpecError(f"{where} {name} is {_json(stated[name])}; only {meant} is supported")
    for name in stated:
        if stated[name] is not False and (name in _NEVER or (name.startswith("do_") and name not in _KNOWN)):
            raise SpecError(
                f"{where} {name} is {_json(stated[name])}; the sidecar has no such step. Set it to false if the "
                "model was trained without it"
            )
    for name, (field, default) in _OF_TOWER.items() if stated else ():
        if stated.get(name, default) != getattr(tower, field):
            said = _json(stated[name]) if name in stated else f"not stated, which means {default}"
            raise SpecError(
                f"{where} {name} is {said}, but config.json's vision_config.{field} is {getattr(tower, field)}; "
                "they must be equal"
            )
    if unknown := sorted(stated.keys() - _KNOWN):
        logger.warning(
            "%s configuration has settings that the sidecar does not know and ignores: %s", where, ", ".join(unknown)
        )


_KNOWN = _HONOURED | _HARMLESS | {*_FIXED, *_NEVER, *_OF_TOWER}


def _statistics(kind: str, stated: Config, channels: int) -> dict[str, Any]:
    """What rescaling and normalising do, as PixelSpec has it: a step that is switched off becomes one that changes nothing."""
    spec = PixelSpec()
    found: dict[str, Any] = {"rescale_factor": spec.rescale_factor}
    if "rescale_factor" in stated:
        found["rescale_factor"] = _number(kind, "rescale_factor", stated["rescale_factor"])
    if not _switch(kind, "do_rescale", stated):
        found["rescale_factor"] = 1.0
    normalised = _switch(kind, "do_normalize", stated)
    for name, neutral in (("image_mean", 0.0), ("image_std", 1.0)):
        value = stated.get(name, getattr(spec, name))
        if not isinstance(value, (list, tuple)):  # transformers takes one number for all channels
            value = [value] * channels
        if len(value) != channels:
            raise SpecError(f"the {kind} processor's {name} has {len(value)} numbers; there must be one or {channels}")
        numbers = tuple(_number(kind, name, number) for number in value)
        found[name] = numbers if normalised else (neutral,) * channels
    return found


def _bounds(kind: str, stated: Config) -> dict[str, int]:
    size = stated.get("size", {})
    if not isinstance(size, Mapping) or "height" in size or "width" in size:
        raise SpecError(
            f"the {kind} processor's size is {_json(size)}; only bounds of the area are supported: "
            '{"shortest_edge": min_pixels, "longest_edge": max_pixels}'
        )
    found = {}
    for bound, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        number = next((n for n in (stated.get(bound), size.get(bound), size.get(edge)) if n is not None), None)
        if number is not None:
            found[bound if kind == "image" else f"video_{bound}"] = int(_number(kind, bound, number))
    return found


def _switch(kind: str, name: str, stated: Config) -> bool:
    value = stated.get(name, True)
    if not isinstance(value, bool):
        raise SpecError(f"the {kind} processor's {name} is {_json(value)}; it must be true or false")
    return value


def _json(value: Any) -> str:
    """A value as the file writes it, cut where it is long."""
    return json.dumps(value, default=str)[:80]


def _number(kind: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SpecError(f"the {kind} processor's {name} is {_json(value)}; it must be a number")
    return float(value)
