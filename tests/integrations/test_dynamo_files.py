"""The files of `local` mode: there until they have been read, and never longer than that."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sidecar.integrations.dynamo import local_files
from sidecar.integrations.dynamo.local_files import LocalFiles
from sidecar.vision.dtypes import DType

VALUES = np.arange(24, dtype=np.float32).reshape(3, 8)
BITS = np.arange(24, dtype=np.uint16).reshape(3, 8)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_files, "_AFTER_READ_S", 0.2)
    monkeypatch.setattr(local_files, "_LOOK_S", 0.02)


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


async def gone(path: Path) -> None:
    while path.exists():
        await asyncio.sleep(0.01)


def test_it_is_read_as_prefill_reads_it_and_goes_afterwards(tmp_path: Path) -> None:
    async def test(files: LocalFiles) -> None:
        path = await files.add(VALUES, (1, 3, 8), DType.FLOAT32)
        bits = await files.add(BITS, (1, 3, 8), DType.BFLOAT16)
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
        path = await files.add(VALUES, (1, 3, 8), DType.FLOAT32)
        await gone(path)
        assert files.unread == 1

    run(test, tmp_path, unread_s=0.1)
    assert "was not read within 0.1 s" in caplog.text


def test_who_would_add_more_than_fits_waits_for_a_reader(tmp_path: Path) -> None:
    async def test(files: LocalFiles) -> None:
        first = await files.add(VALUES, (1, 3, 8), DType.FLOAT32)
        second = asyncio.create_task(files.add(VALUES, (1, 3, 8), DType.FLOAT32))
        await asyncio.sleep(0.1)
        assert not second.done()
        load_file(first)
        assert (await second).exists() and not first.exists()

    run(test, tmp_path, capacity=VALUES.nbytes)


def test_one_larger_than_all_that_may_lie_there_passes_when_nothing_does(tmp_path: Path) -> None:
    async def test(files: LocalFiles) -> None:
        assert (await files.add(VALUES, (1, 3, 8), DType.FLOAT32)).exists()

    run(test, tmp_path, capacity=1)


def test_a_withdrawn_one_goes_at_once_and_makes_room(tmp_path: Path) -> None:
    async def test(files: LocalFiles) -> None:
        for _ in range(3):
            path = await files.add(VALUES, (1, 3, 8), DType.FLOAT32)
            files.remove(str(path))
            files.remove(str(path))
            assert not path.exists()

    run(test, tmp_path, capacity=VALUES.nbytes)


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
                await files.add(VALUES, (1, 3, 8), DType.FLOAT32)
        assert not list(files.path.glob("*.safetensors")) and not list(files.path.glob(".*.safetensors"))
        await files.add(VALUES, (1, 3, 8), DType.FLOAT32)

    run(test, tmp_path, capacity=VALUES.nbytes)


def test_one_whose_adding_is_cancelled_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, let_go = threading.Event(), threading.Event()
    write = local_files._write

    def slow(*arguments: Any) -> None:
        entered.set()
        assert let_go.wait(10)
        write(*arguments)

    async def test(files: LocalFiles) -> None:
        monkeypatch.setattr(local_files, "_write", slow)
        adding = asyncio.create_task(files.add(VALUES, (1, 3, 8), DType.FLOAT32))
        assert await asyncio.to_thread(entered.wait, 10)
        adding.cancel()
        await asyncio.sleep(0.05)
        let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await adding
        assert not [path for path in files.path.iterdir() if path.name != ".lock"]
        monkeypatch.setattr(local_files, "_write", write)
        await files.add(VALUES, (1, 3, 8), DType.FLOAT32)

    run(test, tmp_path, capacity=VALUES.nbytes)


def test_the_end_waits_for_readers_and_not_for_ever(tmp_path: Path) -> None:
    async def ends() -> float:
        files = LocalFiles(tmp_path, capacity_bytes=1 << 20, unread_s=60)
        path = await files.add(VALUES, (1, 3, 8), DType.FLOAT32)
        asyncio.get_running_loop().call_later(0.3, load_file, path)
        began = time.monotonic()
        await files.close(10)
        return time.monotonic() - began

    assert 0.3 <= asyncio.run(ends()) < 5
    assert not list(tmp_path.iterdir())
