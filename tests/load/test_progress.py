"""The line on a terminal."""

from __future__ import annotations

import asyncio
from io import StringIO

from virtual_time import embedding, run

from sidecar.load.progress import shown
from sidecar.load.tally import Tally


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


async def watch(out: StringIO) -> None:
    tally = Tally(asyncio.get_running_loop().time())
    async with shown(tally, out):
        tally.note_sent(3, 0.0)
        tally.note_embedding(embedding(), tally.began, tally.began)
        tally.note_cancelled(tally.began, tally.began)
        await asyncio.sleep(2.1)


def test_a_terminal_has_one_line_that_is_gone_at_the_end() -> None:
    out = Terminal()
    run(watch(out))
    *_, last, erased = out.getvalue().split("\r")
    assert last.startswith("2 s: 3 sent, 1 under way, 1 answered, 1 cancelled, 0.5 items/s")
    assert erased == "\x1b[K"
    assert "\n" not in out.getvalue()


def test_a_file_has_nothing() -> None:
    out = StringIO()
    run(watch(out))
    assert out.getvalue() == ""
