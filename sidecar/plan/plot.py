"""A plan as a picture: latency over the rate, a line for each number of CPU sidecars, with the target and the rate that was asked
about. SVG with nothing beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from pathlib import Path

from sidecar.load.axes import Axis, linear_axis, logarithmic_axis
from sidecar.load.svg import FAINT, INK, STYLE, duration, line, text
from sidecar.plan.answer import Curve, Plan
from sidecar.plan.report import answer, crossover

# Told apart also by those who see no difference of red and green.
_COLOURS = ("#2f6fd0", "#e8890c", "#8e4ec6", "#0fa3a3", "#d22f3d")
_WIDTH, _HEIGHT = 1120, 600
_LEFT, _RIGHT = 84, 930
_TOP, _BOTTOM = 128, 520
_LABEL_HEIGHT = 17.0
_LEAST_MS = 0.1


def write_plot(target: Path, plan: Plan) -> None:
    """Raises OSError if it cannot be written."""
    target.write_text(draw(plan), "utf-8")


def draw(plan: Plan) -> str:
    points = [point for curve in plan.curves for point in curve.points if math.isfinite(point[1])]
    rate = linear_axis(max((rate for rate, _ in points), default=1.0), _LEFT, _RIGHT, most_ticks=10, round_up=False)
    latency = logarithmic_axis([ms for _, ms in points], _BOTTOM, _TOP, least=_LEAST_MS)
    title = f"p{plan.percent} of the time that encoding adds to the first token"
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
            f"<title>{escape(title)}</title><style>{STYLE}</style>",
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
            text(_LEFT, 40, title, size=21, weight=600),
            text(_LEFT, 64, _sentence(answer(plan)), FAINT),
            text(_LEFT, 83, _sentence(crossover(plan)), FAINT),
            text(_LEFT, 102, _scanned(plan), FAINT),
            *_grid(rate, latency),
            *_marks(plan, rate, latency),
            *_lines(plan, rate, latency),
            "</svg>\n",
        )
    )


def _grid(rate: Axis, latency: Axis) -> Iterator[str]:
    for tick in latency.ticks:
        y = latency.place(tick)
        yield line(_LEFT, y, _RIGHT, y)
        yield text(_LEFT - 10, y + 4.5, duration(tick), FAINT, anchor="end")
    for tick in rate.ticks:
        x = rate.place(tick)
        yield line(x, _BOTTOM, x, _BOTTOM + 5, FAINT)
        yield text(x, _BOTTOM + 20, f"{tick:,.6g}", FAINT, anchor="middle")
    yield line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, FAINT)
    yield text((_LEFT + _RIGHT) / 2, _BOTTOM + 44, "requests a second", FAINT, anchor="middle")


def _marks(plan: Plan, rate: Axis, latency: Axis) -> Iterator[str]:
    if plan.target is not None and latency.low <= plan.target.ms <= latency.high:
        y = latency.place(plan.target.ms)
        yield _dashed(f"M{_LEFT} {y:.1f}H{_RIGHT}")
        yield text(_LEFT + 6, y - 6, f"target {duration(plan.target.ms)}", weight=600)
    asked = plan.traffic.rate_per_s
    if asked <= rate.high:
        x = rate.place(asked)
        yield _dashed(f"M{x:.1f} {_TOP}V{_BOTTOM}")
        yield text(x + 6, _TOP + 12, f"{asked:,.4g}/s asked about", weight=600)


def _lines(plan: Plan, rate: Axis, latency: Axis) -> Iterator[str]:
    """Each named where it ends, and the names kept off each other."""
    ends: list[tuple[float, str, str]] = []
    for number, curve in enumerate(plan.curves):
        places = [(rate.place(at), latency.place(ms)) for at, ms in curve.points if math.isfinite(ms)]
        if not places:
            continue
        colour = _COLOURS[number % len(_COLOURS)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        yield f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2.4" stroke-linejoin="round"/>'
        ends.append((places[-1][1], _name(curve, plan), colour))
    below = -math.inf
    for y, name, colour in sorted(ends):
        below = max(y, below + _LABEL_HEIGHT)
        yield text(_RIGHT + 12, below + 4.5, name, colour, weight=600)


def _name(curve: Curve, plan: Plan) -> str:
    cpus = f"{curve.cpus} CPU{'s' if curve.cpus > 1 else ''}"
    gpus = f"{plan.fleet.gpus} GPU{'s' if plan.fleet.gpus > 1 else ''}"
    if not curve.cpus:
        return f"{gpus} alone"
    return f"{gpus} + {cpus}" if plan.fleet.gpus else cpus


def _scanned(plan: Plan) -> str:
    """Of what the curves are, where that is not what the answer is of."""
    items = len(plan.traffic.arrivals)
    return f"Curves: the first {plan.scanned:,} of {items:,} pictures; answer: all" if plan.scanned < items else ""


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _dashed(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1" stroke-dasharray="5 4"/>'
