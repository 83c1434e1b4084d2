"""What vLLM's scheduler knows of an image or video, and what a sidecar is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.synthetic_config import model_config
from sidecar.integrations.vllm.features import UnsupportedFeatureError, Wanted, has_pixels, wanted_of
from sidecar.pb import encoder_pb2 as pb
from sidecar.vision.grid import Grid
from sidecar.vision.spec import PixelSpec, TowerSpec

TOWER = TowerSpec.from_config(model_config("toy", "float32"))
PIXELS = PixelSpec()
GRID = Grid(1, 4, 6)

quick = settings(max_examples=25, deadline=None)


@dataclass
class Position:
    num_embeds: int
    offset: int = 0

    @property
    def length(self) -> int:
        return self.num_embeds

    def get_num_embeds(self) -> int:
        return self.num_embeds


class Data:
    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def get_data(self) -> dict[str, Any]:
        return self._values


@dataclass
class Feature:
    data: Data | None
    mm_position: Position
    modality: str = "image"
    identifier: str = "key"
    mm_hash: str | None = field(default="key")


def feature(values: Any = None, grid: Grid = GRID, **more: Any) -> Feature:
    """An image with `values` for its pixels."""
    data = {"image_grid_thw": torch.tensor(grid)} | ({} if values is None else {"pixel_values": values})
    return Feature(Data(data), Position(grid.tokens(TOWER)), **more)


def picture(grid: Grid = GRID, seed: int = 0, *, equal_slices: bool = True) -> torch.Tensor:
    """Patches in uint8 as a processor gives them, (N, C·T·P·P)."""
    shape = (grid.patches, TOWER.in_channels, TOWER.temporal_patch_size, TOWER.patch_size**2)
    values = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    if equal_slices:
        values[:, :, 1:] = values[:, :, :1]
    return torch.from_numpy(values.reshape(grid.patches, -1))


def single_slice(values: torch.Tensor) -> bytes:
    slices = values.numpy().reshape(len(values), TOWER.in_channels, TOWER.temporal_patch_size, -1)
    return slices[:, :, 0].tobytes()


def statistics(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation for each value of a patch."""
    each = count // TOWER.in_channels
    mean = torch.tensor(PIXELS.image_mean).repeat_interleave(each)
    return mean, torch.tensor(PIXELS.image_std).repeat_interleave(each)


def with_pillow(values: torch.Tensor) -> torch.Tensor:
    """transformers' slow processor: rescale in float64, then normalise in float32."""
    mean, std = statistics(values.shape[1])
    scaled = (values.numpy().astype(np.float64) * PIXELS.rescale_factor).astype(np.float32)
    return torch.from_numpy((scaled - mean.numpy()) / std.numpy())


def with_torchvision(values: torch.Tensor) -> torch.Tensor:
    """transformers' fast processor: one fused normalisation, mean and deviation divided by the factor."""
    mean, std = statistics(values.shape[1])
    return (values.to(torch.float32) - mean * (1.0 / PIXELS.rescale_factor)) / (std * (1.0 / PIXELS.rescale_factor))


def on_device(values: torch.Tensor) -> torch.Tensor:
    """vLLM's own: a factor and a summand for each channel."""
    mean, std = statistics(values.shape[1])
    return values.to(torch.float32) * (PIXELS.rescale_factor / std) - mean / std


FORMULAS = pytest.mark.parametrize("formula", [with_pillow, with_torchvision, on_device])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def item(values: torch.Tensor, grid: Grid = GRID, pixels: PixelSpec | None = PIXELS) -> pb.Item:
    return Wanted("key", grid, grid.tokens(TOWER), values).item(TOWER, pixels)


def test_uint8_goes_as_it_is_one_slice_of_it() -> None:
    sent = item(values := picture())
    assert sent.key == ""  # the sidecar names it by its content
    assert sent.patches.dtype == pb.UINT8 and sent.patches.scale == pb.Patches.PIXELS
    assert sent.patches.single_slice
    assert sent.patches.data == single_slice(values)
    assert (sent.patches.grid.t, sent.patches.grid.h, sent.patches.grid.w) == GRID


def test_unequal_slices_are_sent_whole() -> None:
    sent = item(values := picture(equal_slices=False))
    assert not sent.patches.single_slice
    assert sent.patches.data == values.numpy().tobytes()


def test_slices_that_differ_in_one_value_are_unequal() -> None:
    values = picture()
    values[-1, -1] ^= 1
    assert not item(values).patches.single_slice


def test_a_video_is_sent_whole() -> None:
    grid = Grid(2, 4, 4)
    sent = item(values := picture(grid), grid)
    assert not sent.patches.single_slice
    assert sent.patches.data == values.numpy().tobytes()


@FORMULAS
@DTYPES
def test_normalised_pixels_come_back_exactly(formula: Any, dtype: torch.dtype) -> None:
    """All 256 of them, in each channel: bfloat16 has a name for each."""
    levels = torch.arange(256, dtype=torch.uint8).repeat(-(-GRID.patches * TOWER.patch_width // 256))
    values = levels[: GRID.patches * TOWER.patch_width].reshape(GRID.patches, -1)
    sent = item(formula(values).to(dtype))
    assert sent.patches.dtype == pb.UINT8 and sent.patches.scale == pb.Patches.PIXELS
    got = np.frombuffer(sent.patches.data, np.uint8).astype(int)
    wrong = np.abs(got - values.numpy().reshape(-1).astype(int))
    # Two neighbours may share a bfloat16; whichever is taken, it gives that very bfloat16 again.
    assert wrong.max() <= (1 if dtype is torch.bfloat16 else 0)
    again = formula(torch.from_numpy(got.astype(np.uint8)).reshape(values.shape)).to(dtype)
    assert torch.equal(again, formula(values).to(dtype))


@FORMULAS
@quick
@given(seed=st.integers(0, 2**32 - 1), h=st.integers(1, 4), w=st.integers(1, 4))
def test_a_normalised_image_is_sent_as_its_pixels_once(formula: Any, seed: int, h: int, w: int) -> None:
    grid = Grid(1, 2 * h, 2 * w)
    values = picture(grid, seed)
    sent = item(formula(values), grid)
    assert sent.patches.single_slice
    assert sent.patches.data == single_slice(values)


@DTYPES
def test_what_stands_for_no_whole_pixels_is_sent_as_it_is(dtype: torch.dtype) -> None:
    """Halfway between two pixels, where the dtype can tell; bfloat16 can near the mean."""
    values = with_pillow(torch.full_like(picture(), 120))
    values += 0.5 * PIXELS.rescale_factor / 0.27
    values = values.to(dtype)
    sent = item(values)
    names = {torch.float32: pb.FLOAT32, torch.float16: pb.FLOAT16, torch.bfloat16: pb.BFLOAT16}
    assert sent.patches.dtype == names[dtype] and sent.patches.scale == pb.Patches.NORMALISED
    assert sent.patches.single_slice
    half = values.reshape(len(values), TOWER.in_channels, TOWER.temporal_patch_size, -1)[:, :, 0]
    assert sent.patches.data == half.contiguous().view(torch.uint8).numpy().tobytes()


def test_without_the_models_statistics_floats_are_sent_as_they_are() -> None:
    values = with_pillow(picture(equal_slices=False))
    sent = item(values, pixels=None)
    assert sent.patches.dtype == pb.FLOAT32
    assert sent.patches.data == values.numpy().tobytes()


def test_floats_that_are_no_pixels_at_all_are_left_to_the_sidecar_to_judge() -> None:
    values = torch.full(picture().shape, float("nan"))
    assert item(values).patches.dtype == pb.FLOAT32


def test_a_tensor_that_needs_gradients_or_is_a_view_is_sent_too() -> None:
    values = with_pillow(picture())
    wide = torch.cat([values, values], dim=1).requires_grad_()[:, : values.shape[1]]
    assert item(wide).patches.data == item(values).patches.data


@pytest.mark.parametrize(
    "values", [picture()[:-1], picture().reshape(-1), picture().to(torch.int64)], ids=["a row short", "flat", "int64"]
)
def test_patches_that_do_not_fit_are_a_value_error(values: torch.Tensor) -> None:
    with pytest.raises(ValueError):
        item(values)


def test_an_image_is_wanted_under_vllms_identifier() -> None:
    wanted = wanted_of(feature(values := picture()), TOWER)
    assert wanted is not None
    assert (wanted.key, wanted.grid, wanted.tokens) == ("key", GRID, GRID.tokens(TOWER))
    assert wanted.pixels is values


def test_a_grid_may_have_a_batchs_shape() -> None:
    one = feature()
    assert one.data is not None
    one.data.get_data()["image_grid_thw"] = torch.tensor([GRID])
    wanted = wanted_of(one, TOWER)
    assert wanted is not None and wanted.grid == GRID


def test_a_video_has_keys_of_its_own() -> None:
    grid = Grid(3, 4, 4)
    data = {"video_grid_thw": torch.tensor([grid]), "pixel_values_videos": (values := picture(grid))}
    video = Feature(Data(data), Position(grid.tokens(TOWER)), modality="video")
    wanted = wanted_of(video, TOWER)
    assert wanted is not None and wanted.grid == grid and wanted.pixels is values
    assert has_pixels(video)


def test_a_metadata_only_item_is_wanted_by_its_key_alone() -> None:
    """Its identifier is the caller's uuid; vLLM has no hash of content that it does not have."""
    wanted = wanted_of(feature(identifier="uuid", mm_hash=None), TOWER)
    assert wanted is not None and wanted.key == "uuid" and wanted.pixels is None
    assert not has_pixels(feature())


@pytest.mark.parametrize("modality", ["image", "video"])
def test_an_embedding_that_came_with_the_request_is_asked_of_nobody(modality: str) -> None:
    data = {f"{modality}_embeds": torch.zeros(6, 8), f"{modality}_grid_thw": torch.tensor(GRID)}
    inline = Feature(Data(data), Position(6), modality=modality)
    assert wanted_of(inline, TOWER) is None
    assert not has_pixels(inline)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (feature(picture(), modality="audio"), "not audio"),
        (feature(picture(), identifier="lora-key"), "LoRA"),
        (Feature(Data({"pixel_values": picture()}), Position(6)), "image_grid_thw"),
        (Feature(None, Position(6)), "image_grid_thw"),
        (Feature(Data({"image_grid_thw": torch.tensor(GRID)}), Position(5)), "room for 5"),
    ],
    ids=["audio", "LoRA", "no grid", "no data", "pruned"],
)
def test_what_no_sidecar_can_do_is_said(given: Feature, said: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=said) as raised:
        wanted_of(given, TOWER)
    assert "\n" not in str(raised.value)


def test_without_data_there_are_no_pixels() -> None:
    assert not has_pixels(Feature(None, Position(6)))
    assert has_pixels(feature(picture()))


@quick
@given(t=st.integers(1, 4), h=st.integers(1, 8), w=st.integers(1, 8), room=st.integers(0, 300))
def test_only_as_many_embeddings_as_the_prompt_has_room_for(t: int, h: int, w: int, room: int) -> None:
    grid = Grid(t, 2 * h, 2 * w)
    one = Feature(Data({"video_grid_thw": torch.tensor(grid)}), Position(room), modality="video")
    if room == t * h * w:
        wanted = wanted_of(one, TOWER)
        assert wanted is not None and wanted.tokens == room
    else:
        with pytest.raises(UnsupportedFeatureError, match="pruning"):
            wanted_of(one, TOWER)
