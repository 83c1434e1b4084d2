"""How long vLLM's scheduler rests when all that it has to do is to wait for embeddings.

vLLM takes an empty step a thousand times a second then, and each goes to all workers, which keep their cores busy for a second
after each message: a sidecar on the same host gets next to nothing of them (a start of 2 s took 80 s on two cores). So an empty
step is held back until an embedding has come or vLLM has been told something new: a request, an abort, the wish to stop. All of
that reaches its engine through one queue, which is looked at here without being touched. Where there is no such queue, or others
wait for this engine's steps, it is held back for a moment only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_MOMENT_S, _LOOK_EVERY_S, _LONGEST_S = 0.005, 0.01, 5.0


class Pause:
    """
    Args:
        wait_for_news: returns at news of an embedding, or after the seconds given, whatever comes first; and says which it was.
        alone: nobody waits for this engine's steps: no other data parallel rank, and no KV cache that is being loaded.
    """

    def __init__(self, wait_for_news: Callable[[float], bool], *, alone: bool) -> None:
        self._wait_for_news = wait_for_news
        self._alone = alone
        self._told: Any = None
        self._looked = False

    def rest(self) -> None:
        """To be called in a step that has nothing to run, while no other is under way."""
        if not self._looked:
            self._looked = True
            self._told = _input_queue() if self._alone else None
        if self._told is None:
            self._wait_for_news(_MOMENT_S)
            return
        ends = time.monotonic() + _LONGEST_S
        while self._told.empty() and not self._wait_for_news(_LOOK_EVERY_S) and time.monotonic() < ends:
            pass


def _input_queue() -> Any:
    """The queue of the engine that is taking this step (`EngineCoreProc.input_queue`, vllm/v1/engine/core.py), or None."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        queue = getattr(frame.f_locals.get("self"), "input_queue", None)
        if callable(getattr(queue, "empty", None)):
            return queue
        frame = frame.f_back
    return None
