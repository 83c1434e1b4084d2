"""Checkpoints in directories: every layout is read as it was written, and what is wrong is said."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from export.checkpoint import CheckpointError, open_checkpoint
from export.files import pack_header
from export.synthetic import Layout, make_checkpoint
from sidecar.vision.spec import PixelSpec
from sidecar.vision.tower import Tower

INDEX = "model.safetensors.index.json"
QKV = "visual.blocks.0.attn.qkv.weight"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return make_checkpoint("toy", tmp_path / "toy")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint("toy", tmp_path / "sharded", layout=Layout(files="sharded"))


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load(path.read_bytes())
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("prefix", ["visual.", "model.visual."])
@pytest.mark.parametrize("files", ["single", "sharded"])
@pytest.mark.parametrize("config", ["published", "transformers5"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_layout_is_read_as_it_was_written(
    tmp_path: Path, prefix: Any, files: Any, config: Any, dtype: Any
) -> None:
    layout = Layout(prefix=prefix, files=files, config=config)
    directory = make_checkpoint("toy", tmp_path / "some-model", dtype=dtype, layout=layout)
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 1 or (files == "single" and shards[0].name == "model.safetensors")
    written = {
        name: tensor for shard in shards for name, tensor in load(shard.read_bytes()).items() if name.startswith(prefix)
    }

    opened = open_checkpoint(str(directory))

    read = dict(opened)
    assert list(read) == list(opened.names) == sorted(name.removeprefix(prefix) for name in written)
    assert len(opened) == len(written)
    for name, tensor in read.items():
        assert tensor.dtype == opened.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, written[prefix + name])
    Tower(opened.tower, opened.pixels).load_state_dict(read, strict=True)
    assert (opened.tower.depth, opened.tower.spatial_merge_size, opened.tower.out_hidden_size) == (4, 2, 128)
    assert (opened.pixels.min_pixels, opened.pixels.max_pixels) == (3136, 12845056)
    assert (opened.pixels.video_min_pixels, opened.pixels.video_max_pixels) == (3136, 12845056)
    assert opened.source == "some-model" and opened.random_weights


def test_weights_are_mapped_from_the_file_and_not_copied(toy: Path) -> None:
    opened = open_checkpoint(str(toy))
    address = opened.tensor("blocks.0.attn.qkv.weight").data_ptr()
    mappings = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(toy) in line]
    spans = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in mappings]
    assert any(low <= address < high for low, high in spans)


def test_ten_gigabytes_of_language_tensors_cost_nothing(toy: Path) -> None:
    tensors = load((toy / "model.safetensors").read_bytes())
    vision = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    language_bytes = 10_000_000_000
    entries = [("model.embed_tokens.weight", "F32", (language_bytes // 4,), language_bytes)]
    entries += [(name, "F32", tuple(tensor.shape), tensor.nbytes) for name, tensor in vision.items()]
    with (toy / "model.safetensors").open("wb") as file:
        file.write(pack_header(entries))
        file.seek(language_bytes, os.SEEK_CUR)
        for tensor in vision.values():
            file.write(tensor.numpy().tobytes())

    def cost() -> tuple[float, int, int]:
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        read_bytes = int(Path("/proc/self/io").read_text().split()[1])
        return time.perf_counter(), resident_pages * os.sysconf("SC_PAGESIZE"), read_bytes

    open_checkpoint(str(toy))  # so that imports and first uses are not counted
    before = cost()
    opened = open_checkpoint(str(toy))
    assert all(torch.equal(tensor, vision[f"visual.{name}"]) for name, tensor in opened)
    seconds, resident, read = (after - start for after, start in zip(cost(), before, strict=True))
    assert seconds < 2
    assert resident < 50_000_000
    assert read < 1_000_000


def test_mixed_dtypes_are_kept_and_the_widest_is_named(toy: Path) -> None:
    def narrow_matrices(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items() if tensor.ndim > 1})

    change_tensors(toy, narrow_matrices)
    opened = open_checkpoint(str(toy))
    assert opened.dtype == torch.float32
    assert opened.tensor("blocks.0.attn.qkv.weight").dtype == torch.bfloat16
    assert opened.tensor("blocks.0.norm1.weight").dtype == torch.float32


def test_bfloat16_beside_float16_is_float32_since_neither_holds_the_other(tmp_path: Path) -> None:
    directory = make_checkpoint("toy", tmp_path / "toy", dtype="bfloat16")
    change_tensors(directory, lambda tensors: tensors.update({QKV: tensors[QKV].half()}))
    assert open_checkpoint(str(directory)).dtype == torch.float32


def test_a_quantised_language_model_beside_a_float_tower_is_fine(toy: Path) -> None:
    change_json(toy / "config.json", quantization_config={"quant_method": "awq"})
    change_tensors(
        toy, lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(8, 8, dtype=torch.int32)})
    )
    assert len(open_checkpoint(str(toy))) == 54


def test_an_index_goes_before_a_single_file(sharded: Path) -> None:
    save_file({QKV: torch.zeros(1)}, sharded / "model.safetensors")
    assert open_checkpoint(str(sharded)).tensor("blocks.0.attn.qkv.weight").shape == (192, 64)


BOUNDS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "published: of images, and of videos too": (
        {"preprocessor_config.json": {"min_pixels": 1, "max_pixels": 2}},
        {"min_pixels": 1, "max_pixels": 2, "video_min_pixels": 1, "video_max_pixels": 2},
    ),
    "as size": (
        {"preprocessor_config.json": {"size": {"shortest_edge": 3, "longest_edge": 4}}},
        {"min_pixels": 3, "max_pixels": 4, "video_min_pixels": 3, "video_max_pixels": 4},
    ),
    "null is not stated": (
        {"preprocessor_config.json": {"min_pixels": None, "max_pixels": None, "size": {"shortest_edge": 5}}},
        {"min_pixels": 5, "video_min_pixels": 5},
    ),
    "videos in a file of their own": (
        {
            "preprocessor_config.json": {"min_pixels": 1, "max_pixels": 2},
            "video_preprocessor_config.json": {"size": {"shortest_edge": 6, "longest_edge": 7}},
        },
        {"min_pixels": 1, "max_pixels": 2, "video_min_pixels": 6, "video_max_pixels": 7},
    ),
    "nested goes before files": (
        {
            "preprocessor_config.json": {"min_pixels": 1, "max_pixels": 2},
            "processor_config.json": {
                "image_processor": {"size": {"shortest_edge": 8, "longest_edge": 9}},
                "video_processor": {"size": {"shortest_edge": 10, "longest_edge": 11}},
            },
        },
        {"min_pixels": 8, "max_pixels": 9, "video_min_pixels": 10, "video_max_pixels": 11},
    ),
    "a processor file with nothing nested": (
        {"preprocessor_config.json": {"min_pixels": 1}, "processor_config.json": {"processor_class": "P"}},
        {"min_pixels": 1, "video_min_pixels": 1},
    ),
}


@pytest.mark.parametrize(("files", "stated"), BOUNDS.values(), ids=BOUNDS)
def test_pixel_bounds_come_from_the_file_that_transformers_would_ask(
    toy: Path, files: dict[str, Any], stated: dict[str, int]
) -> None:
    (toy / "preprocessor_config.json").unlink()
    for name, content in files.items():
        change_json(toy / name, **content)
    assert open_checkpoint(str(toy)).pixels == PixelSpec(**stated)


def test_without_preprocessing_files_defaults_are_assumed_aloud(toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (toy / "preprocessor_config.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert open_checkpoint(str(toy)).pixels == PixelSpec()
    assert "no image processor configuration: Qwen2.5-VL's defaults are assumed" in caplog.text


# What a user's directory can be like, and what they are told.
TENSOR_FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "a tensor is missing": (lambda t: t.pop(QKV), r"lacks vision tensors .* blocks\.0\.attn\.qkv\.weight"),
    "one too many": (
        lambda t: t.update({"visual.pos_embed": torch.zeros(1)}),
        r"no Qwen2\.5-VL tower .* has: pos_embed",
    ),
    "a wrong shape": (lambda t: t.update({QKV: torch.zeros(2, 3)}), r"qkv\.weight is \(2, 3\) instead of \(192, 64\)"),
    "AWQ": (
        lambda t: t.update({"visual.x.qweight": torch.zeros(1, dtype=torch.int32)}),
        r"quantised .*qweight \(I32\)",
    ),
    "FP8": (lambda t: t.update({QKV: t[QKV].to(torch.float8_e4m3fn)}), r"quantised .*F8_E4M3.* Give the checkpoint"),
    "both names": (lambda t: t.update({f"model.{QKV}": t[QKV].clone()}), "holds blocks.0.attn.qkv.weight twice"),
    "text only": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("visual.")],
        r"no vision tensors .* give a whole Qwen2\.5-VL",
    ),
}


@pytest.mark.parametrize(("change", "message"), TENSOR_FAULTS.values(), ids=TENSOR_FAULTS)
def test_wrong_tensors_are_explained(toy: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    change_tensors(toy, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(toy))


FILE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard absent": (lambda d: first_shard(d).unlink(), "lacks model-00001-of-.*, which its index lists"),
    "shard cut short": (lambda d: os.truncate(first_shard(d), 100_000), "model-00001.* is truncated: .* has 100000"),
    "shard empty": (lambda d: os.truncate(first_shard(d), 0), "model-00001.* is no safetensors file"),
    "shard is a git-lfs pointer": (
        lambda d: first_shard(d).write_text("version https://git-lfs"),
        "run `git lfs pull`",
    ),
    "header garbled": (
        lambda d: first_shard(d).write_bytes(b"\x10" + bytes(7) + b"{" * 99),
        "damaged safetensors header",
    ),
    "bytes after the end": (lambda d: os.truncate(first_shard(d), 10_000_000), "or a damaged one"),
    "index is no JSON": (lambda d: (d / INDEX).write_text('{"weight_map": {'), f"{INDEX} .* is not readable JSON"),
    "index is a list": (lambda d: (d / INDEX).write_text("[]"), "must be a JSON object, got list"),
    "index without a map": (lambda d: (d / INDEX).write_text("{}"), "has no weight_map"),
    "index leads outside": (lambda d: remap(d, "../x.safetensors"), "'../x.safetensors', which is no file name"),
    "index does not list the shard": (
        lambda d: unlist(d, first_shard(d).name),
        rf"lacks vision tensors .* {INDEX} does not list model-00001.*: if they are there, remove that file",
    ),
    "no weights": (lambda d: (d / INDEX).unlink() or no_shards(d), r"has no weights: expected model\.safetensors or"),
    "pickled weights": (
        lambda d: (d / INDEX).rename(d / "pytorch_model.bin") and no_shards(d),
        r"\(pickle\).* give a checkpoint in safetensors",
    ),
    "config absent": (lambda d: (d / "config.json").unlink(), r"has no config\.json"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), r"config\.json .* is not readable JSON"),
    "Qwen2-VL": (lambda d: change_json(d / "config.json", model_type="qwen2_vl"), r"'qwen2_vl'.*Qwen2\.5-VL"),
    "Llama": (lambda d: change_json(d / "config.json", model_type="llama"), r"'llama'.*Qwen2\.5-VL"),
    "no tower sizes": (lambda d: change_json(d / "config.json", vision_config={}), r"lacks vision_config\.depth"),
    "sizes of a wrong type": (
        lambda d: change_json(d / "config.json", vision_config=[1]),
        "vision_config must be an object",
    ),
    "pixels made otherwise": (
        lambda d: change_json(d / "preprocessor_config.json", resample=0),
        r"the image processor's resample is 0; only 3 \(bicubic\) is supported",
    ),
    "bounds the wrong way": (lambda d: change_json(d / "preprocessor_config.json", max_pixels=1), "min ≤ max"),
}


def first_shard(directory: Path) -> Path:
    return min(directory.glob("model-00001-*"))


def no_shards(directory: Path) -> None:
    for shard in directory.glob("*.safetensors"):
        shard.unlink()


def unlist(directory: Path, shard: str) -> None:
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    change_json(directory / INDEX, weight_map={name: file for name, file in weight_map.items() if file != shard})


def remap(directory: Path, shard: str) -> None:
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    change_json(directory / INDEX, weight_map={**weight_map, QKV: shard})


@pytest.mark.parametrize(("change", "message"), FILE_FAULTS.values(), ids=FILE_FAULTS)
def test_damaged_directories_are_explained(sharded: Path, change: Callable[[Path], object], message: str) -> None:
    change(sharded)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(sharded))
    assert str(sharded) not in str(caught.value)  # messages travel further than paths should


def test_what_is_no_checkpoint_directory_is_explained(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no directory"):
        open_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="is a file: give the directory"):
        open_checkpoint(str(toy / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"a revision .* is for hub ids only"):
        open_checkpoint(str(toy), revision="main")
