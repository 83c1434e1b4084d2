"""`--via optimum`: the reference that our own graph is compared with, and directories of optimum-cli's own.

What needs optimum-intel runs where `make optimum-env` was run, or EPD_OPTIMUM_PYTHON names a Python that has it.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from export.accuracy import Rows, reference_embeddings, relative_error, row_cosine
from export.checkpoint import open_checkpoint
from export.optimum import PYTHON_VARIABLE, export_via_optimum, optimum_python
from export.pipeline import ExportError, Job, export
from export.samples import Sample
from export.synthetic import make_checkpoint
from sidecar.adopted import adopt_optimum, is_optimum_directory
from sidecar.artifact import Artifact, open_artifact
from sidecar.runtimes.base import Load, Runtime
from sidecar.runtimes.loading import load_runtime
from sidecar.runtimes.optimum_pair import EMBEDDINGS, MERGER
from sidecar.vision.dtypes import DType, to_float32
from sidecar.vision.grid import Grid
from sidecar.vision.pixels import Patches

# One window, ragged both ways, less than a window, a video, whole windows only, more tokens than bfloat16 can count.
GRIDS = [Grid(1, 8, 8), Grid(1, 14, 22), Grid(1, 2, 6), Grid(3, 10, 12), Grid(1, 16, 16), Grid(1, 40, 44)]

# Exports take about 20 s each on two free cores.
pytestmark = pytest.mark.timeout(900)


def environment() -> str | None:
    """The Python with optimum-intel. The one that runs the tests does not count: it has the newer transformers."""
    beside = Path(__file__).parents[2] / ".venv-optimum" / "bin" / "python"
    return os.environ.get(PYTHON_VARIABLE) or (str(beside) if beside.exists() else None)


needs_optimum = pytest.mark.skipif(environment() is None, reason="no optimum-intel: `make optimum-env` installs it")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("toy", tmp_path_factory.mktemp("checkpoint") / "toy", dtype="bfloat16")


@pytest.fixture(scope="module")
def theirs(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Sealed, by optimum-intel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PYTHON_VARIABLE, environment() or "")
        job = Job(
            model=str(toy), out=tmp_path_factory.mktemp("theirs") / "artifact", precisions=("f32", "bf16", "int8")
        )
        return export_via_optimum(job, quiet())


@pytest.fixture(scope="module")
def ours(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(Job(model=str(toy), out=tmp_path_factory.mktemp("ours") / "artifact", precisions=("f32",)), quiet())


@pytest.fixture(scope="module")
def unsealed(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole model, as `optimum-cli export openvino` writes it for anyone."""
    out = tmp_path_factory.mktemp("unsealed") / "toy-openvino"
    cli = Path(environment() or "").with_name("optimum-cli")
    command = [cli, "export", "openvino", "--model", toy, "--task", "image-text-to-text", out]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert result.returncode == 0, result.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def pictures() -> list[Sample]:
    random = np.random.default_rng(5)
    return [Sample(str(grid), Patches(random.integers(0, 256, (grid.patches, 1176), np.uint8), grid)) for grid in GRIDS]


@pytest.fixture(scope="module")
def references(toy: Path, pictures: list[Sample]) -> list[Rows]:
    return reference_embeddings(open_checkpoint(str(toy)), pictures, lambda: None)


def quiet() -> Console:
    return Console(file=io.StringIO())


def load(artifact: Artifact, precision: str, dtype: DType = DType.FLOAT32) -> Runtime:
    manifest = artifact.manifest
    variant = next(variant for variant in manifest.variants if variant.precision == precision)
    values = Load(
        graph=artifact.path(variant.graph),
        precision=precision,
        tower=manifest.tower,
        pixels=manifest.pixels,
        output_dtype=dtype,
    )
    return load_runtime(variant.runtime, values)


@needs_optimum
@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in one run"])
def test_our_graph_and_optimum_s_agree_with_float32_torch_and_each_other(
    ours: Artifact, theirs: Artifact, pictures: list[Sample], references: list[Rows], together: bool
) -> None:
    runtimes, tower = [load(ours, "f32"), load(theirs, "f32")], ours.manifest.tower
    if together:
        patches, expected = np.concatenate([picture.patches.values for picture in pictures]), np.concatenate(references)
        runs = [(patches, GRIDS, expected)]
    else:
        runs = [(p.patches.values, [p.grid], rows) for p, rows in zip(pictures, references, strict=True)]
    for patches, grids, expected in runs:
        our_rows, their_rows = (runtime.encode(patches, grids, tower) for runtime in runtimes)
        errors = {
            "ours": relative_error(our_rows, expected),
            "optimum": relative_error(their_rows, expected),
            "ours against optimum": relative_error(our_rows, their_rows),
        }
        print(grids, errors)
        assert max(errors.values()) <= 1e-4, (grids, errors)


@needs_optimum
def test_the_artifact_is_sealed_under_the_checkpoint_s_fingerprint(ours: Artifact, theirs: Artifact) -> None:
    artifact = open_artifact(theirs.directory)
    artifact.verify()
    assert artifact.manifest.fingerprint == ours.manifest.fingerprint
    assert [variant.name for variant in artifact.manifest.variants] == ["optimum/f32", "optimum/bf16", "optimum/int8"]
    folders = [Path(variant.graph).parent.as_posix() for variant in artifact.manifest.variants]
    assert folders == ["optimum/bfloat16", "optimum/bfloat16", "optimum/int8"]
    assert all(f"{folder}/{name}" in artifact.hashes for folder in folders for name in ("config.json", EMBEDDINGS))
    assert all(variant.accuracy is not None and variant.accuracy.passed for variant in artifact.manifest.variants)
    assert artifact.manifest.versions["optimum-intel"].startswith("2.")


@needs_optimum
@pytest.mark.parametrize(("precision", "bar"), [("bf16", 0.999), ("int8", 0.99)])
def test_narrow_precisions_keep_every_row(
    theirs: Artifact, pictures: list[Sample], references: list[Rows], precision: str, bar: float
) -> None:
    runtime = load(theirs, precision, DType.BFLOAT16)
    for picture, expected in zip(pictures, references, strict=True):
        rows = to_float32(runtime.encode(picture.patches.values, [picture.grid], theirs.manifest.tower), DType.BFLOAT16)
        assert row_cosine(rows, expected).min() > bar, picture.name


@needs_optimum
def test_a_directory_of_optimum_cli_is_served_as_it_is(
    unsealed: Path, theirs: Artifact, pictures: list[Sample], references: list[Rows]
) -> None:
    assert is_optimum_directory(unsealed)
    artifact = adopt_optimum(unsealed)
    assert [variant.name for variant in artifact.manifest.variants] == ["optimum/bf16"]
    assert (artifact.manifest.tower, artifact.manifest.pixels) == (theirs.manifest.tower, theirs.manifest.pixels)
    assert artifact.manifest.checkpoint.random_weights and artifact.manifest.checkpoint.dtype is DType.BFLOAT16
    assert artifact.manifest.fingerprint != theirs.manifest.fingerprint
    # Our child asks optimum for two parts of what its own command line writes, and for nothing else.
    for name in (MERGER, EMBEDDINGS):
        sealed = theirs.directory / "optimum" / "bfloat16" / name
        assert (unsealed / name).with_suffix(".bin").read_bytes() == sealed.with_suffix(".bin").read_bytes()
    runtime = load(artifact, "bf16")
    for picture, expected in zip(pictures, references, strict=True):
        rows = runtime.encode(picture.patches.values, [picture.grid], artifact.manifest.tower)
        assert row_cosine(rows, expected).min() > 0.999, picture.name


def test_without_an_environment_the_way_to_one_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    with pytest.raises(ExportError, match="make optimum-env"):
        optimum_python()
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ExportError, match=f"{PYTHON_VARIABLE} names .*nowhere"):
        optimum_python()
    (tmp_path / ".venv-optimum" / "bin").mkdir(parents=True)
    (tmp_path / ".venv-optimum" / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.delenv(PYTHON_VARIABLE)
    assert optimum_python() == str(tmp_path / ".venv-optimum" / "bin" / "python")


def test_other_formats_are_not_optimum_s(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="OpenVINO graphs only"):
        export_via_optimum(Job(model="any", out=tmp_path / "artifact", formats=("onnx",)), quiet())


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo chatter; echo 'ValueError: too new' >&2; exit 1", "ValueError: too new"),
        ("kill -9 $$", "signal 9.*memory"),
    ],
)
def test_a_failure_in_the_other_environment_is_told_and_leaves_nothing(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setenv(PYTHON_VARIABLE, str(python))
    with pytest.raises(ExportError, match=said):
        export_via_optimum(Job(model=str(toy), out=tmp_path / "artifact"), quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["python"]
