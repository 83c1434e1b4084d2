"""The files of `local` mode: there until they have been read, and never longer than that."""

from __future__ import annotations

import asyncio
import errno
import mmap
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sidecar.integrations.dynamo import local_files
from sidecar.integrations.dynamo.local_files import LocalFiles
from sidecar.vision.dtypes import Array, DType

VALUES = np.arange(24, dtype=np.float32).reshape(3, 8)
BITS = np.arange(24, dtype=np.uint16).reshape(3, 8)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_files, "_READ_S", 0.2)


def run(
    test: Callable[[LocalFiles], Awaitable[None]], parent: Path, capacity: int = 1 << 20, unread_s: float = 60
) -> None:
    async def limited() -> None:
        files = LocalFiles(parent, capacity_bytes=capacity, unread_s=unread_s)
        try:
            await asyncio.wait_for(test(files), 20)
        finally:
            await files.close(0)
        assert not list(parent.iterdir())

    asyncio.run(limited())


async def add(files: LocalFiles, values: Array = VALUES, dtype: DType = DType.FLOAT32) -> Path:
    (path,) = await files.add([(values, dtype)])
    return path


async def gone(path: Path) -> None:
    while path.exists():
        await asyncio.sleep(0.01)


def test_it_is_read_as_prefill_reads_it_and_goes_afterwards(tmp_path: Path) -> None:
    async def test(files: LocalFiles) -> None:
        path = await add(files)
        bits = await add(files, BITS, DType.BFLOAT16)
        await asyncio.sleep(0.5)
        assert path.exists() and path.stat().st_mode & 0o777 == 0o600
        tensor = load_file(path)["ec_cache"]
        assert tensor.shape == (1, 3, 8) and tensor.dtype == torch.float32
        await gone(path)
        assert bits.exists() and files.count == 1
        np.testing.assert_array_equal(tensor[0].numpy(), VALUES)  # whoever has it mapped keeps it
        narrow = load_file(bits)["ec_cache"]
        assert narrow.dtype == torch.bfloat16
        np.testing.assert_array_equal(narrow[0].view(torch.int16).numpy(), BITS.view(np.int16))
        await gone(bits)
        assert not files.unread

    run(test, tmp_path)


def test_one_that_nobody_reads_goes_when_its_time_is_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(files: LocalFiles) -> None:
        path = await add(files)
        await gone(path)
        assert files.unread == 1

    run(test, tmp_path, unread_s=0.1)
    assert "was not read within 0.1 s" in caplog.text


def test_who_would_add_more_than_fits_waits_for_a_reader(tmp_path: Path) -> None:
    async def test(files: LocalFiles) -> None:
        first = await add(files)
        second = asyncio.create_task(add(files))
        await asyncio.sleep(0.1)
        assert not second.done()
        load_file(first)
        assert (await second).exists() and not first.exists()

    run(test, tmp_path, capacity=VALUES.nbytes)


def test_one_larger_than_all_that_may_lie_there_passes_when_nothing_does(tmp_path: Path) -> None:
    async def test(files: LocalFiles) -> None:
        assert (await add(files)).exists()

    run(test, tmp_path, capacity=1)


def test_requests_of_several_images_do_not_wait_for_one_another_for_ever(tmp_path: Path) -> None:
    async def test(files: LocalFiles) -> None:
        async def request() -> None:
            for path in await files.add([(VALUES, DType.FLOAT32)] * 3):
                load_file(path)

        # Room for four; one after the other has room for all of its three.
        await asyncio.gather(*(request() for _ in range(4)))

    run(test, tmp_path, capacity=4 * mmap.PAGESIZE)


def test_a_caller_who_leaves_while_it_is_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    write = local_files._write

    def slow(*arguments: Any) -> None:
        begun.set()
        assert go_on.wait(10)
        write(*arguments)

    async def test(files: LocalFiles) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(local_files, "_write", slow)
            adding = asyncio.create_task(add(files))
            await asyncio.to_thread(begun.wait, 10)
            adding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await adding
            assert files.bytes == mmap.PAGESIZE  # the thread is at it still
            go_on.set()
            while files.bytes:
                await asyncio.sleep(0.01)
        assert not list(files.path.glob("*.safetensors"))

    run(test, tmp_path)


def test_one_who_no_longer_waits_for_room_does_not_hold_up_the_next(tmp_path: Path) -> None:
    async def test(files: LocalFiles) -> None:
        first = await add(files)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(add(files), 0.05)
        third = asyncio.create_task(add(files))
        load_file(first)
        assert (await third).exists()

    run(test, tmp_path, capacity=VALUES.nbytes)


def test_no_more_is_promised_than_the_file_system_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    system = SimpleNamespace(f_bavail=2, f_frsize=mmap.PAGESIZE)
    monkeypatch.setattr(local_files.os, "statvfs", lambda _: system)

    async def test(files: LocalFiles) -> None:
        first = await add(files)
        second = asyncio.create_task(add(files))
        await asyncio.sleep(0.1)
        assert not second.done()
        load_file(first)
        await second

    run(test, tmp_path, capacity=1 << 60)
    assert "its file system has no more room" in caplog.text


def test_a_file_system_that_is_full_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    async def test(files: LocalFiles) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(local_files, "_write", full)
            with pytest.raises(OSError, match="No space left"):
                await add(files)
            while files.bytes:
                await asyncio.sleep(0)
        assert not list(files.path.glob("*.safetensors"))
        await add(files)

    run(test, tmp_path, capacity=VALUES.nbytes)


def test_while_others_fill_the_file_system_it_waits_for_its_own_files_to_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, full = local_files._write, True

    def may_be_full(path: Path, values: Array, dtype: DType) -> None:
        if full:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, values, dtype)

    async def test(files: LocalFiles) -> None:
        nonlocal full
        full = False
        first = await add(files)
        monkeypatch.setattr(local_files, "_write", may_be_full)
        full = True
        second, third = asyncio.create_task(add(files)), asyncio.create_task(add(files))
        await asyncio.sleep(0.1)
        assert not second.done() and list(files.path.glob("*.safetensors")) == [first]
        third.cancel()
        full = False
        load_file(first)
        assert (await second).exists()
        await gone(first)
        assert files.bytes == mmap.PAGESIZE

    run(test, tmp_path)


def test_the_end_waits_for_readers_and_not_for_ever(tmp_path: Path) -> None:
    async def ends() -> float:
        files = LocalFiles(tmp_path, capacity_bytes=1 << 20, unread_s=60)
        path = await add(files)
        asyncio.get_running_loop().call_later(0.3, load_file, path)
        began = time.monotonic()
        await files.close(10)
        return time.monotonic() - began

    assert 0.3 <= asyncio.run(ends()) < 5
    assert not list(tmp_path.iterdir())
