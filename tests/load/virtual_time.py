"""An event loop whose clock jumps to the next timer instead of waiting for it, and a client that runs on it."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np

from sidecar.client import Embedding, Item
from sidecar.replies import Lane, Result, StageTimes
from sidecar.vision.dtypes import DType
from sidecar.vision.grid import Grid

Answered = TypeVar("Answered")
Script = Callable[[Sequence[Item], float], AsyncGenerator[tuple[int, Result], None]]


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.now


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "nothing will ever happen again"
        self._loop.now += max(timeout, 0.0)
        return super().select(0)


def run(main: Coroutine[Any, Any, Answered]) -> Answered:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class ScriptedClient:
    """Answers as `script(items, timeout_s)` says, and knows how many calls were under way at most."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.calls: list[int] = []
        self.most_at_once = 0
        self._at_once = 0

    async def encode_stream(self, items: Sequence[Item], timeout_s: float) -> AsyncGenerator[tuple[int, Result], None]:
        self.calls.append(len(items))
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            async for answer in self._script(items, timeout_s):
                yield answer
        finally:
            self._at_once -= 1


def embedding(*, cached: bool = False) -> Embedding:
    return Embedding(
        key="key",
        grid=Grid(1, 4, 4),
        dtype=DType.FLOAT32,
        data=np.zeros((4, 3), np.float32),
        fingerprint="f1",
        lane=Lane("openvino", "CPU", "bf16"),
        times=StageTimes(1.0, 2.0, 3.0),
        cached=cached,
    )
