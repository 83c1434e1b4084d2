"""One model in service: an artifact, its lanes, and what is said of it. A reload puts another in its place as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sidecar import __version__
from sidecar.artifact import Artifact, Variant
from sidecar.engine.scheduler import Scheduler
from sidecar.engine.store import Store
from sidecar.pb import encoder_pb2
from sidecar.server import wire
from sidecar.server.orders import Orders
from sidecar.settings import Settings


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """What answers requests."""

    artifact: Artifact
    scheduler: Scheduler
    orders: Orders
    info: encoder_pb2.InfoResponse

    @property
    def fingerprint(self) -> str:
        return self.artifact.manifest.fingerprint


def describe(
    artifact: Artifact, variants: Sequence[Variant], scheduler: Scheduler, settings: Settings
) -> encoder_pb2.InfoResponse:
    """`variants`: the one of each lane, in their order."""
    manifest = artifact.manifest
    tower, checkpoint, store = manifest.tower, manifest.checkpoint, scheduler.store
    measured = {(variant.runtime, variant.precision): variant.accuracy for variant in variants if variant.accuracy}
    return encoder_pb2.InfoResponse(
        version=__version__,
        fingerprint=manifest.fingerprint,
        checkpoint=encoder_pb2.Checkpoint(
            source=checkpoint.source, dtype=str(checkpoint.dtype), random_weights=checkpoint.random_weights
        ),
        tower=encoder_pb2.TowerSpec(
            depth=tower.depth,
            hidden_size=tower.hidden_size,
            out_hidden_size=tower.out_hidden_size,
            patch_size=tower.patch_size,
            temporal_patch_size=tower.temporal_patch_size,
            spatial_merge_size=tower.spatial_merge_size,
            in_channels=tower.in_channels,
        ),
        pixels=encoder_pb2.PixelSpec(**manifest.pixels.to_dict()),
        embedding_dtype=wire.WIRE_DTYPES[scheduler.lanes[0].output_dtype],
        lanes=[wire.lane(lane.identity) for lane in scheduler.lanes],
        limits=encoder_pb2.Limits(
            message_bytes=settings.max_message_bytes,
            items=settings.max_items,
            image_pixels=settings.max_image_pixels,
            item_patches=settings.max_item_patches,
            urls=settings.url_input,
        ),
        accuracy=[
            encoder_pb2.Accuracy(
                runtime=runtime,
                precision=precision,
                cosine_min=accuracy.cosine_min,
                cosine_mean=accuracy.cosine_mean,
                relative_error=accuracy.relative_error,
            )
            for (runtime, precision), accuracy in measured.items()
        ],
        store=None if store is None else _store(store),
    )


def _store(store: Store) -> encoder_pb2.Store:
    return encoder_pb2.Store(
        directory=str(store.directory), capacity_bytes=store.capacity_bytes, lease_seconds=store.lease_seconds
    )
