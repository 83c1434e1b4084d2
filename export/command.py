"""`epd-export --model CHECKPOINT --out ARTIFACT`: turn a checkpoint's vision tower into a sealed artifact."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import tempfile
from pathlib import Path

from rich.console import Console

from export.checkpoint import CheckpointError
from export.destination import ExportError, check
from export.pipeline import FORMATS, PRECISIONS, Job, export
from export.synthetic import SyntheticError, make_checkpoint, synthetic_kind
from sidecar.artifact import ArtifactError
from sidecar.runtimes.base import RuntimeFault


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="epd-export", description=__doc__, allow_abbrev=False)
    result.add_argument(
        "--model", required=True, help="hub id, local checkpoint directory, or random:3b, random:7b, random:toy"
    )
    result.add_argument(
        "--out", required=True, type=Path, help="directory of the artifact; an artifact there is replaced"
    )
    result.add_argument("--revision", help="branch, tag or commit of a hub checkpoint")
    result.add_argument(
        "--format", default="openvino", help=f"comma-separated: {', '.join(FORMATS)} (default openvino)"
    )
    result.add_argument(
        "--precision",
        default="bf16,int8",
        help=f"comma-separated: {', '.join(PRECISIONS)} (default bf16,int8); the first is what the sidecar serves by default",
    )
    result.add_argument(
        "--via",
        choices=("tower", "optimum"),
        default="tower",
        help="what builds the graph: this project's tower, or optimum-intel's exporter (see docs/optimum.md)",
    )
    result.add_argument(
        "--allow-below-bar", action="store_true", help="seal an artifact whose accuracy is below its bar"
    )
    return result


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: what stands behind the command's name; None takes them from `sys.argv`.
    """
    options = parser().parse_args(arguments)
    # Ended from outside, it tidies up as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    console = Console()
    try:
        with tempfile.TemporaryDirectory(prefix="epd-random-") as scratch:
            kind = synthetic_kind(options.model)
            model = options.model
            check(Path(os.path.realpath(options.out)), model)
            if kind is not None:
                model = str(Path(scratch) / f"random-{kind}")
                make_checkpoint(kind, Path(model))
            job = Job(
                model=model,
                out=options.out,
                formats=_names(options.format),
                precisions=_names(options.precision),
                revision=options.revision,
                allow_below_bar=options.allow_below_bar,
            )
            if options.via == "optimum":
                from export.optimum import export_via_optimum

                artifact = export_via_optimum(job, console)
            else:
                artifact = export(job, console)
    except (ArtifactError, CheckpointError, ExportError, RuntimeFault, SyntheticError) as error:
        console.print(f"[bold red]export failed:[/] {error}", highlight=False, soft_wrap=True)
        return 1
    except OSError as error:
        console.print(f"[bold red]export failed:[/] {_told(error)}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; nothing was written")
        return 130
    console.print(f"wrote {artifact.directory}  fingerprint {artifact.manifest.fingerprint[:16]}…", highlight=False)
    return 0


def _told(error: OSError) -> str:
    what = error.strerror or str(error)
    if error.filename is not None:
        what += f": {error.filename}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what += (
            ". Export writes to --out, a download to the hub's cache (HF_HOME), and random:… to the directory for temporary "
            "files (TMPDIR): free some space there, or name another"
        )
    return what


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
