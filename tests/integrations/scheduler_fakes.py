"""What vLLM's scheduler and the fetcher are to the connector's scheduler half, played by a test."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from export.synthetic_config import model_config
from sidecar.integrations.vllm.features import Wanted
from sidecar.integrations.vllm.fetcher import Fetch
from sidecar.integrations.vllm.files import LocalFile
from sidecar.integrations.vllm.scheduler_half import SchedulerHalf
from sidecar.integrations.vllm.tally import Tally
from sidecar.store_file import Description
from sidecar.vision.dtypes import DType
from sidecar.vision.grid import Grid
from sidecar.vision.spec import TowerSpec

TOWER = TowerSpec.from_config(model_config("toy", "float32"))
# Of an embedding of one token, as it is counted before it is there.
TOKEN_BYTES = 2 * TOWER.out_hidden_size
SMALL, LARGE = Grid(1, 2, 2), Grid(1, 2, 4)


@dataclass
class Position:
    offset: int
    length: int

    def get_num_embeds(self) -> int:
        return self.length


@dataclass
class Data:
    values: dict[str, Any]

    def get_data(self) -> dict[str, Any]:
        return self.values


@dataclass
class Feature:
    identifier: str
    data: Data
    mm_position: Position
    modality: str = "image"
    mm_hash: str | None = None


@dataclass
class Request:
    request_id: str
    mm_features: list[Feature]
    # The scheduler's own.
    computed: int = 0
    running: bool = False

    @property
    def length(self) -> int:
        return sum(feature.mm_position.length for feature in self.mm_features)


@dataclass
class Picture:
    """A picture in a request: its identifier, its size, what came with it (pixels, embeds or nothing), and what it shows."""

    key: str
    grid: Grid = SMALL
    brings: str = "pixels"
    shows: int = 0


def request(name: str, *pictures: Picture | str) -> Request:
    features: list[Feature] = []
    offset = 0
    for each in pictures:
        picture = Picture(each) if isinstance(each, str) else each
        values: dict[str, Any] = {"image_grid_thw": torch.tensor(picture.grid)}
        if picture.brings == "pixels":
            values["pixel_values"] = torch.full((picture.grid.patches, 8), picture.shows)
        if picture.brings == "embeds":
            values["image_embeds"] = torch.zeros(1)
        tokens = picture.grid.tokens(TOWER)
        features.append(Feature(picture.key, Data(values), Position(offset, tokens)))
        offset += tokens
    return Request(name, features)


class Sidecars:
    """Fetcher and files: what was started, and ends when the test says so."""

    def __init__(self) -> None:
        self.under_way: list[Fetch] = []
        self.files: set[str] = set()
        self.started: list[str] = []
        self._number = 0

    def start(self, wanted: Wanted) -> Fetch:
        self.started.append(wanted.key)
        self.under_way.append(fetch := Fetch(wanted))
        return fetch

    def cancel(self, fetch: Fetch) -> None:
        if fetch in self.under_way:
            self.under_way.remove(fetch)
        if (file := fetch.abandon()) is not None:
            self.remove(file.name)

    def remove(self, name: str) -> None:
        self.files.remove(name)

    def succeed(self, fetch: Fetch) -> None:
        self.under_way.remove(fetch)
        self._number += 1
        wanted = fetch.wanted
        what = Description(grid=wanted.grid, tokens=wanted.tokens, width=8, dtype=DType.FLOAT32, fingerprint="f")
        file = LocalFile("/files", f"{wanted.key}-{self._number}", what)
        self.files.add(file.name)
        assert fetch.finish(file)

    def fail(self, fetch: Fetch) -> None:
        self.under_way.remove(fetch)
        fetch.failure = "UNAVAILABLE: nobody is there"

    def succeed_all(self) -> None:
        for fetch in list(self.under_way):
            self.succeed(fetch)

    def fail_all(self) -> None:
        for fetch in list(self.under_way):
            self.fail(fetch)


class Half(SchedulerHalf):
    def __init__(self, *, local: bool = True, ahead: int = 1 << 30, cached_tokens: int = 1 << 17) -> None:
        self.sidecars, self.tally = Sidecars(), Tally()
        bounds = {"ahead_bytes": ahead, "cached_tokens": cached_tokens}
        super().__init__(self.sidecars, self.sidecars, self.tally, TOWER, encodes_locally=local, **bounds)

    def schedule(self, *pairs: tuple[Request, int], evicted: Iterable[str] = ()) -> dict[str, LocalFile]:
        """One step with these items."""
        for each, index in pairs:
            self.update_state_after_alloc(each, index)
        return self.take_loads(evicted)

    def items(self) -> dict[str, int]:
        counted: dict[str, int] = self.tally.take().get("items", {})
        return counted
