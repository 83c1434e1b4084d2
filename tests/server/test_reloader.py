"""Reloads, one after another, of models whose callers do not let go of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sidecar.server.reload import Reloader


class FakeModel:
    def __init__(self, close: Callable[[float], bool], precision: str) -> None:
        self.fingerprint = "f"
        lane = SimpleNamespace(identity=SimpleNamespace(runtime="openvino", precision=precision))
        self.scheduler = SimpleNamespace(store=None, close=close, lanes=[lane])


class Models:
    """Stands for the service, its calls and the loader; counts the models that are in memory."""

    def __init__(self, *, readers: bool) -> None:
        self.readers = readers
        self.alive = self.most = self.loads = 0
        self.sent_away: list[Any] = []
        self.precision = "f32"
        self.loading, self.may_load = asyncio.Event(), asyncio.Event()
        self.may_load.set()
        self.model = self._new()

    def _new(self) -> Any:
        self.alive += 1
        self.most = max(self.most, self.alive)
        return FakeModel(self._close, self.precision)

    def _close(self, timeout_s: float) -> bool:
        self.alive -= 1
        return True

    async def load(self) -> Any:
        self.loads += 1
        self.loading.set()
        await self.may_load.wait()
        await asyncio.sleep(0.02)
        return self._new()

    async def ended(self, model: Any) -> None:
        while not self.readers and model not in self.sent_away:
            await asyncio.sleep(0.001)

    async def send_away(self, model: Any) -> int:
        self.sent_away.append(model)
        return 1

    def reloader(self, patience_s: float, tmp_path: Path) -> Reloader:
        everything: Any = self
        return Reloader(everything, everything, self.load, tmp_path, watch=False, failed=print, patience_s=patience_s)

    async def reload(self, asks: int, every_s: float, patience_s: float, tmp_path: Path) -> None:
        reloader = self.reloader(patience_s, tmp_path)
        running = asyncio.create_task(reloader.run())
        for _ in range(asks):
            reloader.ask()
            await asyncio.sleep(every_s)
        await asyncio.sleep(patience_s + 0.2)
        running.cancel()


def test_there_are_never_more_than_two_models(tmp_path: Path) -> None:
    models = Models(readers=False)
    asyncio.run(models.reload(6, 0.06, 0.05, tmp_path))
    assert models.most == 2
    assert models.loads >= 3
    assert len(models.sent_away) == models.loads - 1  # the last replaced one's callers are in nobody's way


def test_callers_in_nobodys_way_are_left_alone(tmp_path: Path) -> None:
    models = Models(readers=False)
    asyncio.run(models.reload(1, 0, 0.05, tmp_path))
    assert (models.loads, models.sent_away, models.alive) == (1, [], 2)


def test_requests_to_reload_that_come_together_are_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those that come before a load are one, and so are those during it: the artifact may have changed since it began."""
    caplog.set_level(logging.INFO)
    models = Models(readers=True)

    async def run() -> None:
        models.may_load.clear()
        reloader = models.reloader(0, tmp_path)
        running = asyncio.create_task(reloader.run())
        for _ in range(10):
            reloader.ask()
        await models.loading.wait()
        for _ in range(10):
            reloader.ask()
            await asyncio.sleep(0)
        assert models.loads == 1
        models.may_load.set()
        while models.loads < 2 or models.alive > 1:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)  # in which a third one would begin
        running.cancel()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert (models.loads, models.alive) == (2, 1)
    assert caplog.text.count("while a reload is waiting") >= 9
    assert "asked to reload while still loading" in caplog.text


@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_a_reload_that_changes_what_the_lanes_run_is_warned_of(
    precision: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = Models(readers=True)
    models.precision = precision
    asyncio.run(models.reload(1, 0, 0, tmp_path))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    expected = ["the new artifact changes what the lanes run: openvino/int8 in the place of openvino/f32"]
    assert warnings == (expected if precision == "int8" else [])
