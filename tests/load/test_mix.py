"""What is sent."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sidecar.items import Item
from sidecar.load.mix import Generated, Mix, Photos, parse_sizes, parse_timeout, zipf_shares
from sidecar.load.pictures import PatchRules, Size

RULES = PatchRules(14, 2, 3136, 12845056)


class Numbers:
    def item(self, number: int) -> Item:
        return Item(key=str(number))


def keys(mix: Mix, requests: int) -> list[str]:
    return [item.key for number in range(requests) for item in mix.request(number).items]


def test_no_picture_comes_twice_unless_asked() -> None:
    sent = keys(Mix(pictures=Numbers(), seed=1, items_per_request=3), 50)
    assert len(sent) == len(set(sent)) == 150


def test_a_catalogue_is_drawn_by_zipf() -> None:
    sent = Counter(keys(Mix(pictures=Numbers(), seed=1, catalogue=10, zipf=1.0), 4000))
    harmonic = sum(1 / rank for rank in range(1, 11))
    for rank in range(1, 11):
        assert sent[str(rank - 1)] / 4000 == pytest.approx(1 / rank / harmonic, abs=0.03)
    even = Counter(keys(Mix(pictures=Numbers(), seed=1, catalogue=10), 4000))
    assert min(even.values()) > 300


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 3.0])
def test_the_shares_of_a_large_catalogue_end_at_one(exponent: float) -> None:
    shares = zipf_shares(100_003, exponent)
    assert shares[-1] == 1.0
    assert (np.diff(shares) >= 0).all()


def test_a_seed_sends_the_same_in_whatever_order() -> None:
    def mix(seed: int) -> Mix:
        pictures = Generated({Size(28, 28): 1, Size(56, 28): 1}, "rgb", RULES, seed)
        return Mix(pictures=pictures, seed=seed, catalogue=9, timeout_s=(0.1, 5.0), cancel_fraction=0.5)

    one, other = mix(1), mix(1)
    assert [one.request(number) for number in range(9)] == [other.request(number) for number in reversed(range(9))][
        ::-1
    ]
    assert [mix(2).request(number) for number in range(9)] != [one.request(number) for number in range(9)]


def test_sizes_come_by_weight() -> None:
    pictures = Generated(parse_sizes("28x28:3,56x28"), "rgb", RULES, 5)
    widths = Counter(pictures.item(number).rgb_image.width for number in range(2000))
    assert set(widths) == {28, 56}
    assert widths[28] / 2000 == pytest.approx(0.75, abs=0.05)


def test_photos_are_sent_in_turn() -> None:
    mix = Mix(pictures=Photos([b"a", b"b", b"c"]), seed=0, items_per_request=2)
    assert [item.image for number in range(3) for item in mix.request(number).items] == [b"a", b"b", b"c"] * 2


def test_deadlines_are_spread_over_their_orders_of_magnitude() -> None:
    mix = Mix(pictures=Numbers(), seed=0, timeout_s=(0.01, 1.0))
    timeouts = [mix.request(number).timeout_s for number in range(1000)]
    assert 0.01 <= min(timeouts) < 0.012
    assert 0.8 < max(timeouts) <= 1.0
    assert np.median(timeouts) == pytest.approx(0.1, rel=0.25)


def test_a_fraction_is_cancelled_within_the_time() -> None:
    mix = Mix(pictures=Numbers(), seed=0, cancel_fraction=0.25, cancel_within_s=2.0)
    cancelled = [when for number in range(1000) if (when := mix.request(number).cancel_after_s) is not None]
    assert len(cancelled) == pytest.approx(250, abs=50)
    assert 1.8 < max(cancelled) <= 2.0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("448", "is no size"),
        ("448x", "is no size"),
        ("448x448,", "is no size"),
        ("448x448:-1", "is no size"),
        ("27x448", "no side may be under 28"),
        ("448x448:0", "must be above 0"),
    ],
)
def test_a_wrong_size_is_told(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_sizes(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "5-1", "1-", "1.2.3", "nan", "1-2-3"])
def test_a_wrong_time_is_told(text: str) -> None:
    with pytest.raises(ValueError, match="is no time: write seconds above 0"):
        parse_timeout(text)


def test_times_and_sizes_are_read() -> None:
    assert parse_timeout("2.5") == (2.5, 2.5)
    assert parse_timeout("0.1-5") == (0.1, 5.0)
    assert parse_sizes("448x448:3, 1920x1080:.5") == {Size(448, 448): 3.0, Size(1920, 1080): 0.5}
    assert parse_sizes("28x28,28x28:2") == {Size(28, 28): 3.0}
