"""One line about a run under way, rewritten on a terminal and nowhere else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TextIO

from sidecar.load.tally import Kind, Tally

_EVERY_S = 0.25
_TO_LINE_START, _ERASE_TO_END = "\r", "\x1b[K"


@asynccontextmanager
async def shown(tally: Tally, out: TextIO) -> AsyncGenerator[None, None]:
    """Keep the line up to date within; it is gone afterwards."""
    if not out.isatty():
        yield
        return
    showing = asyncio.create_task(_show(tally, out))
    try:
        yield
    finally:
        showing.cancel()
        out.write(_TO_LINE_START + _ERASE_TO_END)
        out.flush()


def line(tally: Tally, now: float) -> str:
    counts, seconds = tally.counts(), now - tally.began
    others = "".join(f", {count:,} {kind}" for kind, count in counts.items() if count and kind is not Kind.ANSWERED)
    rate = counts[Kind.ANSWERED] / seconds if seconds > 0 else 0.0
    return (
        f"{seconds:.0f} s: {tally.sent:,} sent, {tally.missing:,} under way, {counts[Kind.ANSWERED]:,} answered{others}, "
        f"{rate:,.1f} items/s"
    )


async def _show(tally: Tally, out: TextIO) -> None:
    while True:
        out.write(_TO_LINE_START + line(tally, asyncio.get_running_loop().time()) + _ERASE_TO_END)
        out.flush()
        await asyncio.sleep(_EVERY_S)
