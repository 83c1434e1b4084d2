"""The accuracy table: on the terminal for who exports, and as one HTML page in the artifact for who is handed it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log10

from rich.console import Console
from rich.table import Table

from sidecar.artifact import Checkpoint, Variant

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1c2330 }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 2.5rem }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #dde2ea; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
.bar { display: inline-block; height: .7em; background: #3b7dd8 }
.fail .bar { background: #c8442f } .fail td { color: #c8442f }
tfoot td { font-weight: 600 } .note { color: #667 }
"""


def print_table(variants: Sequence[Variant], console: Console) -> None:
    """One row a variant: its worst row, its mean, its worst sample."""
    table = Table(title="Accuracy against float32 torch, row by row")
    for heading in ("variant", "cosine min", "cosine mean", "relative error", "bar", "worst sample", ""):
        named = heading in ("variant", "worst sample")
        table.add_column(heading, justify="left" if named else "right", no_wrap=heading == "variant")
    for variant in variants:
        accuracy = variant.accuracy
        if accuracy is None:
            table.add_row(variant.name, "–", "–", "–", "–", "not measured", "")
            continue
        worst = min(accuracy.samples, key=lambda sample: float(sample["cosine_min"]))
        table.add_row(
            variant.name,
            f"{accuracy.cosine_min:.5f}",
            f"{accuracy.cosine_mean:.5f}",
            f"{accuracy.relative_error:.2e}",
            f"{accuracy.bar}",
            f"{worst['name']} {tuple(worst['grid'])}",
            "[green]ok[/]" if accuracy.passed else "[red]below the bar[/]",
        )
    console.print(table)


def html_page(variants: Sequence[Variant], checkpoint: Checkpoint, fingerprint: str) -> str:
    """The same figures with every sample, as a page that needs nothing else. Bars show 1 − cosine on a log scale."""
    random = (
        " The weights are random: the figures show rounding, not a trained model." if checkpoint.random_weights else ""
    )
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Accuracy of {escape(checkpoint.source)}</title>",
        f"<style>{_STYLE}</style><h1>Accuracy of {escape(checkpoint.source)}</h1>",
        f"<p class=note>Embeddings against float32 torch, row by row, from {checkpoint.dtype} weights.{random}<br>",
        f"Fingerprint {escape(fingerprint)}</p>",
    ]
    for variant in variants:
        if variant.accuracy is None:
            continue
        accuracy = variant.accuracy
        verdict = "" if accuracy.passed else " fail"
        parts.append(f"<h2>{escape(variant.name)}</h2><table class='{verdict}'>")
        headings = ("sample", "grid (t, h, w)", "cosine min", "cosine mean", "relative error", "1 − cosine min")
        parts.append(f"<thead><tr>{''.join(f'<th>{heading}' for heading in headings)}</tr></thead>")
        for sample in accuracy.samples:
            parts.append(
                f"<tr><td>{escape(str(sample['name']))}<td>{tuple(sample['grid'])}<td>{sample['cosine_min']:.6f}"
                f"<td>{sample['cosine_mean']:.6f}<td>{sample['relative_error']:.2e}<td>{_bar(sample['cosine_min'])}</tr>"
            )
        parts.append(
            f"<tfoot><tr><td>{'all, ' + ('above' if accuracy.passed else 'BELOW') + f' the bar {accuracy.bar}'}<td>"
            f"<td>{accuracy.cosine_min:.6f}<td>{accuracy.cosine_mean:.6f}<td>{accuracy.relative_error:.2e}<td></tr></tfoot></table>"
        )
    return "\n".join(parts) + "\n"


def _bar(cosine: float) -> str:
    """1 − cosine from 1e-7 (nothing) to 1 (full width)."""
    share = (log10(min(max(1 - cosine, 1e-7), 1)) + 7) / 7
    return f"<span class=bar style='width:{6 * share:.2f}rem'></span>"
