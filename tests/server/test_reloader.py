"""Reloads, one after another, of models whose callers do not let go of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sidecar.server.reload import Reloader


class FakeModel:
    def __init__(self, close: Callable[[float], bool]) -> None:
        self.fingerprint = "f"
        self.scheduler = SimpleNamespace(store=None, close=close)


class Models:
    """Stands for the service, its calls and the loader; counts the models that are in memory."""

    def __init__(self, *, readers: bool) -> None:
        self.readers = readers
        self.alive = self.most = self.loads = 0
        self.sent_away: list[Any] = []
        self.model = self._new()

    def _new(self) -> Any:
        self.alive += 1
        self.most = max(self.most, self.alive)
        return FakeModel(self._close)

    def _close(self, timeout_s: float) -> bool:
        self.alive -= 1
        return True

    async def load(self) -> Any:
        self.loads += 1
        await asyncio.sleep(0.02)
        return self._new()

    async def ended(self, model: Any) -> None:
        while not self.readers and model not in self.sent_away:
            await asyncio.sleep(0.001)

    async def send_away(self, model: Any) -> int:
        self.sent_away.append(model)
        return 1

    async def reload(self, asks: int, every_s: float, patience_s: float, tmp_path: Path) -> None:
        everything: Any = self
        reloader = Reloader(
            everything, everything, self.load, tmp_path, watch=False, failed=print, patience_s=patience_s
        )
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


def test_requests_to_reload_that_come_together_are_one(tmp_path: Path) -> None:
    models = Models(readers=True)
    asyncio.run(models.reload(20, 0.0001, 0, tmp_path))
    assert models.loads <= 2
    assert models.alive == 1
