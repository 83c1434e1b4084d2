"""The plot as a file that others read."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_time import embedding

from sidecar.client import EncodeError
from sidecar.load.axes import linear_axis, logarithmic_axis
from sidecar.load.plot import draw, write_plot
from sidecar.load.report import summary
from sidecar.load.tally import Tally

SVG = "{http://www.w3.org/2000/svg}"


def tally_of(answered: int, refused: int = 0) -> Tally:
    tally = Tally(began=0.0)
    tally.note_sent(answered + refused, 0.0)
    for number in range(answered):
        tally.note_embedding(embedding(cached=number % 2 == 1), number * 0.01, number * 0.01 + 0.05 + number % 7 * 0.02)
    for number in range(refused):
        tally.note_error(EncodeError("RESOURCE_EXHAUSTED", "full"), number * 0.02, number * 0.02 + 0.001)
    return tally


def drawn(tally: Tally, address: str = "here") -> ElementTree.Element:
    return ElementTree.fromstring(draw(tally, summary(tally, {"seed": 1}, {"address": address})))


def words(svg: ElementTree.Element) -> str:
    return "\n".join(text.text or "" for text in svg.iter(f"{SVG}text"))


def dots(svg: ElementTree.Element) -> int:
    return sum(len(group.findall(f"{SVG}circle")) for group in svg.iter(f"{SVG}g"))


def test_each_item_is_a_dot_and_the_legend_counts_them() -> None:
    svg = drawn(tally_of(20, refused=5))
    assert dots(svg) == 25
    for word in ("encoded 10", "from the store 10", "refused 5", "p50", "seconds since the run began", "seed 1"):
        assert word in words(svg)
    assert "failed" not in words(svg)


def test_the_distribution_counts_every_answered_item() -> None:
    hints = [title.text or "" for title in drawn(tally_of(20, refused=5)).iter(f"{SVG}title")][1:]
    # Once in the distribution, which has no refused ones, and once in the items per second.
    assert sum(int(hint.split()[0]) for hint in hints) == 20 + 25


def test_a_hundred_thousand_items_do_not_make_a_hundred_thousand_dots() -> None:
    svg = drawn(tally_of(20_000, refused=3))
    assert dots(svg) < 9000
    assert "(a dot for 3)" in words(svg)


@pytest.mark.parametrize("answered", [0, 1])
def test_next_to_nothing_can_be_drawn(answered: int) -> None:
    assert dots(drawn(tally_of(answered))) == answered


def test_an_address_is_no_markup(tmp_path: Path) -> None:
    tally = tally_of(1)
    assert "<b>&here" in words(drawn(tally, address="<b>&here"))
    write_plot(tmp_path / "plot.html", tally, summary(tally, {}, {"address": "<script>"}))
    assert "<script>" not in (tmp_path / "plot.html").read_text()


def test_a_page_has_plot_and_report_and_needs_nothing_else(tmp_path: Path) -> None:
    tally = tally_of(3)
    write_plot(tmp_path / "plot.html", tally, summary(tally, {}, {}))
    page = (tmp_path / "plot.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "throughput" in page
    assert "<svg" in page
    assert not any(link in page.replace("http://www.w3.org/2000/svg", "") for link in ("http", "src=", "href="))


@given(st.lists(st.floats(0, 1e7), min_size=1))
def test_a_logarithmic_axis_holds_all_values(values: list[float]) -> None:
    axis = logarithmic_axis(values, 500, 100, least=0.01)
    known = [max(value, 0.01) for value in values]
    assert axis.low <= min(known) * (1 + 1e-6)
    assert axis.high >= max(known) * (1 - 1e-6)
    assert axis.high >= axis.low * 9.99
    assert len(axis.ticks) >= 2
    assert all(100 - 1e-6 <= axis.place(value) <= 500 + 1e-6 for value in (*values, *axis.ticks))
    assert axis.place(axis.low) == 500


@given(st.floats(0, 1e9), st.integers(2, 10))
def test_a_linear_axis_begins_at_0_and_has_round_steps(high: float, most_ticks: int) -> None:
    axis = linear_axis(high, 0, 100, most_ticks=most_ticks)
    assert axis.low == axis.ticks[0] == 0
    assert axis.high >= high * (1 - 1e-6)
    assert 2 <= len(axis.ticks) <= most_ticks + 2
    step = axis.ticks[1]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)
