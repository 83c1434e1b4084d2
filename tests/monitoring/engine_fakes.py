"""Engines as `EngineStatus` tells of them, for tests of whoever shows them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sidecar.engine.status import CostCurve, EngineStatus, LaneStatus, StoreStatus

COST = CostCurve(
    fixed_ms=20.0,
    per_patch_ms=0.4,
    per_pair_ms=1e-5,
    samples=tuple(
        (patches, (20 + 0.4 * patches + 1e-5 * patches**2) * (0.92 + patches * 7 % 17 / 100))
        for patches in range(128, 4097, 128)
    ),
)


def lane_status(name: str = "openvino-cpu", **changes: Any) -> LaneStatus:
    lane = LaneStatus(
        name=name,
        runtime="openvino",
        device="Intel(R) Xeon(R) Platinum 8481C",
        precision="bf16",
        state="serving",
        streams=2,
        waiting_items=3,
        waiting_patches=3072,
        running_items=2,
        backlog_ms=2500.0,
        busy=0.75,
        runs=40,
        items=90,
        patches=92160,
        failures=1,
        last_error="",
        cost=COST,
    )
    return replace(lane, **changes)


def engine_status(**changes: Any) -> EngineStatus:
    status = EngineStatus(
        fingerprint="sha256:5f0c9a",
        waiting_items=5,
        waiting_patches=5120,
        max_items=64,
        max_patches=65536,
        clients=2,
        preprocessing=1,
        hits=30,
        misses=60,
        coalesced=10,
        lanes=(lane_status(),),
        store=StoreStatus(
            directory="/dev/shm/epd-encoder",
            capacity_bytes=4_000_000_000,
            used_bytes=1_000_000_000,
            entries=120,
            leases=4,
            evictions=7,
            unkept=2,
            expired=1,
        ),
    )
    return replace(status, **changes)
