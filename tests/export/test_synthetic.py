"""Synthetic checkpoints: what they hold, that transformers loads them, and that their embeddings tell things apart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from export import synthetic, synthetic_config
from export.checkpoint import Checkpoint, open_checkpoint
from export.synthetic import Layout, make_checkpoint, synthetic_kind
from sidecar.vision.checkpoint_files import read_header
from sidecar.vision.grid import Grid
from sidecar.vision.tower import Tower
from sidecar.vision.windows import plan_windows

# Full windows, and ragged ones on both edges.
GRIDS = [Grid(1, 20, 26), Grid(1, 8, 8), Grid(2, 4, 18)]


def random_patches(count: int, width: int, seed: int = 0) -> Tensor:
    """Patches with contrasts between and inside them, uint8."""
    random = np.random.default_rng(seed)
    values = random.uniform(0, 255, (count, 1)) + random.normal(0, 40, (count, width))
    return torch.from_numpy(values.clip(0, 255).astype(np.uint8))


def embed(opened: Checkpoint, patches: Tensor, grids: list[Grid], **tower: Any) -> Tensor:
    network = Tower(opened.tower, opened.pixels, **tower)
    network.load_state_dict(dict(opened), strict=True, assign=True)
    plan = plan_windows(grids, opened.tower)
    inputs = {name: torch.from_numpy(array) for name, array in plan.tower_inputs.items()}
    with torch.no_grad():
        embeddings: Tensor = network(patches[torch.from_numpy(plan.patch_order).long()], **inputs)
    return embeddings


def normalised(opened: Checkpoint, patches: Tensor) -> Tensor:
    """What an image processor hands to transformers for these patches."""
    channels = opened.tower.in_channels
    mean = torch.tensor(opened.pixels.image_mean).repeat_interleave(patches.shape[1] // channels)
    std = torch.tensor(opened.pixels.image_std).repeat_interleave(patches.shape[1] // channels)
    return (patches.float() * opened.pixels.rescale_factor - mean) / std


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("toy", tmp_path_factory.mktemp("checkpoints") / "toy")


@pytest.fixture(scope="module")
def model(toy: Path) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(toy).eval()


def test_random_names_are_told_from_checkpoints() -> None:
    assert [synthetic_kind(f"random:{kind}") for kind in ("toy", "3b", "7b")] == ["toy", "3b", "7b"]
    assert synthetic_kind("Qwen/Qwen2.5-VL-3B-Instruct") is None
    assert synthetic_kind("/data/random") is None
    with pytest.raises(ValueError, match="random checkpoints are random:toy, random:3b, random:7b"):
        synthetic_kind("random:72b")


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(files="sharded"),
        Layout(prefix="model.visual.", config="transformers5"),
    ],
)
def test_transformers_loads_every_tensor_and_sees_what_the_tower_sees(tmp_path: Path, layout: Layout) -> None:
    directory = make_checkpoint("toy", tmp_path / "toy", layout=layout)
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    opened = open_checkpoint(str(directory))
    patches = random_patches(sum(grid.patches for grid in GRIDS), opened.tower.patch_width)

    with torch.no_grad():
        theirs = model.model.visual(normalised(opened, patches), grid_thw=torch.tensor(GRIDS)).pooler_output
    ours = embed(opened, patches, GRIDS)

    assert ours.shape == theirs.shape == (sum(grid.tokens(opened.tower) for grid in GRIDS), 128)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    assert cosine_similarity(ours, theirs).min() > 1 - 1e-6


def test_the_seed_decides_the_weights_and_the_layout_does_not(tmp_path: Path, toy: Path) -> None:
    def weights(name: str, **options: Any) -> dict[str, Tensor]:
        return dict(open_checkpoint(str(make_checkpoint("toy", tmp_path / name, **options))))

    first = dict(open_checkpoint(str(toy)))
    moved = weights("moved", layout=Layout(prefix="model.visual.", files="sharded", config="transformers5"))
    narrow = weights("narrow", dtype="bfloat16")
    other = weights("other", seed=1)
    for name, tensor in first.items():
        assert torch.equal(tensor, moved[name])
        assert torch.equal(tensor.bfloat16(), narrow[name])
        assert not torch.equal(tensor, other[name])


def test_a_directory_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        make_checkpoint("toy", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_after_32_blocks_different_patches_still_have_different_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(synthetic_config._TOY_VISION, "depth", 32)
    opened = open_checkpoint(str(make_checkpoint("toy", tmp_path / "deep")))
    assert opened.tower.depth == 32
    grid = [Grid(1, 12, 18)]
    patches = random_patches(grid[0].patches, opened.tower.patch_width)
    exact = embed(opened, patches, grid)
    assert 0.2 < exact.pow(2).mean().sqrt() < 2
    rows = torch.nn.functional.normalize(exact, dim=-1)
    likeness = (rows @ rows.T)[~torch.eye(len(rows), dtype=torch.bool)]
    assert likeness.median() < 0.7
    assert likeness.max() < 0.999
    # As a trained tower does, it bears narrow weights: else an artifact's measured accuracy would mean little.
    rounded = open_checkpoint(str(make_checkpoint("toy", tmp_path / "narrow", dtype="bfloat16")))
    assert cosine_similarity(embed(rounded, patches, grid), exact).min() > 0.999


@pytest.mark.parametrize("change", ["windows", "positions"])
def test_embeddings_notice_windows_and_positions(toy: Path, change: str) -> None:
    opened = open_checkpoint(str(toy))
    plan = plan_windows(GRIDS, opened.tower)
    patches = random_patches(sum(grid.patches for grid in GRIDS), opened.tower.patch_width)
    network = Tower(opened.tower, opened.pixels)
    network.load_state_dict(dict(opened), strict=True)
    inputs = {name: torch.from_numpy(array) for name, array in plan.tower_inputs.items()}
    wrong = dict(inputs)
    if change == "positions":
        wrong["rotary_cos"], wrong["rotary_sin"] = (
            torch.ones_like(inputs["rotary_cos"]),
            torch.zeros_like(inputs["rotary_sin"]),
        )
    else:
        wrong["ragged_mask"] = torch.zeros_like(inputs["ragged_mask"])
    ordered = patches[torch.from_numpy(plan.patch_order).long()]
    with torch.no_grad():
        assert cosine_similarity(network(ordered, **inputs), network(ordered, **wrong)).min() < 0.98


def test_answers_depend_on_the_image(toy: Path, model: Qwen2_5_VLForConditionalGeneration) -> None:
    tokenizer, opened = AutoTokenizer.from_pretrained(toy), open_checkpoint(str(toy))
    grid = Grid(1, 12, 16)
    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * grid.tokens(opened.tower))
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert (ids == model.config.image_token_id).sum() == grid.tokens(opened.tower)

    def answer(seed: int) -> list[int]:
        pixels = normalised(opened, random_patches(grid.patches, opened.tower.patch_width, seed))
        given = {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid])}
        kinds = {"mm_token_type_ids": (ids == model.config.image_token_id).int()}
        tokens: list[int] = model.generate(input_ids=ids, **given, **kinds, max_new_tokens=8, min_new_tokens=8)[
            0
        ].tolist()
        return tokens[ids.shape[1] :]

    answers = [answer(seed) for seed in range(3)]
    assert answers[0] == answer(0)
    assert len({tuple(tokens) for tokens in answers}) == 3


def test_the_toy_tokenizer_is_qwens_in_small(toy: Path) -> None:
    tokenizer, config = AutoTokenizer.from_pretrained(toy), json.loads((toy / "config.json").read_text())
    assert type(tokenizer).__name__.startswith("Qwen2Tokenizer")
    assert len(tokenizer) == config["vocab_size"] == 512
    named = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>"}
    named |= {"vision_end": "<|vision_end|>", "vision": "<|vision_pad|>", "bos": "<|endoftext|>", "eos": "<|im_end|>"}
    for name, token in named.items():
        assert tokenizer.encode(token) == [config[f"{name}_token_id"]]
    text = "Ünïcode, 漢字 and 🙂: any text comes back.\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("kind", "width", "language_tensors", "gigabytes"), [("3b", 2048, 434, 7.5), ("7b", 3584, 339, 16.6)]
)
def test_real_sizes_have_every_published_tensor_and_write_only_the_towers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, width: int, language_tensors: int, gigabytes: float
) -> None:
    written: list[str] = []
    write_shard = synthetic._write_shard

    def write_holes(path: Path, weights: Any, *arguments: Any) -> None:
        written.extend(weight.name for weight in weights if not weight.hole)
        write_shard(path, [weight._replace(hole=True) for weight in weights], *arguments)

    monkeypatch.setattr(synthetic, "_write_shard", write_holes)
    directory = make_checkpoint(kind, tmp_path / kind)

    assert len(written) == 390 and all(name.startswith("visual.") for name in written)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == 390 + language_tensors
    assert index["metadata"]["total_size"] / 1e9 == pytest.approx(gigabytes, abs=0.1)
    shards = sorted(directory.glob("*.safetensors"))
    assert all(shard.stat().st_size < 5.1e9 for shard in shards)
    held = {tensor.name: (shard.name, tensor) for shard in shards for tensor in read_header(shard, shard.name)}
    assert {name: shard for name, (shard, _) in held.items()} == index["weight_map"]
    opened = open_checkpoint(str(directory))
    assert (opened.tower.depth, opened.tower.hidden_size, opened.tower.head_dim) == (32, 1280, 80)
    assert (opened.tower.intermediate_size, opened.tower.out_hidden_size) == (3420, width)
    assert opened.tower.fullatt_block_indexes == (7, 15, 23, 31)
    assert sum(math.prod(held[name][1].shape) for name in written) == opened.tower.parameters
    assert opened.dtype == torch.bfloat16
