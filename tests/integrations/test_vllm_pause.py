"""vLLM's scheduler rests while embeddings are on their way, and not a moment longer than it has nothing else to do."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from sidecar.integrations.vllm.pause import Pause

# Far from the 5 s that a rest may take at most, on a busy machine too.
SOON_S = 3.0


class Engine:
    """As vLLM's: what it is told comes by `input_queue`, and its step ends in the connector."""

    def __init__(self, pause: Pause) -> None:
        self.input_queue: queue.Queue[str] = queue.Queue()
        self._pause = pause

    def step(self) -> float:
        begun = time.monotonic()
        self._pause.rest()
        return time.monotonic() - begun


def never(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def later(call: Callable[[], None]) -> None:
    threading.Timer(0.2, call).start()


def test_it_rests_until_an_embedding_has_come() -> None:
    news = threading.Event()
    engine = Engine(Pause(news.wait, alone=True))
    later(news.set)
    assert 0.15 < engine.step() < SOON_S


def test_a_new_request_ends_the_rest() -> None:
    engine = Engine(Pause(never, alone=True))
    later(lambda: engine.input_queue.put("a request"))
    assert 0.15 < engine.step() < SOON_S
    assert engine.input_queue.qsize() == 1  # it was only looked at
    assert engine.step() < 0.15


def test_where_others_wait_for_its_steps_it_rests_for_a_moment() -> None:
    assert Engine(Pause(never, alone=False)).step() < 0.15


def test_an_engine_without_such_a_queue_rests_for_a_moment() -> None:
    pause = Pause(never, alone=True)
    begun = time.monotonic()
    pause.rest()
    assert time.monotonic() - begun < 0.15


def test_nothing_under_way_is_no_reason_to_rest() -> None:
    assert Engine(Pause(lambda _: True, alone=True)).step() < 0.15
