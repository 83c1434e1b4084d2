"""The fingerprint: equal where embeddings are interchangeable, different wherever they might not be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file

from export.checkpoint import open_checkpoint
from export.pipeline import Job, export, fingerprint_of
from export.synthetic import Layout, make_checkpoint
from sidecar.artifact import open_artifact

quick = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def checkpoint(toy_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the toy checkpoint that a test may change."""
    return shutil.copytree(toy_checkpoint, tmp_path / "copy")


def fingerprint(directory: Path) -> str:
    opened = open_checkpoint(str(directory))
    try:
        return fingerprint_of(opened)
    finally:
        opened.close()


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_an_artifact_has_the_fingerprint_of_its_checkpoint(toy_checkpoint: Path, toy_artifact: Path) -> None:
    assert open_artifact(toy_artifact).manifest.fingerprint == fingerprint(toy_checkpoint)


def test_runtime_and_precision_have_no_part_in_it(toy_checkpoint: Path, toy_artifact: Path, tmp_path: Path) -> None:
    """OpenVINO in f32 and bf16 there, torch in bf16 here."""
    job = Job(model=str(toy_checkpoint), out=tmp_path / "torch", formats=("torch",), precisions=("bf16",))
    assert export(job, Console(quiet=True)).manifest.fingerprint == open_artifact(toy_artifact).manifest.fingerprint


@quick
@given(data=st.data())
def test_one_weight_changed_by_one_bit_changes_it(toy_checkpoint: Path, tmp_path: Path, data: st.DataObject) -> None:
    tensors = load_file(toy_checkpoint / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(name for name in tensors if name.startswith("visual."))))
    bits = tensors[name].view(torch.int16).reshape(-1)
    place, bit = data.draw(st.integers(0, len(bits) - 1)), data.draw(st.integers(0, 14))
    bits[place] ^= 1 << bit
    copy = tmp_path / "changed"
    shutil.copytree(toy_checkpoint, copy, dirs_exist_ok=True)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(copy) != fingerprint(toy_checkpoint)


def test_two_tensors_swapped_change_it(checkpoint: Path, toy_checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    first, second = "visual.blocks.0.norm1.weight", "visual.blocks.0.norm2.weight"
    tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(checkpoint) != fingerprint(toy_checkpoint)


def test_the_language_model_has_no_part_in_it(checkpoint: Path, toy_checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    language = [name for name in tensors if not name.startswith("visual.")]
    assert language
    for name in language:
        tensors[name].view(torch.int16).bitwise_xor_(1)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(checkpoint) == fingerprint(toy_checkpoint)


@pytest.mark.parametrize(
    ("name", "value"),
    [("fullatt_block_indexes", [1]), ("num_heads", 2), ("window_size", 56)],
    ids=lambda value: str(value),
)
def test_the_tower_is_part_of_it(checkpoint: Path, toy_checkpoint: Path, name: str, value: object) -> None:
    """Numbers that no weight's shape shows."""
    change_json(checkpoint / "config.json", lambda config: config["vision_config"].update({name: value}))
    assert fingerprint(checkpoint) != fingerprint(toy_checkpoint)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_mean", [0.5, 0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0.5]),
        ("max_pixels", 1_000_000),
        ("rescale_factor", 1.0),
    ],
    ids=lambda value: str(value),
)
def test_the_preprocessing_is_part_of_it(checkpoint: Path, toy_checkpoint: Path, name: str, value: object) -> None:
    change_json(checkpoint / "preprocessor_config.json", lambda config: config.update({name: value}))
    assert fingerprint(checkpoint) != fingerprint(toy_checkpoint)


def test_another_seed_has_another(toy_checkpoint: Path, tmp_path: Path) -> None:
    other = make_checkpoint("toy", tmp_path / "other", dtype="bfloat16", seed=1)
    assert fingerprint(other) != fingerprint(toy_checkpoint)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(files="sharded"),
        Layout(prefix="model.visual."),
        Layout(prefix="model.visual.", files="sharded", config="transformers5"),
    ],
    ids=["sharded", "newer names", "as transformers 5 saves it"],
)
def test_how_a_checkpoint_is_saved_has_no_part_in_it(toy_checkpoint: Path, tmp_path: Path, layout: Layout) -> None:
    other = make_checkpoint("toy", tmp_path / "other", dtype="bfloat16", layout=layout)
    assert fingerprint(other) == fingerprint(toy_checkpoint)
