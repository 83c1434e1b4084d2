"""The file of a stored embedding: what safetensors reads is what was written, and nothing but that is mapped."""

from __future__ import annotations

import dataclasses
import errno
import gc
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from stores import descriptors, mappings, shared_memory, small_file_system, taken_bytes

from sidecar.store_file import FILE_NAME, TENSOR, Description, StoreFileError, create, file_bytes, read
from sidecar.vision.dtypes import DType, from_float32
from sidecar.vision.grid import Grid

descriptions = st.builds(
    Description,
    grid=st.builds(Grid, st.integers(1, 9), st.integers(2, 9999), st.integers(2, 9999)),
    tokens=st.integers(1, 70),
    width=st.integers(1, 300),
    dtype=st.sampled_from([DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16]),
    fingerprint=st.text("0123456789abcdef", max_size=64),
)
WHAT = Description(grid=Grid(1, 4, 6), tokens=6, width=5, dtype=DType.FLOAT32, fingerprint="f")


@pytest.fixture
def store() -> Iterator[Path]:
    with shared_memory() as directory:
        yield directory


def write(store: Path, name: str = "name", what: Description = WHAT) -> Path:
    (store / name).mkdir()
    rows = create(store / name / FILE_NAME, what)
    rows[:] = np.arange(rows.size, dtype=rows.dtype).reshape(rows.shape)
    return store / name / FILE_NAME


@settings(max_examples=40, deadline=None)
@given(what=descriptions, seed=st.integers(0, 99))
def test_safetensors_reads_what_was_written(what: Description, seed: int) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    values = np.random.default_rng(seed).standard_normal((what.tokens, what.width)).astype(np.float32)
    with shared_memory() as store:
        path = store / FILE_NAME
        create(path, what)[:] = from_float32(values, what.dtype)

        if what.dtype is not DType.BFLOAT16:  # numpy has none
            (name, loaded), *others = load_file(path).items()
            assert (name, others) == (TENSOR, [])
            np.testing.assert_array_equal(loaded, from_float32(values, what.dtype))
        tensor = load_torch(path)[TENSOR]
        assert tensor.dtype is getattr(torch, what.dtype)
        assert torch.equal(tensor, torch.from_numpy(values).to(tensor.dtype))
        with safe_open(path, "np") as opened:
            metadata = opened.metadata()
        assert (json.loads(metadata["grid_thw"]), metadata["fingerprint"]) == (list(what.grid), what.fingerprint)
        # Vector loads of the first row do not straddle cache lines.
        assert (path.stat().st_size - what.nbytes) % 64 == 0


@settings(max_examples=60, deadline=None)
@given(what=descriptions)
def test_a_file_takes_no_more_than_it_is_counted_for_and_reads_back(what: Description) -> None:
    with shared_memory() as store:
        path = write(store, what=what)
        assert path.stat().st_blocks * 512 <= taken_bytes(store) <= file_bytes(what)
        assert file_bytes(what) <= path.stat().st_size + 2 * os.sysconf("SC_PAGESIZE")
        rows = read(store, "name", what)
        assert (rows.shape, rows.dtype) == ((what.tokens, what.width), what.dtype.storage)
        np.testing.assert_array_equal(rows, np.arange(rows.size, dtype=rows.dtype).reshape(rows.shape))


def test_nobody_else_can_read_a_file_and_nobody_can_write_what_was_read(store: Path) -> None:
    assert stat.S_IMODE(write(store).stat().st_mode) == 0o600
    with pytest.raises(ValueError, match="read-only"):
        read(store, "name", WHAT)[0, 0] = 1


def test_what_was_read_stays_when_the_file_goes(store: Path) -> None:
    path = write(store)
    rows = read(store, "name", WHAT)
    path.unlink()
    path.parent.rmdir()
    assert rows.ravel().tolist() == list(range(30))


def test_what_nobody_uses_any_more_holds_neither_memory_nor_descriptors(store: Path) -> None:
    gc.collect()
    before = descriptors()
    write(store)
    arrays = [read(store, "name", WHAT)[1:] for _ in range(20)]  # part of one holds the whole
    assert len(mappings(store)) == 20
    del arrays
    gc.collect()
    assert not mappings(store) and descriptors() <= before
    for name in ("..", "missing"):
        with pytest.raises((OSError, StoreFileError)):
            read(store, name, WHAT)
    with pytest.raises(StoreFileError):
        read(store, "name", dataclasses.replace(WHAT, fingerprint="other"))
    gc.collect()
    assert not mappings(store) and descriptors() <= before


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../name", "/etc", "name/", "a\0b", "naïve", "\udce9", "\ud800"]
)
def test_a_name_that_is_no_plain_file_name_opens_nothing(store: Path, name: str) -> None:
    write(store)
    with pytest.raises(StoreFileError, match="must be a plain file name"):
        read(store, name, WHAT)


def test_links_in_the_store_are_not_followed(store: Path, tmp_path: Path) -> None:
    outside = write(tmp_path, "outside")
    (store / "directory").symlink_to(outside.parent)
    (store / "file").mkdir()
    (store / "file" / FILE_NAME).symlink_to(outside)
    for name in ("directory", "file"):
        with pytest.raises(OSError):
            read(store, name, WHAT)


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def with_byte(at: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return change


OTHERS: dict[str, Callable[[Path], object]] = {
    "nothing": replaced_by(lambda path: path.touch()),
    "a few bytes": lambda path: os.truncate(path, 7),
    "half a header": lambda path: os.truncate(path, 40),
    "a row too few": lambda path: os.truncate(path, path.stat().st_size - 20),
    "a byte too many": lambda path: os.truncate(path, path.stat().st_size + 1),
    "a pipe that nobody writes to": replaced_by(os.mkfifo),
    "a device": replaced_by(lambda path: path.symlink_to("/dev/zero")),
    "a directory": replaced_by(lambda path: path.mkdir()),
    "a header longer than the file": with_byte(5),
    "another tensor": with_byte(140),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_no_such_file_is_refused(store: Path, other: str) -> None:
    path = write(store)
    OTHERS[other](path)
    with pytest.raises((OSError, StoreFileError)):
        read(store, "name", WHAT)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_header_with_any_byte_changed_is_refused(data: st.DataObject) -> None:
    with shared_memory() as store:
        path = write(store)
        with_byte(data.draw(st.integers(0, path.stat().st_size - WHAT.nbytes - 1)))(path)
        with pytest.raises(StoreFileError, match="not of the grid, size, type or model"):
            read(store, "name", WHAT)


@pytest.mark.parametrize(
    "announced",
    [
        dataclasses.replace(WHAT, grid=Grid(1, 6, 4)),
        dataclasses.replace(WHAT, tokens=5, width=6),
        dataclasses.replace(WHAT, tokens=7),
        dataclasses.replace(WHAT, dtype=DType.BFLOAT16),
        dataclasses.replace(WHAT, fingerprint="g"),
    ],
)
def test_another_embedding_than_announced_is_refused(store: Path, announced: Description) -> None:
    write(store)
    with pytest.raises(StoreFileError, match="not of the grid, size, type or model that was announced"):
        read(store, "name", announced)


def test_what_is_there_already_is_not_written_over(store: Path) -> None:
    path = write(store)
    before = path.read_bytes()
    (store / "target").touch()
    (store / "link").symlink_to(store / "target")
    (store / "dangling").symlink_to(store / "nowhere")
    for taken in (path, store / "link", store / "dangling"):
        with pytest.raises(FileExistsError):
            create(taken, WHAT)
    assert (path.read_bytes(), (store / "target").read_bytes()) == (before, b"")
    assert not (store / "nowhere").exists()


def test_a_full_file_system_says_so_before_anything_is_written_to_it(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "full") as full:
        before = descriptors()
        with pytest.raises(OSError) as raised:
            create(full / FILE_NAME, dataclasses.replace(WHAT, tokens=2**20))
        assert raised.value.errno == errno.ENOSPC
        assert descriptors() <= before
