"""What an export leaves behind: a whole artifact, or what was there before."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from export import pipeline
from export.pipeline import ExportError, Job, export, run_stages
from export.synthetic import make_checkpoint
from sidecar.artifact import open_artifact

QUIET = Console(file=io.StringIO())


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    make_checkpoint("toy", tmp_path / "toy")
    return tmp_path / "toy"


def torch_job(model: Path, out: Path) -> Job:
    """The quickest export there is."""
    return Job(model=str(model), out=out, formats=("torch",), precisions=("f32",))


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if out.name in path.name)


def test_an_export_is_whole_and_measured_on_photos_and_eight_grids_more(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    export(torch_job(toy, out), QUIET)
    artifact = open_artifact(out)
    artifact.verify()
    (variant,) = artifact.manifest.variants
    assert variant.accuracy is not None
    assert variant.accuracy.passed
    names = [sample["name"] for sample in variant.accuracy.samples]
    assert sum(name.startswith("photo") for name in names) == 3
    assert len({tuple(sample["grid"]) for sample in variant.accuracy.samples}) >= 8
    assert any(sample["grid"][0] > 1 for sample in variant.accuracy.samples), "no video"
    assert (out / "accuracy.html").read_text().count("<tr>") > len(names)
    assert artifact.manifest.checkpoint.random_weights
    assert str(tmp_path) not in (out / "manifest.json").read_text(), "a path of this machine was sealed in"


def test_weights_that_are_not_finite_are_refused_and_nothing_is_written(toy: Path, tmp_path: Path) -> None:
    shard = next(toy.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("blocks.2.mlp.up_proj.weight"))
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, shard, {"format": "pt"})
    out = tmp_path / "artifact"
    with pytest.raises(ExportError, match="weights are damaged"):
        export(torch_job(toy, out), QUIET)
    assert beside(out) == []


@pytest.mark.parametrize("error", [RuntimeError("disk full"), KeyboardInterrupt()])
def test_a_failed_export_leaves_the_artifact_that_was_there(toy: Path, tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "artifact"
    export(torch_job(toy, out), QUIET)
    before = (out / "manifest.json").read_bytes()

    def fail(*_: object) -> pipeline.Written:
        raise error

    with pytest.raises(type(error)):
        run_stages(torch_job(toy, out), fail, QUIET)
    assert (out / "manifest.json").read_bytes() == before
    assert beside(out) == ["artifact"]


def test_what_a_killed_export_left_is_swept_and_a_living_one_s_work_is_not(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    dead, living = tmp_path / ".artifact.partial-1a-999999999", tmp_path / f".artifact.partial-1a-{os.getppid()}"
    for directory in (dead, living):
        directory.mkdir()
    export(torch_job(toy, out), QUIET)
    assert beside(out) == [living.name, "artifact"]


def _file(out: Path) -> None:
    out.write_text("not a directory")


def _full_directory(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("mine")


def _foreign_manifest(out: Path) -> None:
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "a browser extension"}')


@pytest.mark.parametrize(
    ("occupy", "message"),
    [
        (_file, "not a directory"),
        (_full_directory, "holds no artifact; choose another --out"),
        (_foreign_manifest, "holds no artifact"),
    ],
)
def test_a_destination_that_holds_something_else_is_left_alone(
    toy: Path, tmp_path: Path, occupy: Callable[[Path], None], message: str
) -> None:
    out = tmp_path / "artifact"
    occupy(out)
    with pytest.raises(ExportError, match=message):
        export(torch_job(toy, out), QUIET)
    assert out.exists()


def test_a_file_that_somebody_keeps_in_an_artifact_is_not_removed(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    export(torch_job(toy, out), QUIET)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="notes.txt, which is no part of its artifact"):
        export(torch_job(toy, out), QUIET)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_link_stays_a_link_to_the_new_artifact(toy: Path, tmp_path: Path) -> None:
    real, link = tmp_path / "volume" / "artifact", tmp_path / "artifact"
    real.mkdir(parents=True)
    link.symlink_to(real)
    export(torch_job(toy, link), QUIET)
    assert link.is_symlink()
    open_artifact(real).verify()


@pytest.mark.parametrize("out", ["/proc/nope", "FILE/artifact", "n" * 300, "/"])
def test_a_place_that_cannot_be_written_to_is_named(toy: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "FILE").write_text("")
    with pytest.raises(ExportError, match="cannot write to|names no directory"):
        export(torch_job(toy, tmp_path / out), QUIET)


@pytest.mark.parametrize(
    ("formats", "precisions", "message"),
    [
        (("gguf",), ("bf16",), "unknown format gguf; there are openvino, onnx, torch"),
        (("openvino",), ("int4",), "unknown precision int4; there are f32, bf16, int8"),
        (("torch",), ("int8",), "the torch format has no int8"),
    ],
)
def test_an_impossible_job_says_what_is_possible(
    tmp_path: Path, formats: tuple[str, ...], precisions: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export(Job(model="x", out=tmp_path / "a", formats=formats, precisions=precisions), QUIET)
