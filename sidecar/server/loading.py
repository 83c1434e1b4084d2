"""From settings to warm lanes: open and verify the artifact, choose each device's variant, load the runtimes."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from sidecar.adopted import adopt_optimum, is_optimum_directory
from sidecar.artifact import MANIFEST, Artifact, ArtifactError, Variant, open_artifact
from sidecar.engine.lane import Lane
from sidecar.engine.observer import Observer
from sidecar.engine.self_test import SelfTest
from sidecar.machine import usable_cores
from sidecar.runtimes import cache
from sidecar.runtimes.base import Load
from sidecar.runtimes.loading import load_runtime
from sidecar.runtimes.trial import Trials
from sidecar.settings import Settings
from sidecar.vision.dtypes import DType

logger = logging.getLogger(__name__)

# A GPU encodes a picture in less time than it takes to decode one.
_FEEDING_CPU, _FEEDING_GPU = 2, 8


def open_for(settings: Settings) -> Artifact:
    """The artifact that the settings name.

    Raises:
        ArtifactError: if it is not there or cannot be trusted.
    """
    if not settings.artifact.is_dir():
        raise ArtifactError(f"{settings.artifact} is not a directory; `python -m export --out DIR` writes an artifact")
    if not (settings.artifact / MANIFEST).exists() and is_optimum_directory(settings.artifact):
        if not settings.allow_unsealed:
            raise ArtifactError(
                f"{settings.artifact} was made by optimum and has no manifest: nothing says which weights these are or how "
                "accurate. `python -m export --via optimum` seals one; --allow-unsealed serves it as it is"
            )
        return adopt_optimum(settings.artifact)
    return open_artifact(settings.artifact)


def choose_variant(artifact: Artifact, device: str, settings: Settings) -> Variant:
    """The variant to serve on a device.

    Raises:
        ArtifactError: if the artifact has none, or its accuracy does not allow it.
    """
    precision = None if settings.precision == "auto" else settings.precision
    runtime = settings.runtime
    if runtime == "auto":
        on_torch = device.split(":")[0] in ("cuda", "xpu")
        known = {variant.runtime for variant in artifact.manifest.variants}
        preferred = ("torch",) if on_torch else ("openvino", "onnx", "optimum", "torch")
        runtime = next((name for name in preferred if name in known), preferred[0])
    variant = artifact.manifest.variant(runtime, precision)
    if not settings.allow_below_bar:
        if variant.accuracy is None and not settings.allow_unsealed:
            raise ArtifactError(
                f"the accuracy of {variant.name} was never measured; --allow-below-bar serves it all the same"
            )
        if variant.accuracy is not None and not variant.accuracy.passed:
            raise ArtifactError(
                f"{variant.name}: {variant.accuracy.shortfall()}; --allow-below-bar serves it all the same"
            )
    return variant


def preprocess_threads(settings: Settings) -> int:
    """As set, or enough to feed what is served."""
    if settings.preprocess_threads:
        return settings.preprocess_threads
    only_cpus = len(settings.on_cpu) == len(settings.device)
    return _FEEDING_CPU if only_cpus else max(_FEEDING_CPU, min(_FEEDING_GPU, usable_cores().threads))


def load_lanes(
    artifact: Artifact,
    variants: Sequence[Variant],
    settings: Settings,
    observer: Observer | None = None,
    trials: Trials | None = None,
) -> list[Lane]:
    """A warm lane for each of the settings' devices, with the variant chosen for it. What was loaded is closed if one fails.

    `trials`: tries each in a child process first; None where that is not wanted.

    Raises:
        ArtifactError: if a file is missing or changed.
        RuntimeFault: if a runtime cannot load or run its graph.
    """
    cores = usable_cores()
    lanes: list[Lane] = []
    try:
        for number, (device, variant) in enumerate(zip(settings.device, variants, strict=True)):
            twins = settings.device[:number].count(device)
            threads = settings.threads
            if not threads and device in settings.on_cpu:
                threads = max(1, cores.threads // len(settings.on_cpu))
            lanes.append(
                _load_lane(
                    *(f"{device}-{twins + 1}" if twins else device, device, artifact, variant, threads),
                    *(settings, observer, trials),
                )
            )
    except BaseException:
        for lane in lanes:
            lane.close()
        raise
    return lanes


def _load_lane(
    name: str,
    device: str,
    artifact: Artifact,
    variant: Variant,
    threads: int,
    settings: Settings,
    observer: Observer | None,
    trials: Trials | None,
) -> Lane:
    """Load the runtime while the files are verified, then warm it up."""
    threads_said = f", {threads} threads" if threads else ""
    logger.info("lane %s: loading %s on %s%s", name, variant.name, device, threads_said)
    manifest = artifact.manifest
    dtype = manifest.checkpoint.dtype if settings.embedding_dtype == "auto" else DType(settings.embedding_dtype)
    missing = [name for name in variant.files if not artifact.path(name).is_file()]
    if missing:
        raise ArtifactError(f"{', '.join(missing)} is missing; export the artifact again or copy it whole")
    load = Load(
        graph=artifact.path(variant.graph),
        precision=variant.precision,
        tower=manifest.tower,
        pixels=manifest.pixels,
        output_dtype=dtype,
        device=device,
        threads=threads,
        streams=settings.streams,
        cache_dir=_writable(_cache_of(artifact, variant, settings.cache_dir)),
    )
    started = time.perf_counter()
    if load.cache_dir is not None:
        cache.discard_changed(load.cache_dir)
    with ExitStack() as guarded:
        with ThreadPoolExecutor(1) as verifying:
            verified = verifying.submit(artifact.verify, variant.files)
            try:
                if trials is not None:
                    guarded.enter_context(trials.guard(name, variant.runtime, _content(artifact, variant), load))
                runtime = load_runtime(variant.runtime, load)
            finally:
                # A damaged file explains a runtime that could not load it, so it is reported first.
                verified.result()
        loaded = time.perf_counter()
        lane = Lane(
            name,
            runtime,
            manifest.tower,
            batch_patches=settings.batch_patches,
            observer=observer,
            self_test=SelfTest(runtime, manifest.tower, artifact.references(), variant.references),
        )
        try:
            lane.warm_up(settings.warm_up_seconds)
        except BaseException:
            lane.close()
            raise
        if load.cache_dir is not None:
            cache.record(load.cache_dir)
    logger.info(
        "lane %s: %s %s on %s, embeddings in %s; loaded in %.1f s, warm after %.1f s",
        name,
        variant.name,
        manifest.fingerprint[:16],
        runtime.device,
        dtype,
        loaded - started,
        time.perf_counter() - started,
    )
    return lane


def _content(artifact: Artifact, variant: Variant) -> str:
    """One hash of all of a variant's files."""
    return hashlib.sha256("".join(artifact.hashes[name] for name in variant.files).encode()).hexdigest()[:32]


def _cache_of(artifact: Artifact, variant: Variant, cache_dir: Path | None) -> Path | None:
    """A place of its own for each content of the graph's files: whatever a runtime keys its cache by, another artifact at
    the same path can then never be answered with this one's model."""
    return None if cache_dir is None else cache_dir / _content(artifact, variant)


def _writable(cache_dir: Path | None) -> Path | None:
    """The directory, or None where nothing can be kept in it: that costs time at every start, and nothing else."""
    if cache_dir is None:
        return None
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        if os.access(cache_dir, os.W_OK | os.X_OK):
            return cache_dir
        reason = "it may not be written to"
    except OSError as error:
        reason = error.strerror or "it cannot be made"
    logger.warning("compiled models are not kept: --cache-dir %s: %s", cache_dir, reason)
    return None
