"""Where an artifact goes: it is written beside its place and put there whole, or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sidecar.artifact import MANIFEST, SEAL, ArtifactError, open_artifact


class ExportError(ValueError):
    """What was asked for cannot be exported, or did not come out well enough to be sealed."""


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """An empty directory beside `out`, gone at the end unless `publish` took it.

    Raises:
        ExportError: if nothing can be written there.
    """
    try:
        _sweep(out)
        partial = _beside(out, "partial")
        partial.mkdir(parents=True)
    except (OSError, ValueError) as error:
        raise ExportError(f"cannot write to {out}: {getattr(error, 'strerror', error)}; choose another --out") from None
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, out: Path) -> None:
    """Put the finished directory in the place of `out`, whose artifact goes.

    Raises:
        OSError: if it cannot; what was there is there again.
    """
    retired = _beside(out, "retired")
    if out.exists():
        out.rename(retired)
    try:
        partial.rename(out)
    except OSError:
        if retired.exists():
            retired.rename(out)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def check(out: Path) -> None:
    """Refuse a place that holds anything but an artifact: exporting would remove it.

    Raises:
        ExportError: if it does.
    """
    if not out.name:
        raise ExportError(f"--out {out} names no directory of its own; give one")
    try:
        out.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ExportError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
    if not out.is_dir():
        raise ExportError(f"{out} exists and is not a directory")
    if not any(out.iterdir()):
        return
    try:
        ours = {MANIFEST, SEAL, *open_artifact(out).hashes}
    except ArtifactError:
        raise ExportError(f"{out} is not empty and holds no artifact; choose another --out") from None
    held = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    if foreign := sorted(held - ours):
        raise ExportError(
            f"{out} holds {foreign[0]}, which is no part of its artifact; move it or choose another --out"
        )


def _beside(out: Path, kind: str) -> Path:
    # The process in the name tells whose it is, the rest that no second one of that number finds it taken.
    return out.with_name(f".{out.name}.{kind}-{uuid.uuid4().hex[:8]}-{os.getpid()}")


def _sweep(out: Path) -> None:
    """Remove what exports to the same place left behind that were killed; one that is still at work keeps its own."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*-*"):
        kind = left.name.removeprefix(f".{out.name}.").partition("-")[0]
        process = left.name.rpartition("-")[2]
        gone = process == str(os.getpid()) or not Path(f"/proc/{process}").exists()
        if kind in ("partial", "retired") and process.isdigit() and gone:
            shutil.rmtree(left, ignore_errors=True)
