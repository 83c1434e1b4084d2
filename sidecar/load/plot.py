"""A run as a picture: each item a dot by when it ended and how long it took, with the distribution of the answered ones
beside it on the same scale, and below it how many ended in each second. SVG with nothing beside it, or a page with the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from textwrap import wrap

from sidecar.load.axes import Axis, linear_axis, logarithmic_axis
from sidecar.load.report import Summary, lines, settings
from sidecar.load.svg import FAINT, INK, STYLE, duration, line, text
from sidecar.load.tally import Kind, Outcome, Tally, percentile

# A dot's colour and name, in the order of the legend. Told apart also by those who see no difference of red and green.
_ENCODED, _STORED = "encoded", "from the store"  # the two ways of being answered
_COLOURS = {
    _ENCODED: "#2f6fd0",
    _STORED: "#0fa3a3",
    "refused": "#e8890c",
    "expired": "#8e4ec6",
    "cancelled": "#8b93a1",
    "failed": "#d22f3d",
}

_WIDTH, _HEIGHT = 1120, 676
_LEFT, _RIGHT = 84, 790  # of the dots
_TOP, _BOTTOM = 144, 504
_SIDE_LEFT, _SIDE_RIGHT = 812, 990  # of the distribution; its percentiles are labelled to the right
_STRIP_TOP, _STRIP_BOTTOM = 538, 616  # of the items per second
_MOST_DOTS = 4000  # of a colour: more would be one blot, and megabytes
_LEAST_MS = 0.01
_ROWS = 46  # of the distribution
_LEAST_COLUMNS, _MOST_COLUMNS, _ITEMS_A_COLUMN = 12, 88, 6  # of the items per second
_PERCENTS = (50, 90, 99)
_LABEL_HEIGHT = 15.0
_LINE_CHARS, _MOST_LINES = 150, 2  # of the settings

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ margin: 2rem auto; max-width: 1160px; padding: 0 1rem; background: #f4f6f9; color: #1b2430; }}
svg, pre {{ display: block; width: 100%; height: auto; box-sizing: border-box; background: #fff; border-radius: 10px;
  white-space: pre-wrap; box-shadow: 0 1px 3px #1b243026; }}
pre {{ padding: 1.4rem 1.8rem; font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }}
</style></head><body>
{svg}
<pre>{report}</pre>
</body></html>
"""


def write_plot(target: Path, tally: Tally, figures: Summary) -> None:
    """Draw into a file: a page if it ends in .html, else an SVG.

    Raises:
        OSError: if it cannot be written.
    """
    svg = draw(tally, figures)
    if target.suffix.lower() == ".html":
        svg = _PAGE.format(title=escape(_title(figures)), svg=svg, report=escape("\n".join(lines(figures))))
    target.write_text(svg, "utf-8")


def draw(tally: Tally, figures: Summary) -> str:
    groups = {name: [outcome for outcome in tally.outcomes if _group(outcome) == name] for name in _COLOURS}
    groups = {name: outcomes for name, outcomes in groups.items() if outcomes}
    answered = tally.of(Kind.ANSWERED)
    time = linear_axis(max(tally.elapsed_s, 0.001), _LEFT, _RIGHT, most_ticks=8, round_up=False)
    latency = logarithmic_axis((one.latency_ms for one in tally.outcomes), _BOTTOM, _TOP, least=_LEAST_MS)
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
            f"<title>{escape(_title(figures))}</title><style>{STYLE}</style>",
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
            *_heading(figures, groups),
            *_grid(latency),
            *_dots(groups, time, latency),
            *_distribution(groups, latency),
            *_percentiles([one.latency_ms for one in answered], latency),
            *_strip(groups, time),
            "</svg>\n",
        )
    )


def _title(figures: Summary) -> str:
    return f"{figures['sent']:,} items in {figures['elapsed_s']:,.1f} s on {figures['server'].get('address', '?')}"


def _group(outcome: Outcome) -> str:
    if outcome.kind is Kind.ANSWERED:
        return _STORED if outcome.cached else _ENCODED
    return str(outcome.kind)


def _heading(figures: Summary, groups: dict[str, list[Outcome]]) -> Iterator[str]:
    yield text(_LEFT, 40, _title(figures), size=21, weight=600)
    for number, wrapped in enumerate(wrap(", ".join(settings(figures["settings"])), _LINE_CHARS)[:_MOST_LINES]):
        yield text(_LEFT, 63 + 17 * number, wrapped, FAINT)
    x = float(_LEFT)
    for name, outcomes in groups.items():
        thinned = _thinning(outcomes)
        label = f"{name} {len(outcomes):,}" + (f" (a dot for {thinned})" if thinned > 1 else "")
        yield f'<circle cx="{x + 5:.1f}" cy="104" r="5" fill="{_COLOURS[name]}"/>'
        yield text(x + 16, 108.5, label)
        x += 34 + 7.0 * len(label)


def _grid(latency: Axis) -> Iterator[str]:
    for tick in latency.ticks:
        y = latency.place(tick)
        yield line(_LEFT, y, _RIGHT, y)
        yield line(_SIDE_LEFT, y, _SIDE_RIGHT, y)
        yield text(_LEFT - 10, y + 4.5, duration(tick), FAINT, anchor="end")
    yield text(_LEFT, _TOP - 9, "latency, by when the item ended", FAINT)
    yield text(_SIDE_LEFT, _TOP - 9, "distribution of the answered", FAINT)


def _dots(groups: dict[str, list[Outcome]], time: Axis, latency: Axis) -> Iterator[str]:
    # The rarest last, so that they lie on top.
    for name, outcomes in sorted(groups.items(), key=lambda group: -len(group[1])):
        yield f'<g fill="{_COLOURS[name]}" fill-opacity="0.55">'
        for outcome in outcomes[:: _thinning(outcomes)]:
            x, y = time.place(outcome.finished_s), latency.place(outcome.latency_ms)
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'
        yield "</g>"


def _thinning(outcomes: Sequence[Outcome]) -> int:
    return math.ceil(len(outcomes) / _MOST_DOTS)


def _distribution(groups: dict[str, list[Outcome]], latency: Axis) -> Iterator[str]:
    """How many answered items took how long, lying on its side."""
    row_height = (_BOTTOM - _TOP) / _ROWS
    piles = _piles(
        groups, (_ENCODED, _STORED), _ROWS, lambda one: (_BOTTOM - latency.place(one.latency_ms)) / row_height
    )
    most = max((sum(pile.values()) for pile in piles), default=0) or 1
    for row, pile in enumerate(piles):
        x, y = float(_SIDE_LEFT), _BOTTOM - (row + 1) * row_height
        for name, count in pile.items():
            width = count / most * (_SIDE_RIGHT - _SIDE_LEFT)
            yield _bar(x, y, width, row_height, name, f"{count:,} {name}")
            x += width
    yield line(_SIDE_LEFT, _TOP, _SIDE_LEFT, _BOTTOM, FAINT)
    yield text(_SIDE_RIGHT, _BOTTOM + 19, f"longest bar: {most:,} items", FAINT, anchor="end")


def _percentiles(latencies_ms: Sequence[float], latency: Axis) -> Iterator[str]:
    """Lines through the distribution, with labels that keep off each other."""
    below = math.inf
    for percent in _PERCENTS if latencies_ms else ():
        value = percentile(latencies_ms, percent)
        y = latency.place(value)
        label_y = below = min(y, below - _LABEL_HEIGHT)
        path = f"M{_SIDE_LEFT} {y:.1f}H{_SIDE_RIGHT}L{_SIDE_RIGHT + 12} {label_y:.1f}"
        yield f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1" stroke-dasharray="4 3"/>'
        yield text(_SIDE_RIGHT + 17, label_y + 4.5, f"p{percent}  {duration(value)}", weight=600)


def _strip(groups: dict[str, list[Outcome]], time: Axis) -> Iterator[str]:
    """How many items ended when, and how."""
    items = sum(len(outcomes) for outcomes in groups.values())
    columns = min(max(items // _ITEMS_A_COLUMN, _LEAST_COLUMNS), _MOST_COLUMNS)
    column_s = time.high / columns
    piles = _piles(groups, tuple(groups), columns, lambda one: one.finished_s / column_s)
    most = max((sum(pile.values()) for pile in piles), default=0)
    rate = linear_axis(most / column_s, _STRIP_BOTTOM, _STRIP_TOP, most_ticks=3)
    for tick in rate.ticks:
        y = rate.place(tick)
        yield line(_LEFT, y, _RIGHT, y)
        yield text(_LEFT - 10, y + 4.5, f"{tick:,.6g}", FAINT, anchor="end")
    width = (_RIGHT - _LEFT) / columns
    for column, pile in enumerate(piles):
        y = float(_STRIP_BOTTOM)
        for name, count in pile.items():
            top = y - (rate.start - rate.place(count / column_s))
            yield _bar(_LEFT + column * width, top, width, y - top, name, f"{count:,} {name}")
            y = top
    yield line(_LEFT, _STRIP_BOTTOM, _RIGHT, _STRIP_BOTTOM, FAINT)
    yield text(_LEFT, _STRIP_TOP - 9, "items that ended, per second", FAINT)
    for tick in time.ticks:
        x = time.place(tick)
        yield line(x, _STRIP_BOTTOM, x, _STRIP_BOTTOM + 5, FAINT)
        yield text(x, _STRIP_BOTTOM + 20, f"{tick:,.6g}", FAINT, anchor="middle")
    yield text((_LEFT + _RIGHT) / 2, _STRIP_BOTTOM + 42, "seconds since the run began", FAINT, anchor="middle")


def _piles(
    groups: dict[str, list[Outcome]], names: Iterable[str], count: int, place: Callable[[Outcome], float]
) -> list[dict[str, int]]:
    """So many piles, each with how many of which group lie at its place."""
    piles: list[dict[str, int]] = [{} for _ in range(count)]
    for name in names:
        for outcome in groups.get(name, ()):
            pile = piles[min(max(int(place(outcome)), 0), count - 1)]
            pile[name] = pile.get(name, 0) + 1
    return piles


def _bar(x: float, y: float, width: float, height: float, name: str, hint: str) -> str:
    """With a hairline of paper around it."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{_COLOURS[name]}" '
        f'stroke="#fff" stroke-width="0.6"><title>{escape(hint)}</title></rect>'
    )
