"""What a checkpoint's processor files say is followed to the pixel, or refused by name: never ignored."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from sidecar.vision.pixels import image_patches
from sidecar.vision.processors import pixel_spec
from sidecar.vision.spec import PixelSpec, SpecError, TowerSpec

TOWER = TowerSpec(
    depth=2, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=64, fullatt_block_indexes=(1,)
)
# Every field that transformers 5 saves of a Qwen2.5-VL processor, with its default.
DEFAULTS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(PixelSpec().image_mean),
    "image_std": list(PixelSpec().image_std),
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "data_format": "channels_first",
    "merge_size": 2,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "crop_size": None,
    "do_center_crop": None,
    "do_pad": False,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
}


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"image_mean": 0.5, "image_std": 0.25},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
        {"max_pixels": None, "do_convert_rgb": False},
        {"size": {"shortest_edge": 784, "longest_edge": 28 * 28 * 9}},
        {"min_pixels": 784, "max_pixels": 28 * 28 * 9, "size": {"shortest_edge": 1, "longest_edge": 2}},
    ],
    ids=str,
)
def test_what_is_honoured_gives_the_values_of_transformers(stated: dict[str, Any]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    config = {**DEFAULTS, **stated}
    image = np.random.default_rng(0).integers(0, 256, (200, 150, 3), np.uint8)
    processor = Qwen2VLImageProcessorPil(**{k: v for k, v in config.items() if k != "image_processor_type"})
    expected = processor(images=[image], return_tensors="np")["pixel_values"]

    spec = pixel_spec(config, config, TOWER)

    patches = image_patches(image, TOWER, spec).values.astype(np.float64).reshape(len(expected), 3, -1)
    mean, deviation = (np.array(values)[:, None] for values in (spec.image_mean, spec.image_std))
    ours = (patches * spec.rescale_factor - mean) / deviation
    np.testing.assert_allclose(ours.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)


def test_settings_that_are_stated_as_they_are_by_default_change_no_fingerprint() -> None:
    video = {**DEFAULTS, "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}}
    del video["image_processor_type"]
    video |= {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 2.0, "do_sample_frames": True}
    assert pixel_spec(DEFAULTS, video, TOWER) == pixel_spec({}, {}, TOWER) == pixel_spec(None, None, TOWER)
    assert pixel_spec(None, None, TOWER) == PixelSpec()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"resample": 0}, r"resample is 0; only 3 \(bicubic\) is supported"),
    ({"do_resize": False}, "do_resize is false; only true is supported"),
    ({"patch_size": 16}, r"patch_size is 16, but config.json's vision_config.patch_size is 14; they must be equal"),
    ({"merge_size": 4}, r"merge_size is 4, but config.json's vision_config.spatial_merge_size is 2"),
    ({"temporal_patch_size": 1}, r"temporal_patch_size is 1, but config.json's"),
    ({"image_processor_type": "CLIPImageProcessor"}, "is CLIPImageProcessor; only Qwen2VL.* is supported"),
    ({"feature_extractor_type": "CLIPFeatureExtractor", "image_processor_type": None}, "is CLIPFeatureExtractor; only"),
    ({"auto_map": {"AutoImageProcessor": "mine.Processor"}}, "auto_map names code of the checkpoint's own"),
    ({"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}, "do_center_crop is true; .* no such step"),
    ({"do_pad": True}, "do_pad is true"),
    ({"do_flip_channel_order": True}, "do_flip_channel_order is true; the sidecar has no such step"),
    ({"cap_pixels_per_frame": True}, "cap_pixels_per_frame is true"),
    ({"image_mean": [0.1, 0.2, 0.3, 0.4]}, "image_mean has 4 numbers; there must be one or 3"),
    ({"image_std": ["a", 1, 1]}, 'image_std is "a"; it must be a number'),
    ({"do_rescale": "no"}, 'do_rescale is "no"; it must be true or false'),
    ({"size": 448}, r'size is 448; only bounds of the area are supported: \{"shortest_edge": min_pixels'),
    ({"size": {"height": 448, "width": 448}}, r'size is \{"height": 448, "width": 448\}; only bounds'),
]


@pytest.mark.parametrize(("stated", "message"), REFUSED, ids=[str(stated) for stated, _ in REFUSED])
def test_what_would_change_pixels_is_refused_by_name(stated: dict[str, Any], message: str) -> None:
    config = {**DEFAULTS, **stated}
    with pytest.raises(SpecError, match=f"the image processor's .*{message}"):
        pixel_spec(config, config, TOWER)
    with pytest.raises(SpecError, match=f"the video processor's .*{message}"):
        pixel_spec(DEFAULTS, config, TOWER)


def test_a_size_that_is_not_stated_is_transformers_own_and_must_be_the_tower_s() -> None:
    tower = TowerSpec.from_dict({**TOWER.to_dict(), "patch_size": 16, "window_size": 128})
    with pytest.raises(SpecError, match="patch_size is not stated, which means 14, but .* is 16"):
        pixel_spec({"min_pixels": 784}, None, tower)


def test_videos_that_are_normalised_otherwise_than_images_are_refused() -> None:
    with pytest.raises(
        SpecError, match=r"the video processor's image_mean is \(0.5, 0.5, 0.5\), the image processor's"
    ):
        pixel_spec({}, {"image_mean": 0.5}, TOWER)


def test_settings_that_are_not_known_are_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert pixel_spec({**DEFAULTS, "sharpness": 3, "do_sharpen": False}, None, TOWER) == PixelSpec()
    assert "does not know and ignores: do_sharpen, sharpness" in caplog.text
