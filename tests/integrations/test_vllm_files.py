"""The embeddings that a vLLM waits for: links where that can be, checked, and gone when it is."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import ROOT
from stores import description, shared_memory

from sidecar.integrations import owned_directory
from sidecar.integrations.vllm.files import LocalFile, LocalFiles
from sidecar.store_file import FILE_NAME, create, read
from sidecar.vision.dtypes import Array, DType, from_float32

WHAT = description()

CHILD = """
import sys
from pathlib import Path
from sidecar.integrations.vllm.files import LocalFiles
files = LocalFiles(Path(sys.argv[1]))
print(files.path, flush=True)
if sys.argv[2] == "wait":
    sys.stdin.read()
"""


@pytest.fixture
def parent() -> Iterator[Path]:
    with shared_memory() as directory:
        yield directory


@pytest.fixture
def files(parent: Path) -> Iterator[LocalFiles]:
    made = LocalFiles(parent)
    yield made
    made.close()


def rows(value: float = 1.0, dtype: DType = DType.FLOAT32) -> Array:
    return from_float32(np.full((WHAT.tokens, WHAT.width), value, np.float32), dtype)


def stored(directory: Path, values: Array | None = None) -> Path:
    """A sidecar's file."""
    path = directory / "store" / "name" / FILE_NAME
    path.parent.mkdir(parents=True)
    create(path, WHAT)[:] = rows() if values is None else values
    return path


def content(file: LocalFile) -> Array:
    return read(Path(file.directory), file.name, file.description)


def left(files: LocalFiles) -> set[str]:
    return {entry.name for entry in files.path.iterdir()} - {".lock"}


def child(parent: Path, *, waits: bool) -> tuple[subprocess.Popen[str], Path]:
    """Another process with files of its own, and their directory."""
    command = [sys.executable, "-c", CHILD, str(parent), "wait" if waits else "end"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_on_one_file_system_a_file_is_a_link(files: LocalFiles, parent: Path) -> None:
    source = stored(parent)
    file = files.add(rows(), WHAT, source)
    assert (files.path / file.name / FILE_NAME).samefile(source)


def test_a_link_outlives_what_it_was_made_of(files: LocalFiles, parent: Path) -> None:
    source = stored(parent)
    file = files.add(rows(), WHAT, source)
    source.unlink()
    assert np.array_equal(content(file), rows())


def test_on_another_file_system_it_is_a_copy(files: LocalFiles) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as elsewhere:
        if Path(elsewhere).stat().st_dev == files.path.stat().st_dev:
            pytest.skip("/var/tmp lies on the file system of the other one")
        source = stored(Path(elsewhere))
        file = files.add(read(source.parents[1], "name", WHAT), WHAT, source)
    assert np.array_equal(content(file), rows())


@pytest.mark.parametrize(
    "linkable", [None, Path("/nowhere") / FILE_NAME], ids=["over the wire", "source gone meanwhile"]
)
def test_without_a_file_to_link_the_rows_are_written(files: LocalFiles, linkable: Path | None) -> None:
    assert np.array_equal(content(files.add(rows(2.0), WHAT, linkable)), rows(2.0))


def test_a_symbolic_link_in_a_store_is_not_followed(files: LocalFiles, parent: Path) -> None:
    secret = parent / "secret"
    secret.write_text("not an embedding")
    source = parent / "store" / "name" / FILE_NAME
    source.parent.mkdir(parents=True)
    source.symlink_to(secret)
    with pytest.raises((OSError, ValueError)):
        files.add(rows(), WHAT, source)
    assert left(files) == set()


@pytest.mark.parametrize("by", [-1, 1], ids=["cut short", "too long"])
def test_a_file_of_another_size_is_refused(files: LocalFiles, parent: Path, by: int) -> None:
    source = stored(parent)
    os.truncate(source, source.stat().st_size + by)
    with pytest.raises(ValueError, match="bytes instead of"):
        files.add(rows(), WHAT, source)
    assert left(files) == set()


@pytest.mark.parametrize("size", [0, 7, 100])
def test_a_file_without_a_whole_header_is_refused(files: LocalFiles, parent: Path, size: int) -> None:
    source = stored(parent)
    os.truncate(source, size)
    with pytest.raises(ValueError):
        files.add(rows(), WHAT, source)
    assert left(files) == set()


def test_a_file_of_another_model_is_refused(files: LocalFiles, parent: Path) -> None:
    with pytest.raises(ValueError, match="not of the grid, size, type or model"):
        files.add(rows(), description(fingerprint="another"), stored(parent))
    assert left(files) == set()


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_values_that_are_not_finite_are_refused(files: LocalFiles, value: float, dtype: DType) -> None:
    values = rows(dtype=dtype).copy()
    values[-1, -1] = rows(value, dtype)[0, 0]
    with pytest.raises(ValueError, match="NaN or infinite"):
        files.add(values, description(dtype=dtype), None)
    assert left(files) == set()


def test_linked_values_are_looked_at_too(files: LocalFiles, parent: Path) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        files.add(rows(), WHAT, stored(parent, rows(np.nan)))
    assert left(files) == set()


def test_who_has_a_file_mapped_keeps_it(files: LocalFiles) -> None:
    file = files.add(rows(3.0), WHAT, None)
    mapped = content(file)
    files.remove(file.name)
    assert left(files) == set()
    assert np.array_equal(mapped, rows(3.0))
    files.remove(file.name)  # a second time does no harm


def test_nobody_else_may_read_them(files: LocalFiles) -> None:
    file = files.add(rows(), WHAT, None)
    assert files.path.stat().st_mode & 0o777 == 0o700
    assert (files.path / file.name / FILE_NAME).stat().st_mode & 0o077 == 0


def test_closing_removes_all(parent: Path) -> None:
    made = LocalFiles(parent)
    made.add(rows(), WHAT, None)
    made.close()
    assert list(parent.iterdir()) == []
    made.close()


def test_an_interpreter_that_ends_removes_its_own(parent: Path) -> None:
    process, directory = child(parent, waits=False)
    assert process.wait(60) == 0
    assert directory.name.startswith("epd-vllm-")
    assert list(parent.iterdir()) == []


def test_what_a_killed_process_left_goes_and_a_living_ones_stays(parent: Path) -> None:
    killed, left_over = child(parent, waits=True)
    living, in_use = child(parent, waits=True)
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait(60)
        assert left_over.is_dir() and in_use.is_dir()
        made = LocalFiles(parent)
        assert not left_over.exists()
        assert in_use.is_dir()
        made.close()
    finally:
        living.communicate(timeout=60)
    assert list(parent.iterdir()) == []


def test_other_peoples_directories_are_left_alone(parent: Path) -> None:
    (parent / "something").mkdir()
    (parent / "epd-vllm-link").symlink_to(parent / "something")
    LocalFiles(parent).close()
    assert sorted(entry.name for entry in parent.iterdir()) == ["epd-vllm-link", "something"]


def test_two_that_start_at_the_same_moment_do_not_take_each_other_for_dead(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second looks around after the first has made its lock's file and before it holds the lock."""
    lock, others = fcntl.flock, []

    def flock(handle: int, operation: int) -> Any:
        if not others and operation == fcntl.LOCK_EX:
            others.append(None)
            others[0] = LocalFiles(parent)
        return lock(handle, operation)

    monkeypatch.setattr(owned_directory.fcntl, "flock", flock)
    first = LocalFiles(parent)
    for each in (first, others[0]):
        each.add(rows(), WHAT, None)
        each.close()
    assert list(parent.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        LocalFiles(tmp_path / "missing")
