"""optimum's pair of graphs: what goes into them, and directories that nobody sealed.

The graphs are a stand-in that takes and computes what optimum's do, so that this runs without optimum-intel;
tests/export/test_optimum.py has the real ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers.vision_utils import get_vision_window_index

from sidecar.adopted import adopt_optimum, is_optimum_directory, read_ir
from sidecar.artifact import Artifact, ArtifactError
from sidecar.runtimes import held
from sidecar.runtimes.base import Load, Runtime, RuntimeFault
from sidecar.runtimes.loading import load_runtime
from sidecar.runtimes.optimum import merger_inputs, window_order
from sidecar.runtimes.optimum_pair import EMBEDDINGS, MERGER, pair_files
from sidecar.vision.dtypes import DType
from sidecar.vision.grid import Grid
from sidecar.vision.spec import PixelSpec, TowerSpec
from sidecar.vision.tower import Tower, rotate
from sidecar.vision.windows import plan_windows

PIXELS = PixelSpec(image_mean=(0.5, 0.4, 0.3), image_std=(0.3, 0.25, 0.2))
TOWER = TowerSpec(
    depth=2, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=64, fullatt_block_indexes=(1,)
)
# Less than a window, one window, ragged both ways, three frames, whole windows.
GRIDS = [Grid(1, 2, 4), Grid(1, 8, 8), Grid(1, 10, 18), Grid(3, 12, 6), Grid(1, 16, 24)]


class MergerGraph(nn.Module):
    """What optimum's patcher makes of Qwen2.5-VL's tower without its patch embedding."""

    def __init__(self, tower: Tower, *, windows: bool) -> None:
        super().__init__()
        self.tower, self.windows = tower, windows

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, *rest: Tensor) -> Tensor:
        spec = self.tower.spec
        window_mask, window_index, angles = rest if self.windows else (attention_mask, *rest)

        def ordered(rows: Tensor) -> Tensor:
            return rows.unflatten(0, (-1, spec.merge_unit))[window_index].flatten(0, 1)

        x, angles = ordered(hidden_states), ordered(angles)
        angles = torch.cat((angles, angles), dim=-1)
        for block in self.tower.blocks:
            qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, spec.num_heads, spec.head_dim)).permute(1, 2, 0, 3)
            query, key = (rotate(part, angles.cos(), angles.sin()) for part in (qkv[0], qkv[1]))
            mask = attention_mask if block.full_attention else window_mask
            mixed = functional.scaled_dot_product_attention(query, key, qkv[2], attn_mask=mask)
            x = x + block.attn.proj(mixed.transpose(0, 1).flatten(1))
            x = x + block.mlp(block.norm2(x))
        return self.tower.merger(x)[torch.argsort(window_index)]


class EmbeddingsGraph(nn.Module):
    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.weight = nn.Parameter(tower.patch_embed.proj.weight.flatten(1), requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return functional.linear(hidden_states, self.weight)


def make_tower() -> Tower:
    torch.manual_seed(3)
    tower = Tower(TOWER, PIXELS)
    for name, weight in tower.named_parameters():
        weight.data = 1 + torch.randn(weight.shape) / 4 if "norm" in name else torch.randn(weight.shape) / 6
    return tower.eval()


def save(module: nn.Module, inputs: dict[str, Tensor], shapes: list[list[int]], path: Path) -> None:
    model = ov.convert_model(module, example_input=tuple(inputs.values()))
    for port, name, shape in zip(model.inputs, inputs, shapes, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(ov.PartialShape(shape))
    model.validate_nodes_and_infer_types()
    ov.save_model(model, path, compress_to_fp16=False)


def write_merger(tower: Tower, path: Path, *, windows: bool = True) -> None:
    n, side = 64, -1
    inputs = {"hidden_states": torch.randn(n, TOWER.hidden_size), "attention_mask": torch.zeros(1, n, n)}
    shapes = [[side, TOWER.hidden_size], [1, side, side]]
    if windows:
        inputs["window_attention_mask"] = torch.zeros(1, n, n)
        shapes.append([1, side, side])
    inputs |= {"window_index": torch.arange(n // 4), "rotary_pos_emb": torch.randn(n, TOWER.head_dim // 2)}
    save(MergerGraph(tower, windows=windows), inputs, [*shapes, [side], [side, TOWER.head_dim // 2]], path)


@pytest.fixture(scope="module")
def tower() -> Tower:
    return make_tower()


@pytest.fixture(scope="module")
def made(tower: Tower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as `optimum-cli export openvino` leaves it, but for the language model."""
    directory = tmp_path_factory.mktemp("optimum") / "some-model"
    directory.mkdir()
    save(
        EmbeddingsGraph(tower),
        {"hidden_states": torch.randn(4, TOWER.patch_width)},
        [[-1, TOWER.patch_width]],
        directory / EMBEDDINGS,
    )
    write_merger(tower, directory / MERGER)
    config = {
        "model_type": "qwen2_5_vl",
        "dtype": "bfloat16",
        "vision_config": {**TOWER.to_dict(), "model_type": "qwen2_5_vl"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    numbers = {**PIXELS.to_dict(), "min_pixels": 3136, "max_pixels": 784000}
    (directory / "preprocessor_config.json").write_text(json.dumps(numbers))
    return directory


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "some-model")


def load(artifact: Artifact, **changes: Any) -> Runtime:
    values = {
        "graph": artifact.path(artifact.manifest.variants[0].graph),
        "precision": artifact.manifest.variants[0].precision,
        "tower": artifact.manifest.tower,
        "pixels": artifact.manifest.pixels,
        "output_dtype": DType.FLOAT32,
    }
    return load_runtime("optimum", Load(**{**values, **changes}))


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


grids = st.builds(lambda t, h, w: Grid(t, 2 * h, 2 * w), st.integers(1, 3), st.integers(1, 13), st.integers(1, 13))


@settings(max_examples=60, deadline=None)
@given(grids)
def test_tokens_are_ordered_and_grouped_as_transformers_does(grid: Grid) -> None:
    index, lengths = window_order(grid, TOWER)
    expected, bounds = get_vision_window_index(torch.tensor([grid]), 2, TOWER.window_size, TOWER.patch_size)
    assert index.dtype == np.int64
    np.testing.assert_array_equal(index, expected.numpy())
    # A side that fills its windows gives transformers empty ones on top.
    np.testing.assert_array_equal(lengths, [length for length in bounds.diff().tolist() if length])


@settings(max_examples=30, deadline=None)
@given(grids)
def test_masks_join_what_shares_a_window_or_a_frame_and_nothing_else(grid: Grid) -> None:
    inputs = merger_inputs(grid, TOWER)
    patches = (inputs["window_index"][:, None] * TOWER.merge_unit + np.arange(TOWER.merge_unit)).reshape(-1)
    frame, place = np.divmod(patches, grid.h * grid.w)
    token_row, token_column = np.divmod(place // TOWER.merge_unit, grid.w // 2)
    window = np.stack([frame, token_row // TOWER.window_side, token_column // TOWER.window_side])
    shares_window = (window[:, :, None] == window[:, None, :]).all(0)
    for name, shared in (("attention_mask", frame[:, None] == frame), ("window_attention_mask", shares_window)):
        assert inputs[name].dtype == np.float32
        np.testing.assert_array_equal(inputs[name][0], np.where(shared, np.float32(0), np.float32(-np.inf)))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_angles_turn_as_our_own_graph_s(grid: Grid) -> None:
    plan = plan_windows([grid], TOWER)
    angles = merger_inputs(grid, TOWER)["rotary_pos_emb"][plan.patch_order]
    np.testing.assert_allclose(np.cos(np.tile(angles, 2)), plan.rotary_cos, atol=1e-6)
    np.testing.assert_allclose(np.sin(np.tile(angles, 2)), plan.rotary_sin, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_several_items_at_once_are_embedded_as_float32_torch_does(made: Path, tower: Tower, dtype: Any) -> None:
    patches = np.random.default_rng(0).integers(0, 256, (sum(grid.patches for grid in GRIDS), TOWER.patch_width))
    patches = patches.astype(dtype)
    plan = plan_windows(GRIDS, TOWER)
    inputs = [torch.from_numpy(array.copy()) for array in (patches[plan.patch_order], *plan.tower_inputs.values())]
    with torch.no_grad():
        expected = tower(*inputs).numpy()
    runtime = load(adopt_optimum(made), precision="f32")
    embeddings = runtime.encode(patches, GRIDS, TOWER)
    assert np.linalg.norm(embeddings - expected) <= 1e-5 * np.linalg.norm(expected)
    narrow = load(adopt_optimum(made), precision="f32", output_dtype=DType.BFLOAT16).encode(patches, GRIDS, TOWER)
    assert narrow.dtype == np.uint16
    assert np.abs((narrow.astype(np.uint32) << 16).view(np.float32) - expected).max() < np.abs(expected).max() / 100


def test_it_says_where_it_runs(made: Path) -> None:
    assert load(adopt_optimum(made)).device.startswith("CPU (")


def test_memory_is_given_back_and_results_stay(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "_AFTER_S", 0.0)
    monkeypatch.setattr(held, "_LEAST_PATCHES", 1)
    runtime = load(adopt_optimum(made), precision="f32")
    patches = np.random.default_rng(0).integers(
        0, 256, (sum(grid.patches for grid in GRIDS), TOWER.patch_width), np.uint8
    )
    before = runtime.encode(patches, GRIDS, TOWER)
    for _ in range(3):
        assert runtime.release_memory() and not runtime.release_memory()
        np.testing.assert_array_equal(runtime.encode(patches, GRIDS, TOWER), before)


def test_graphs_of_another_model_are_refused(directory: Path, tower: Tower) -> None:
    artifact = adopt_optimum(directory)
    wider = TowerSpec.from_dict({**TOWER.to_dict(), "out_hidden_size": 96})
    with pytest.raises(RuntimeFault, match=r"merger.*width of 96"):
        load(artifact, tower=wider)
    write_merger(tower, directory / MERGER, windows=False)
    with pytest.raises(RuntimeFault, match="not exported from a Qwen2.5-VL"):
        load(artifact)


def test_an_unsealed_directory_is_an_artifact_of_its_own(directory: Path, tmp_path: Path) -> None:
    assert is_optimum_directory(directory) and not is_optimum_directory(tmp_path)
    artifact = adopt_optimum(directory)
    manifest = artifact.manifest
    (variant,) = manifest.variants
    assert (variant.name, variant.graph, variant.accuracy) == ("optimum/f32", MERGER, None)
    assert variant.files == tuple(path.name for path in pair_files(Path(MERGER)))
    assert (manifest.tower, manifest.pixels.image_mean) == (TOWER, PIXELS.image_mean)
    assert (manifest.pixels.max_pixels, manifest.pixels.video_max_pixels) == (784000, 784000)
    assert (manifest.checkpoint.source, manifest.checkpoint.dtype) == ("some-model", DType.BFLOAT16)
    artifact.verify()
    assert sorted(path.name for path in directory.iterdir()) == sorted(artifact.hashes)

    moved = directory.rename(tmp_path / "elsewhere")
    assert adopt_optimum(moved).manifest.fingerprint == manifest.fingerprint
    weights = bytearray((moved / MERGER).with_suffix(".bin").read_bytes())
    weights[-1] ^= 1
    (moved / MERGER).with_suffix(".bin").write_bytes(weights)
    assert adopt_optimum(moved).manifest.fingerprint != manifest.fingerprint


def test_files_that_change_after_adoption_are_noticed(directory: Path) -> None:
    artifact = adopt_optimum(directory)
    with (directory / EMBEDDINGS).open("a") as file:
        file.write(" ")
    with pytest.raises(ArtifactError, match=EMBEDDINGS):
        artifact.verify(artifact.manifest.variants[0].files)


@pytest.mark.parametrize("name", [*(path.name for path in pair_files(Path(MERGER))), "config.json"])
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(ArtifactError, match=rf"lacks {name}"):
        adopt_optimum(directory)


def test_without_preprocessing_nothing_is_guessed(directory: Path) -> None:
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(ArtifactError, match=r"copy preprocessor_config\.json"):
        adopt_optimum(directory)
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": {"image_mean": [0.1, 0.2, 0.3]}}))
    assert adopt_optimum(directory).manifest.pixels.image_mean == (0.1, 0.2, 0.3)


def test_preprocessing_that_the_sidecar_does_not_follow_is_refused(directory: Path) -> None:
    change_json(directory / "preprocessor_config.json", do_center_crop=True)
    with pytest.raises(ArtifactError, match="do_center_crop is true"):
        adopt_optimum(directory)


def test_another_model_or_a_broken_config_is_refused(directory: Path) -> None:
    change_json(directory / "config.json", model_type="qwen2_vl")
    with pytest.raises(ArtifactError, match="qwen2_vl"):
        adopt_optimum(directory)
    change_json(directory / "config.json", model_type="qwen2_5_vl", vision_config={"depth": 2})
    with pytest.raises(ArtifactError, match=r"lacks vision_config\.hidden_size"):
        adopt_optimum(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"config\.json is not readable JSON"):
        adopt_optimum(directory)


@pytest.mark.parametrize(
    ("weights", "precision"),
    [
        ({"f32": 900, "i64": 5000}, "f32"),
        ({"bf16": 900, "f32": 40}, "bf16"),
        ({"f16": 900}, "bf16"),
        ({"i8": 900, "f16": 60, "bf16": 70}, "int8"),
        ({"u8": 900, "f32": 70}, "int8"),
    ],
)
def test_precision_is_that_of_most_weights(tmp_path: Path, weights: dict[str, int], precision: str) -> None:
    graph = write_ir(tmp_path, weights)
    assert read_ir(graph).precision == precision
    assert read_ir(graph).versions == {"optimum-intel": "2.2.0", "transformers": "5.0.0"}


def test_four_bit_weights_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="u4"):
        read_ir(write_ir(tmp_path, {"u4": 900, "f16": 60}))
    (tmp_path / MERGER).write_text("<net><layers>")
    with pytest.raises(ArtifactError, match="no OpenVINO graph"):
        read_ir(tmp_path / MERGER)


def write_ir(directory: Path, weights: dict[str, int]) -> Path:
    layers = "".join(
        f'<layer type="Const"><data element_type="{kind}" size="{size}"/></layer>' for kind, size in weights.items()
    )
    versions = '<optimum><optimum_intel_version value="2.2.0"/><transformers_version value="5.0.0"/></optimum>'
    path = directory / MERGER
    path.write_text(f'<net><layers>{layers}<layer type="Add"/></layers><rt_info>{versions}</rt_info></net>')
    return path
