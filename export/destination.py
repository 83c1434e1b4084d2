"""Where an artifact goes: it is checked before any work, written beside its place, and put there whole or not at all.

A directory that cannot be renamed, because something is mounted on it or its parent cannot be written to, is filled
instead: the artifact is written in a hidden directory inside it, and its files are moved up at the end, the seal last. For a
moment there is then no artifact, and never half of one.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sidecar.artifact import MANIFEST, SEAL, ArtifactError, open_artifact
from sidecar.vision.digits import apart

_MOUNTS = Path("/proc/self/mountinfo")
# What a new ext4 file system holds.
_NOT_OURS = "lost+found"
# A file system with less than that is full, however a library calls what it met.
_FULL_BYTES = 1 << 20


class ExportError(ValueError):
    """What was asked for cannot be exported, or did not come out well enough to be sealed."""


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """An empty directory beside `out`, or inside it where it cannot be renamed; gone at the end unless `publish` took it.

    Raises:
        ExportError: if nothing can be written there.
    """
    new_parents = [parent for parent in out.parents if not _exists(parent)]
    try:
        _sweep(out)
        partial = _hidden(out, "partial")
        partial.mkdir(parents=True)
    except (OSError, ValueError) as error:
        _remove_empty(new_parents)
        raise ExportError(f"cannot write to {out}: {getattr(error, 'strerror', error)}; choose another --out") from None
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(new_parents)


def publish(partial: Path, out: Path) -> None:
    """Put the finished directory in the place of `out`, whose artifact goes.

    Raises:
        OSError: if it cannot; what was there is there again.
    """
    retired = _hidden(out, "retired")
    if _filled(out):
        _fill(partial, out, retired)
    else:
        if out.exists():
            out.rename(retired)
        try:
            partial.rename(out)
        except OSError:
            if retired.exists():
                retired.rename(out)
            raise
    shutil.rmtree(retired, ignore_errors=True)


def check(out: Path, model: str = "") -> None:
    """Refuse a place that cannot be written to, or that holds anything but an artifact: exporting would remove it.

    Args:
        out: the artifact's place, links resolved.
        model: the checkpoint; if it is a directory, the two must not lie in one another.

    Raises:
        ExportError: if the place will not do.
    """
    if not out.name:
        raise ExportError(f"--out {out} names no directory of its own; give one")
    checkpoint = Path(os.path.realpath(Path(model).expanduser())) if model else None
    if checkpoint is not None and checkpoint.is_dir():
        if out == checkpoint:
            raise ExportError(f"--out {out} is the checkpoint itself; choose another --out")
        if checkpoint in out.parents or out in checkpoint.parents:
            where = "lies inside the checkpoint" if checkpoint in out.parents else "holds the checkpoint"
            raise ExportError(f"--out {out} {where} {checkpoint}; choose another --out")
    try:
        out.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ExportError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
    else:
        _check_content(out)
    with workplace(out):
        pass


def check_space(directory: Path, needed_bytes: int, out: Path) -> None:
    """Refuse a file system that has no room for what will be written.

    Raises:
        ExportError: if it has less than that.
    """
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        needed_mb, free_mb = apart(needed_bytes / 1e6, free / 1e6, 1)
        raise ExportError(
            f"the artifact takes about {needed_mb} MB, and the file system of {out} has {free_mb} MB free; free some, or "
            "choose another --out"
        )


def is_full(directory: Path, error: BaseException) -> bool:
    """Whether what failed there did so for want of space. OpenVINO says `basic_ios::clear: iostream error`, others other
    things, so the file system is asked too."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return shutil.disk_usage(directory).free < _FULL_BYTES


def _check_content(out: Path) -> None:
    if not out.is_dir():
        raise ExportError(f"{out} exists and is not a directory")
    try:
        held = {path.relative_to(out).as_posix() for child in _visible(out) for path in (child, *child.rglob("*"))}
    except OSError as error:
        raise ExportError(f"{out} cannot be read: {error.strerror}; choose another --out") from None
    if not held:
        return
    try:
        ours = {MANIFEST, SEAL, *_sealed_files(out)}
    except (ArtifactError, OSError, ValueError, KeyError, TypeError):
        raise ExportError(f"{out} is not empty and holds no artifact; choose another --out") from None
    if foreign := sorted(name for name in held - ours if not (out / name).is_dir()):
        raise ExportError(
            f"{out} holds {foreign[0]}, which is no part of its artifact; move it or choose another --out"
        )


def _sealed_files(out: Path) -> Iterable[str]:
    """The names that an artifact's manifest lists, also one of an earlier schema: exporting again is what replaces it."""
    try:
        return open_artifact(out).hashes
    except ArtifactError:
        data = (out / MANIFEST).read_bytes()
        if not (out / SEAL).read_text().startswith(hashlib.sha256(data).hexdigest()):
            raise
        return dict(json.loads(data)["files"])


def _filled(out: Path) -> bool:
    """Whether `out` is filled because it cannot be renamed."""
    if not out.is_dir():
        return False
    return _is_mount_point(out) or (not os.access(out.parent, os.W_OK | os.X_OK) and os.access(out, os.W_OK | os.X_OK))


def _is_mount_point(directory: Path) -> bool:
    """Also where a directory of the same file system is mounted, which `os.path.ismount` does not see (proc(5), mountinfo)."""
    if os.path.ismount(directory):
        return True
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    points = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines)
    return str(directory) in points


def _fill(partial: Path, out: Path, retired: Path) -> None:
    """Move `out`'s artifact into `retired` and that of `partial` up; the seal goes first and comes last."""
    retired.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for target, children in (
            (retired, _seal_last(_visible(out))[::-1]),
            (out, _seal_last(list(partial.iterdir()))),
        ):
            for child in children:
                child.rename(target / child.name)
                moved.append((child, target / child.name))
    except OSError:
        for before, after in reversed(moved):
            after.rename(before)
        shutil.rmtree(retired, ignore_errors=True)
        raise


def _seal_last(children: list[Path]) -> list[Path]:
    return sorted(children, key=lambda child: (child.name == SEAL, child.name == MANIFEST, child.name))


def _visible(out: Path) -> list[Path]:
    """What `out` holds beside the work of exports to it."""
    return [
        child
        for child in out.iterdir()
        if child.name != _NOT_OURS and not child.name.startswith((f".{out.name}.partial-", f".{out.name}.retired-"))
    ]


def _hidden(out: Path, kind: str) -> Path:
    # The process in the name tells whose it is, the rest that no second one of that number finds it taken.
    name = f".{out.name}.{kind}-{uuid.uuid4().hex[:8]}-{os.getpid()}"
    return out / name if _filled(out) else out.with_name(name)


def _sweep(out: Path) -> None:
    """Remove what exports to the same place left behind that were killed; one that is still at work keeps its own."""
    for left in (out if _filled(out) else out.parent).glob(f".{glob.escape(out.name)}.*-*"):
        kind = left.name.removeprefix(f".{out.name}.").partition("-")[0]
        process = left.name.rpartition("-")[2]
        gone = process == str(os.getpid()) or not Path(f"/proc/{process}").exists()
        if kind in ("partial", "retired") and process.isdigit() and gone:
            shutil.rmtree(left, ignore_errors=True)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _remove_empty(directories: list[Path]) -> None:
    """Of the directories that were made for the work, from the innermost out, those that nothing came to lie in."""
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()
