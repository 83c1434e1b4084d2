"""The engine at one moment, as plain values: for metrics, the status page and tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LaneIdentity:
    """What encodes, as the runtime itself reports it; `name` is this server's own."""

    name: str
    runtime: str
    device: str
    precision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CostCurve:
    """A lane's measured cost: a run of N patches, whose frames' squares sum to Q, takes fixed + per_patch·N + per_pair·Q ms.

    `samples` are the latest runs as (patches, milliseconds).
    """

    fixed_ms: float
    per_patch_ms: float
    per_pair_ms: float
    samples: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneStatus:
    """One lane. `state`: `serving`, or `out` while its runtime fails. `busy`: the share of the last seconds spent running."""

    name: str
    runtime: str
    device: str
    precision: str
    state: str
    streams: int
    waiting_items: int
    waiting_patches: int
    running_items: int
    backlog_ms: float
    busy: float
    runs: int
    items: int
    patches: int
    failures: int
    last_error: str
    cost: CostCurve


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStatus:
    """`unkept`: embeddings that found no room and were sent inline. `expired`: leases that nobody released."""

    directory: str
    capacity_bytes: int
    used_bytes: int
    entries: int
    leases: int
    evictions: int
    unkept: int
    expired: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """`waiting_…`: under way, from admission to answer, of at most `max_…`. `clients`: how many of them wait for a turn."""

    fingerprint: str
    waiting_items: int
    waiting_patches: int
    max_items: int
    max_patches: int
    clients: int
    preprocessing: int
    hits: int
    misses: int
    coalesced: int
    lanes: tuple[LaneStatus, ...]
    store: StoreStatus | None
