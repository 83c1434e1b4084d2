"""What is sent: which pictures in which requests, by when they are wanted, and which are given up. Knows nothing of clients.

All that is random about a request follows from the seed and the request's number, whatever the order in which the answers to
others came. So two runs with one seed send the same, also to servers of different speed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sidecar.client import Item, image_item
from sidecar.load.pictures import MIN_SIDE, PatchRules, Size, plate
from sidecar.vision.images import image_size

Shares = npt.NDArray[np.float64]

# Streams of random numbers that share a seed and must not be the same numbers.
_SIZES, _REQUESTS = 1, 2


class Pictures(Protocol):
    """Pictures by number."""

    def item(self, number: int) -> Item: ...

    def size(self, number: int) -> Size: ...


class Generated:
    """Made pictures: one number, one picture, whose size is drawn by weight.

    Raises:
        GridError: if the format is `patches` and the model takes no picture of one of the sizes.
    """

    def __init__(self, sizes: Mapping[Size, float], picture_format: str, rules: PatchRules, seed: int) -> None:
        self._sizes = list(sizes)
        self._plates = [plate(size, picture_format, rules, seed) for size in sizes]
        self._shares = cumulative(np.array(list(sizes.values())))
        self._seed = seed

    def item(self, number: int) -> Item:
        return self._plates[self._drawn(number)].item(number)

    def size(self, number: int) -> Size:
        return self._sizes[self._drawn(number)]

    def _drawn(self, number: int) -> int:
        return drawn(self._shares, np.random.default_rng((self._seed, _SIZES, number)))


class Photos:
    """Files as they are, over and over again."""

    def __init__(self, files: Sequence[bytes]) -> None:
        self._items = [image_item(data) for data in files]

    def item(self, number: int) -> Item:
        return self._items[number % len(self._items)]

    def size(self, number: int) -> Size:
        """Raises PixelError where the file is no picture."""
        height, width = image_size(self._items[number % len(self._items)].image)
        return Size(width, height)


@dataclass(frozen=True, slots=True)
class Request:
    """`timeout_s` and `cancel_after_s` count from the request's arrival; one that is None never comes."""

    items: Sequence[Item]
    timeout_s: float
    cancel_after_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Requests by number.

    Args:
        catalogue: how many pictures there are to draw from; None: no picture comes twice.
        zipf: the picture of rank r is drawn in proportion to r^-zipf; 0: all alike.
        timeout_s: the shortest and the longest deadline; drawn evenly over their orders of magnitude.
        cancel_fraction: of the requests, each after a time that is drawn evenly from 0 to `cancel_within_s`.
    """

    pictures: Pictures
    seed: int
    items_per_request: int = 1
    catalogue: int | None = None
    zipf: float = 0.0
    timeout_s: tuple[float, float] = (120.0, 120.0)
    cancel_fraction: float = 0.0
    cancel_within_s: float = 1.0

    def request(self, number: int) -> Request:
        (where_in_range, cancelled, cancelled_when), random = self._chances(number)
        shortest, longest = self.timeout_s
        return Request(
            items=[self.pictures.item(picture) for picture in self.picture_numbers(number, random)],
            timeout_s=shortest * (longest / shortest) ** where_in_range,
            cancel_after_s=cancelled_when * self.cancel_within_s if cancelled < self.cancel_fraction else None,
        )

    def sizes(self, number: int) -> Sequence[Size]:
        """Of a request's pictures; see `Pictures.size`."""
        return [self.pictures.size(picture) for picture in self.picture_numbers(number, self._chances(number)[1])]

    def _chances(self, number: int) -> tuple[Shares, np.random.Generator]:
        """Three numbers from 0 to 1, and what is drawn after them: first and always, so that one setting does not change what
        another draws."""
        random = np.random.default_rng((self.seed, _REQUESTS, number))
        return random.random(3), random

    def picture_numbers(self, number: int, random: np.random.Generator) -> Sequence[int]:
        if self.catalogue is None:
            return range(number * self.items_per_request, (number + 1) * self.items_per_request)
        shares = zipf_shares(self.catalogue, self.zipf)
        return [drawn(shares, random) for _ in range(self.items_per_request)]


@cache
def zipf_shares(count: int, exponent: float) -> Shares:
    """Of `count` ranks drawn in proportion to (rank + 1)^-exponent; see `cumulative`."""
    return cumulative(np.arange(1, count + 1, dtype=np.float64) ** -exponent)


def cumulative(weights: Shares) -> Shares:
    """The share of all weights up to and with each, (count,): rising, and exactly 1 at the end."""
    sums: Shares = np.cumsum(weights, dtype=np.float64)
    sums /= sums[-1]
    return sums


def drawn(shares: Shares, random: np.random.Generator) -> int:
    """An index, each as often as its share says."""
    return int(np.searchsorted(shares, random.random(), side="right"))


def parse_sizes(text: str) -> dict[Size, float]:
    """`448x448:3,1920x1080` as sizes and their weights; a size without one weighs 1.

    Raises:
        ValueError: if a part is no size, a side is too short, or a weight is not above 0.
    """
    sizes: dict[Size, float] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)[x×](\d+)(?::(\d+(?:\.\d*)?|\.\d+))?\s*", part)
        if found is None:
            raise ValueError(f"{part!r} is no size: write WIDTHxHEIGHT or WIDTHxHEIGHT:WEIGHT, such as 448x448:3")
        size, weight = Size(int(found[1]), int(found[2])), float(found[3] or 1)
        if min(size) < MIN_SIDE:
            raise ValueError(f"{size} is too small: no side may be under {MIN_SIDE} pixels")
        if weight <= 0:
            raise ValueError(f"the weight of {size} must be above 0")
        sizes[size] = sizes.get(size, 0.0) + weight
    return sizes


def parse_timeout(text: str) -> tuple[float, float]:
    """`2.5` or `0.1-5` as the shortest and the longest time in seconds.

    Raises:
        ValueError: if it is neither, or not 0 < shortest ≤ longest.
    """
    found = re.fullmatch(r"([\d.]+)(?:-([\d.]+))?", text)
    try:
        shortest = float(found[1]) if found else 0.0
        longest = float(found[2] or shortest) if found else 0.0
    except ValueError:
        shortest = longest = 0.0
    if not 0 < shortest <= longest < math.inf:
        raise ValueError(f"{text!r} is no time: write seconds above 0 as 2.5, or the shortest and the longest as 0.1-5")
    return shortest, longest
