"""The stages of an export, in order: open, fingerprint, write, measure, seal, publish.

Only writing depends on what builds the graphs: `export` has this project's tower written, and whoever has another way to
make graphs of a checkpoint (`optimum.py`) gives its own `Write` to `run_stages`.

Everything is written into a directory beside the destination and renamed at the end: a failed export leaves what was there
before, and no half artifact is ever seen.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from export.accuracy import BARS, measure, reference_embeddings
from export.checkpoint import Checkpoint, open_checkpoint
from export.destination import ExportError, check, check_space, is_full, publish, workplace
from export.report import html_page, print_table
from export.samples import REFERENCES, samples
from export.weights import load_tower, storage_dtype
from sidecar import artifact as sealed
from sidecar.artifact import Artifact, ArtifactError, Manifest, Variant
from sidecar.machine import return_freed_memory
from sidecar.runtimes.base import Load
from sidecar.runtimes.loading import load_runtime
from sidecar.vision.dtypes import DType
from sidecar.vision.reference import Reference
from sidecar.vision.tower import Tower

PRECISIONS = ("f32", "bf16", "int8")
FORMATS = ("openvino", "onnx", "torch")
REPORT = "accuracy.html"
# What a graph takes for each block beside its weights, at most (the .xml of OpenVINO).
_BLOCK_BYTES = 80_000

_SUFFIX = {"openvino": ".xml", "onnx": ".onnx", "torch": ".safetensors"}
_VERSIONED = ("epd-encoder-sidecar", "torch", "openvino", "onnx", "onnxruntime", "numpy", "pillow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to export.

    `allow_below_bar` seals an artifact whose accuracy fell below a bar, with a warning; the sidecar will ask for the same.
    """

    model: str
    out: Path
    formats: tuple[str, ...] = ("openvino",)
    precisions: tuple[str, ...] = ("bf16", "int8")
    revision: str | None = None
    allow_below_bar: bool = False

    def variants(self) -> list[tuple[str, str]]:
        """(format, precision) pairs to write.

        Raises:
            ExportError: if nothing remains, or a name is unknown.
        """
        for kind, given, known in (("format", self.formats, FORMATS), ("precision", self.precisions, PRECISIONS)):
            unknown = [name for name in given if name not in known]
            if unknown or not given:
                raise ExportError(f"unknown {kind} {', '.join(unknown) or '(none)'}; there are {', '.join(known)}")
        # The torch runtime runs the tower itself, which has no int8 layers.
        wanted = dict.fromkeys((f, p) for f in self.formats for p in self.precisions)
        pairs = [pair for pair in wanted if pair != ("torch", "int8")]
        if not pairs:
            raise ExportError("the torch format has no int8 precision; add f32 or bf16")
        return pairs


class Written(NamedTuple):
    """Variants whose graphs lie in the artifact's directory, not measured yet, and versions of further packages."""

    variants: list[Variant]
    versions: Mapping[str, str]


# Opens a progress bar for a stage of so many steps (None: unknown).
StageOpener = Callable[[str, int | None], "Stage"]
# Writes the graphs of a checkpoint into a directory.
Write = Callable[[Checkpoint, Path, StageOpener], Written]


def export(job: Job, console: Console) -> Artifact:
    """Export with this project's tower and return the artifact at `job.out`.

    Raises:
        ExportError: if the job is impossible or the result is below its accuracy bar.
        CheckpointError: if the checkpoint cannot be read.
    """
    pairs = job.variants()

    def write(checkpoint: Checkpoint, directory: Path, stage: StageOpener) -> Written:
        variants: list[Variant] = []
        written: dict[str, tuple[str, ...]] = {}
        for format_name, precision in pairs:
            graph = graph_name(format_name, precision, checkpoint.dtype)
            if graph not in written:
                with stage(f"write {graph}", None):
                    files = _writer(format_name)(load_tower(checkpoint, precision), directory / graph)
                    gc.collect()
                written[graph] = tuple(file.relative_to(directory).as_posix() for file in files)
            variants.append(Variant(runtime=format_name, precision=precision, graph=graph, files=written[graph]))
        return Written(variants, {})

    return run_stages(job, write, console)


def run_stages(job: Job, write: Write, console: Console) -> Artifact:
    """Run all stages with `write` in the middle and return the artifact at `job.out`.

    Raises:
        ExportError: if the destination will not do, or the result is below its accuracy bar; and whatever `write` raises.
        CheckpointError: if the checkpoint cannot be read.
    """
    # What is behind a link is replaced, not the link.
    out = Path(os.path.realpath(job.out))
    check(out, job.model)
    with workplace(out) as partial:
        with _stages(console) as stage, stage("read checkpoint", None) as advance:
            checkpoint = open_checkpoint(job.model, revision=job.revision, progress=advance.absolute)
        check_space(partial, _artifact_bytes(job, checkpoint), out)
        try:
            manifest = _fill(job, checkpoint, write, partial, console)
            artifact = sealed.seal(partial, manifest)
        except Exception as error:
            if not isinstance(error, ExportError) and is_full(partial, error):
                raise ExportError(
                    f"the file system of {out} is full; free some space, or choose another --out"
                ) from error
            raise
        publish(partial, out)
    return replace(artifact, directory=job.out)


def _artifact_bytes(job: Job, checkpoint: Checkpoint) -> int:
    """About what the graphs take: their weights, and the graphs themselves."""
    widths = {
        graph_name(format_name, precision, checkpoint.dtype): 1
        if precision == "int8"
        else storage_dtype(precision, checkpoint.dtype).itemsize
        for format_name, precision in job.variants()
    }
    return sum(checkpoint.tower.parameters * width + checkpoint.tower.depth * _BLOCK_BYTES for width in widths.values())


def _fill(job: Job, checkpoint: Checkpoint, write: Write, directory: Path, console: Console) -> Manifest:
    """Everything of the artifact but its seal."""
    with _stages(console) as stage:
        with stage("fingerprint weights", len(checkpoint.names)) as advance:
            fingerprint = fingerprint_of(checkpoint, advance)
        written = write(checkpoint, directory, stage)
        measured = _measure(checkpoint, written.variants, directory, stage)
    print_table(measured, console)
    failed = [variant for variant in measured if variant.accuracy is not None and not variant.accuracy.passed]
    for variant in failed:
        assert variant.accuracy is not None
        console.print(f"[red]{variant.name}: {variant.accuracy.shortfall()}[/]")
    if failed and not job.allow_below_bar:
        raise ExportError(
            f"{', '.join(variant.name for variant in failed)} fell below the accuracy bar; nothing was written "
            "(--allow-below-bar writes it all the same)"
        )
    origin = sealed.Checkpoint(
        source=checkpoint.source, dtype=_dtype(checkpoint.dtype), random_weights=checkpoint.random_weights
    )
    (directory / REPORT).write_text(html_page(measured, origin, fingerprint), encoding="utf-8")
    return Manifest(
        fingerprint=fingerprint,
        checkpoint=origin,
        tower=checkpoint.tower,
        pixels=checkpoint.pixels,
        variants=tuple(measured),
        versions={**_versions(), **written.versions},
    )


def _measure(checkpoint: Checkpoint, variants: list[Variant], directory: Path, stage: StageOpener) -> list[Variant]:
    pictures = list(samples(checkpoint.tower, checkpoint.pixels))
    with stage("float32 reference", checkpoint.tower.depth) as advance:
        references = reference_embeddings(checkpoint, pictures, advance)
    if not all(np.isfinite(rows).all() and np.linalg.norm(rows, axis=1).all() for rows in references):
        raise ExportError("the checkpoint's own embeddings are zero or not finite in float32; its weights are damaged")
    sealed.write_references(
        directory,
        [
            Reference(picture.patches, rows)
            for picture, rows in zip(pictures, references, strict=True)
            if picture.name in REFERENCES
        ],
    )
    # From here on only the written graphs count; two sets of weights in memory would be one too many.
    checkpoint.close()
    _give_back()
    measured = []
    for variant in variants:
        exact = variant.precision == "f32"
        load = Load(
            graph=directory / variant.graph,
            precision=variant.precision,
            tower=checkpoint.tower,
            pixels=checkpoint.pixels,
            output_dtype=DType.FLOAT32 if exact else _dtype(checkpoint.dtype),
        )
        with stage(f"measure {variant.name}", len(pictures)) as advance:
            runtime = load_runtime(variant.runtime, load)
            accuracy, deviations = measure(
                runtime, checkpoint.tower, pictures, references, BARS[variant.precision], advance
            )
            del runtime
            _give_back()
        measured.append(replace(variant, accuracy=accuracy, references=deviations))
    return measured


def _give_back() -> None:
    """Return what tracing and the reference let go of: it would lie beside a whole graph."""
    gc.collect()
    return_freed_memory()


def graph_name(format_name: str, precision: str, checkpoint_dtype: torch.dtype) -> str:
    """A graph is named by what its weights are stored in: f32 and bf16 of a bf16 checkpoint share one file, since only the
    arithmetic differs."""
    stored = "int8" if precision == "int8" else str(_dtype(storage_dtype(precision, checkpoint_dtype)))
    return f"{format_name}/{stored}{_SUFFIX[format_name]}"


def fingerprint_of(checkpoint: Checkpoint, advance: Callable[[], None] = lambda: None) -> str:
    """The fingerprint of a checkpoint's tower, preprocessing and weights."""
    hashes = {}
    for name, tensor in checkpoint:
        values = tensor.reshape(-1).view(torch.uint8).numpy().data
        hashes[name] = sealed.tensor_hash(_dtype(tensor.dtype), tensor.shape, values)
        advance()
    return sealed.fingerprint(checkpoint.tower, checkpoint.pixels, hashes)


def _writer(format_name: str) -> Callable[[Tower, Path], tuple[Path, ...]]:
    try:
        if format_name == "openvino":
            from export.openvino import write_openvino as writer
        elif format_name == "onnx":
            from export.onnx import write_onnx as writer
        else:
            from export.torch import write_torch as writer
    except ModuleNotFoundError as error:
        raise ExportError(
            f"the {format_name} format needs {error.name}, which is not installed; install the extra [export-onnx]"
        ) from error
    return writer


def _dtype(dtype: torch.dtype) -> DType:
    return DType(str(dtype).removeprefix("torch."))


def _versions() -> dict[str, str]:
    versions = {}
    for name in _VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


class Stage:
    """One progress bar. Calling it advances by one; `absolute` sets it from (done, total)."""

    def __init__(self, progress: Progress, title: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=total)

    def __enter__(self) -> Stage:
        return self

    def __call__(self) -> None:
        self._progress.advance(self._task)

    def absolute(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            total = self._progress.tasks[self._task].total or 1
            self._progress.update(self._task, completed=total, total=total)


@contextmanager
def _stages(console: Console) -> Iterator[StageOpener]:
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield lambda title, total: Stage(progress, title, total)


__all__ = ["ArtifactError", "ExportError", "Job", "Written", "export", "fingerprint_of", "graph_name", "run_stages"]
