"""`--via optimum`: the vision graphs as optimum-intel exports them, in an artifact of ours.

The stages are those of every export, fingerprint and measured accuracy included; only the writing happens elsewhere, in an
environment that has optimum-intel and the older transformers that it pins, by `optimum_child.py`. The embeddings are the same
as those of our own graph, so the fingerprint is the same too: it is the checkpoint's.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from export.checkpoint import Checkpoint
from export.pipeline import ExportError, Job, StageOpener, Written, run_stages
from export.weights import storage_dtype
from sidecar.adopted import CONFIG, read_ir
from sidecar.artifact import Artifact, Variant
from sidecar.runtimes.optimum_pair import MERGER, pair_files
from sidecar.vision.processors import PROCESSOR_FILES

__all__ = ["export_via_optimum", "optimum_python"]

logger = logging.getLogger(__name__)

CHILD = Path(__file__).with_name("optimum_child.py")
ENVIRONMENT = Path(".venv-optimum")
PYTHON_VARIABLE = "EPD_OPTIMUM_PYTHON"


def export_via_optimum(job: Job, console: Console) -> Artifact:
    """Export with optimum-intel and return the artifact at `job.out`, its variants under the runtime name `optimum`.

    Raises:
        ExportError: if the job is impossible, there is no environment with optimum-intel, it failed, or the result is below
            its accuracy bar.
        CheckpointError: if the checkpoint cannot be read.
    """
    if job.formats != ("openvino",):
        raise ExportError("optimum-intel writes OpenVINO graphs only: leave --format out, or give openvino")
    precisions = [precision for _, precision in job.variants()]
    python = optimum_python()

    def write(checkpoint: Checkpoint, directory: Path, stage: StageOpener) -> Written:
        stored = {precision: storage_dtype(precision, checkpoint.dtype) for precision in precisions}
        for dtype in dict.fromkeys(stored.values()):
            with stage(f"optimum-intel: {_name(dtype)}", None), tempfile.TemporaryDirectory(dir=directory) as scratch:
                wanted = [precision for precision in precisions if stored[precision] is dtype]
                _write(python, _origin(job, checkpoint), dtype, wanted, Path(scratch), directory / "optimum")
        variants = []
        for precision in precisions:
            merger = directory / "optimum" / _folder(precision, stored[precision]) / MERGER
            files = tuple(path.relative_to(directory).as_posix() for path in pair_files(merger))
            variants.append(Variant(runtime="optimum", precision=precision, graph=files[0], files=files))
        return Written(variants, read_ir(merger).versions)

    return run_stages(job, write, console)


def optimum_python() -> str:
    """The interpreter that has optimum-intel: $EPD_OPTIMUM_PYTHON, else .venv-optimum here, else this one.

    Raises:
        ExportError: if there is none.
    """
    given = os.environ.get(PYTHON_VARIABLE)
    if given:
        if shutil.which(given) is None:
            raise ExportError(
                f"{PYTHON_VARIABLE} names {given}, which cannot be run; give a Python that has optimum-intel"
            )
        return given
    beside = ENVIRONMENT / "bin" / "python"
    if beside.exists():
        return str(beside.absolute())  # not resolved: a link to the base interpreter would lose the environment
    try:
        importlib.metadata.version("optimum-intel")
    except importlib.metadata.PackageNotFoundError:
        raise ExportError(
            "--via optimum needs an environment with optimum-intel, which pins an older transformers than ours: "
            f"`make optimum-env` makes {ENVIRONMENT} here, or set {PYTHON_VARIABLE} to the Python of one"
        ) from None
    return sys.executable


def _write(python: str, origin: list[str], dtype: torch.dtype, precisions: list[str], scratch: Path, out: Path) -> None:
    """Run the child for one dtype of weights and put what an artifact needs of it into `out`, a folder for each storage."""
    plain, int8 = scratch / "plain", scratch / "int8"
    command = [python, "-I", str(CHILD), *origin, "--dtype", _name(dtype), "--plain", str(plain)]
    _run([*command, "--int8", str(int8)] if "int8" in precisions else command)
    for precision in precisions:
        folder = out / _folder(precision, dtype)
        folder.mkdir(parents=True, exist_ok=True)
        for path in pair_files((int8 if precision == "int8" else plain) / MERGER):
            if path.exists():  # f32 and bf16 may share a folder, filled by the first of them
                path.rename(folder / path.name)
        for name in (CONFIG, *PROCESSOR_FILES):
            if (plain / name).is_file():
                shutil.copyfile(plain / name, folder / name)


def _run(command: list[str]) -> None:
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    result = subprocess.run(
        command,
        env={**os.environ, **quiet},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if result.returncode == 0:
        return
    logger.error("what optimum-intel said:\n%s", result.stdout)
    if result.returncode < 0:
        raise ExportError(
            f"optimum-intel was ended by signal {-result.returncode} (9: most likely for want of memory, of which it takes "
            "about 5 GB beside the checkpoint)"
        )
    last = next((line for line in reversed(result.stdout.splitlines()) if line.strip()), "it said nothing")
    raise ExportError(f"optimum-intel failed in {command[0]}: {last.strip()}")


def _origin(job: Job, checkpoint: Checkpoint) -> list[str]:
    """The child's arguments that name the very checkpoint that was fingerprinted: of a hub id, the same commit."""
    if Path(job.model).expanduser().is_dir():
        return ["--model", str(Path(job.model).expanduser().absolute())]
    _, _, commit = checkpoint.source.rpartition("@")
    return ["--model", job.model, "--revision", commit]


def _folder(precision: str, dtype: torch.dtype) -> str:
    """A folder is named by what its weights are stored in, as graphs are (`pipeline.graph_name`)."""
    return "int8" if precision == "int8" else _name(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
