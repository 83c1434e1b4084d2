"""Messages that compare two numbers never show the same number twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.artifact import Accuracy
from sidecar.vision.digits import apart
from sidecar.vision.grid import GridError, resized_size


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_numbers_that_differ_are_shown_differently(value: float, limit: float) -> None:
    shown, shown_limit = apart(value, limit)
    assert (shown == shown_limit) == (repr(value) == repr(limit)) or value == limit


def test_a_ratio_just_over_the_limit_is_shown_over_it() -> None:
    with pytest.raises(GridError, match=r"an aspect ratio of 200\.04; the model takes at most 200$"):
        resized_size(5001, 25, factor=28, min_pixels=784, max_pixels=10**6)
    with pytest.raises(GridError, match=r"an aspect ratio of 5000; the model takes at most 200$"):
        resized_size(5000, 1, factor=28, min_pixels=784, max_pixels=10**6)


def test_a_cosine_just_below_its_bar_is_shown_below_it() -> None:
    measured = Accuracy(cosine_min=0.9989999, cosine_mean=1.0, relative_error=0.0, finite=True, bar=0.999, samples=())
    assert measured.shortfall().endswith("fell to 0.9989999, the bar is 0.9990000")
