"""What plots are drawn with: ink, lines and words, as SVG."""

from __future__ import annotations

from html import escape

INK, FAINT, GRID = "#1b2430", "#5d6877", "#e6e9ee"

STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; font-size: 12.5px; }
.number { font-variant-numeric: tabular-nums; }
"""


def duration(value_ms: float) -> str:
    return f"{value_ms / 1e3:.3g} s" if value_ms >= 999.5 else f"{value_ms:.3g} ms"


def line(x1: float, y1: float, x2: float, y2: float, colour: str = GRID) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}"/>'


def text(
    x: float, y: float, text: str, colour: str = INK, *, size: float = 12.5, weight: int = 400, anchor: str = "start"
) -> str:
    return (
        f'<text class="number" x="{x:.1f}" y="{y:.1f}" fill="{colour}" style="font-size:{size}px;font-weight:{weight}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )
