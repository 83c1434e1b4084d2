"""Whether a sidecar holds the weights that vLLM has loaded: proven where it can be, compared where not."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoint import open_checkpoint
from export.pipeline import fingerprint_of
from export.synthetic import Layout, make_checkpoint
from sidecar.integrations.vllm.identity import (
    Identity,
    MismatchError,
    checkpoint_directory,
    checkpoint_fingerprint,
    pixel_spec,
)
from sidecar.pb import encoder_pb2 as pb
from sidecar.vision.spec import PixelSpec, TowerSpec

FIRST, SECOND = "1" * 64, "2" * 64
WEIGHT = "visual.blocks.0.norm1.weight"


def by_export(directory: Path) -> str:
    opened = open_checkpoint(str(directory))
    try:
        return fingerprint_of(opened)
    finally:
        opened.close()


def by_vllm(directory: Path) -> str:
    return checkpoint_fingerprint(directory, pixel_spec(directory, tower_of(directory)))


def tower_of(directory: Path) -> TowerSpec:
    return TowerSpec.from_config(json.loads((directory / "config.json").read_text()))


def identity(directory: Path, given: str | None = None, *, loads: bool = True) -> Identity:
    made = Identity(tower_of(directory), str(directory), None, given, loads=loads)
    made.establish()
    return made


def info(tower: TowerSpec, pixels: PixelSpec, fingerprint: str) -> pb.InfoResponse:
    """What a sidecar says of itself."""
    return pb.InfoResponse(
        fingerprint=fingerprint,
        tower=pb.TowerSpec(
            depth=tower.depth,
            hidden_size=tower.hidden_size,
            out_hidden_size=tower.out_hidden_size,
            patch_size=tower.patch_size,
            temporal_patch_size=tower.temporal_patch_size,
            spatial_merge_size=tower.spatial_merge_size,
            in_channels=tower.in_channels,
        ),
        pixels=pb.PixelSpec(image_mean=pixels.image_mean, image_std=pixels.image_std),
    )


def info_of(directory: Path, fingerprint: str) -> pb.InfoResponse:
    return info(tower_of(directory), pixel_spec(directory, tower_of(directory)), fingerprint)


@pytest.fixture
def checkpoint(toy_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the toy checkpoint that a test may change."""
    return shutil.copytree(toy_checkpoint, tmp_path / "copy")


def change(checkpoint: Path, how: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    how(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(files="sharded"),
        Layout(prefix="model.visual."),
        Layout(prefix="model.visual.", files="sharded", config="transformers5"),
    ],
    ids=["as published", "sharded", "newer names", "as transformers 5 saves it"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_it_is_the_fingerprint_that_export_seals(tmp_path: Path, layout: Layout, dtype: Any) -> None:
    directory = make_checkpoint("toy", tmp_path / "toy", dtype=dtype, layout=layout)
    assert by_vllm(directory) == by_export(directory)


def test_one_bit_of_a_weight_changes_it_and_the_language_model_does_not(checkpoint: Path) -> None:
    before = by_vllm(checkpoint)
    change(checkpoint, lambda tensors: tensors["model.norm.weight"].view(torch.int16).bitwise_xor_(1))
    assert by_vllm(checkpoint) == before
    change(checkpoint, lambda tensors: tensors[WEIGHT].view(torch.int16)[:1].bitwise_xor_(1))
    assert by_vllm(checkpoint) not in (before, "")
    assert by_vllm(checkpoint) == by_export(checkpoint)


@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_the_preprocessing_changes_it(checkpoint: Path, name: str) -> None:
    before = by_vllm(checkpoint)
    path = checkpoint / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: [0.5, 0.5, 0.5]}))
    assert by_vllm(checkpoint) == by_export(checkpoint) != before


def test_a_checkpoint_that_vllm_loads_proves_who_may_stand_in_for_it(toy_checkpoint: Path) -> None:
    ours = identity(toy_checkpoint)
    assert ours.proven and ours.expected == by_export(toy_checkpoint)
    ours.meet(info_of(toy_checkpoint, by_export(toy_checkpoint)))
    with pytest.raises(MismatchError) as raised:
        ours.meet(info_of(toy_checkpoint, FIRST))
    said = str(raised.value)
    assert FIRST[:16] in said and by_export(toy_checkpoint)[:16] in said
    assert "export the checkpoint that vLLM has loaded (toy)" in said
    assert "\n" not in said


def test_the_operators_word_is_taken(toy_checkpoint: Path) -> None:
    ours = identity(toy_checkpoint, given=FIRST)
    assert ours.proven and ours.expected == FIRST
    ours.check(FIRST)
    with pytest.raises(MismatchError, match=r"2222222222222222…, this model's is 1111111111111111…"):
        ours.check(SECOND)


def quantised(tensors: dict[str, torch.Tensor]) -> None:
    tensors[WEIGHT] = tensors[WEIGHT].to(torch.float8_e4m3fn)


def without_vision(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("visual.")]:
        del tensors[name]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda directory: change(directory, quantised), f"quantised vision tower: {WEIGHT} (F8_E4M3)"),
        (lambda directory: change(directory, without_vision), "no vision tensors"),
        (lambda directory: (directory / "model.safetensors").unlink(), "model.safetensors"),
        (lambda directory: (directory / "model.safetensors").write_bytes(b"torn"), "fingerprint"),
    ],
    ids=["quantised", "no vision tensors", "not in safetensors", "torn"],
)
def test_weights_that_cannot_be_read_prove_nothing(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(checkpoint)
    with caplog.at_level(logging.WARNING):
        ours = identity(checkpoint)
    assert not ours.proven and ours.expected is None
    assert said in caplog.text and "only its structure can be compared" in caplog.text


@pytest.mark.parametrize("given", [None, FIRST], ids=["", "with the operator's word"])
def test_preprocessing_that_no_sidecar_follows_is_refused(checkpoint: Path, given: str | None) -> None:
    path = checkpoint / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": 0}))
    ours = identity(checkpoint, given)
    with pytest.raises(MismatchError, match="resample is 0; only 3 .bicubic. is supported"):
        ours.meet(info(tower_of(checkpoint), PixelSpec(), FIRST))
    with pytest.raises(MismatchError, match="resample is 0"):
        ours.check(FIRST)


def test_made_up_weights_prove_nothing(toy_checkpoint: Path) -> None:
    assert not identity(toy_checkpoint, loads=False).proven


def test_a_checkpoint_elsewhere_proves_nothing(
    toy_checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    model = "nobody/has-such-a-model"
    assert checkpoint_directory(model, None) is None
    ours = Identity(tower_of(toy_checkpoint), model, None, None, loads=True)
    with caplog.at_level(logging.WARNING):
        ours.establish()
    assert not ours.proven and ours.pixels is None
    assert f"the checkpoint {model} is not on this host" in caplog.text
    ours.meet(info_of(toy_checkpoint, FIRST))
    assert ours.expected == FIRST


def test_what_cannot_be_proven_is_held_to_the_first_sidecar(toy_checkpoint: Path) -> None:
    ours = identity(toy_checkpoint, loads=False)
    with pytest.raises(MismatchError, match="this model's is unknown"):
        ours.check(FIRST)
    ours.meet(info_of(toy_checkpoint, FIRST))
    assert ours.expected == FIRST and not ours.proven
    ours.meet(info_of(toy_checkpoint, FIRST))
    ours.check(FIRST)
    for refused in (lambda: ours.meet(info_of(toy_checkpoint, SECOND)), lambda: ours.check(SECOND)):
        with pytest.raises(MismatchError, match=SECOND[:16]):
            refused()
    assert ours.expected == FIRST


@pytest.mark.parametrize(
    "name",
    ["depth", "hidden_size", "out_hidden_size", "patch_size", "temporal_patch_size", "spatial_merge_size"],
)
def test_what_cannot_be_proven_must_have_the_same_structure(toy_checkpoint: Path, name: str) -> None:
    ours = identity(toy_checkpoint, loads=False)
    theirs = info_of(toy_checkpoint, FIRST)
    number = getattr(theirs.tower, name)
    setattr(theirs.tower, name, number + 1)
    with pytest.raises(MismatchError, match=f"the sidecar's tower has {name} {number + 1}, this model's has {number}"):
        ours.meet(theirs)
    assert ours.expected is None


@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_what_cannot_be_proven_must_be_normalised_alike(toy_checkpoint: Path, name: str) -> None:
    ours = identity(toy_checkpoint, loads=False)
    theirs = info_of(toy_checkpoint, FIRST)
    getattr(theirs.pixels, name)[0] += 0.25
    with pytest.raises(MismatchError, match=f"the sidecar normalises with {name} "):
        ours.meet(theirs)
    assert ours.expected is None
