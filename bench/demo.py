"""`make demo`: the whole way from a checkpoint to embeddings of real photos, and how right they are.

A checkpoint with random weights is written, exported and served by a real server process; three photos go through the
Python client, and each embedding is compared with what transformers' own tower gives in float32 for the same photo.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from bench.reference import TransformersTower
from bench.server import serving
from export.accuracy import row_cosine
from export.checkpoint import open_checkpoint
from export.pipeline import Job, export
from export.samples import PHOTO_NAMES, PHOTOS
from export.synthetic import make_checkpoint, synthetic_kind
from sidecar.client import EncoderClient
from sidecar.picture import draw_components
from sidecar.vision.images import decode_image
from sidecar.vision.pixels import image_patches


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument("--model", default="random:toy", help="random:toy, random:3b, or a checkpoint directory")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument(
        "--dir", type=Path, default=Path("demo"), help="where checkpoint, artifact and pictures are left"
    )
    options = parser.parse_args()
    console = Console(highlight=False)
    options.dir.mkdir(parents=True, exist_ok=True)

    kind = synthetic_kind(options.model)
    directory = Path(options.model)
    if kind is not None:
        directory = options.dir / f"checkpoint-{kind}"
        if not (directory / "config.json").exists():
            make_checkpoint(kind, directory)
        console.print(f"1. checkpoint with random weights in the true layout: {directory}")
    artifact = options.dir / "artifact"
    console.print(f"2. export its vision tower to {artifact}")
    export(Job(model=str(directory), out=artifact, precisions=(options.precision,)), console)

    checkpoint = open_checkpoint(str(directory))
    reference = TransformersTower(checkpoint)
    lines = []
    with serving(artifact, options.dir / "server.log") as server, EncoderClient(server.address) as client:
        info = client.info()
        console.print(f"3. serving on {server.address}, ready after {server.ready_s:.1f} s: {info.lanes[0].device}")
        for name in PHOTO_NAMES:
            data = (PHOTOS / name).read_bytes()
            client.encode_image(data)  # a grid's first run includes the runtime's set-up for it
            started = time.perf_counter()
            embedding = client.encode_image(data)
            elapsed_ms = (time.perf_counter() - started) * 1e3
            rgb = decode_image(data)
            expected = reference.rows(image_patches(rgb, checkpoint.tower, checkpoint.pixels))
            cosine = row_cosine(embedding.float32(), expected)
            picture = options.dir / f"{Path(name).stem}.png"
            draw_components(rgb, embedding.float32(), embedding.grid, checkpoint.tower.spatial_merge_size).save(picture)
            lines.append(
                f"{name:24} grid {'×'.join(map(str, embedding.grid)):>8}  {embedding.tokens:4} tokens × {embedding.width}"
                f"  {elapsed_ms:7.1f} ms  cosine to transformers fp32: min {cosine.min():.6f}, mean {np.mean(cosine):.6f}"
                f"  {embedding.lane.runtime} on {embedding.lane.device}"
            )
    console.print(f"4. pictures of the embeddings' principal components over the photos: {options.dir}/*.png\n")
    for line in lines:
        print(line)
    if checkpoint.random_weights:
        print("\nThe weights are random: the cosines show that the arithmetic is right, the pictures that order and")
        print("orientation are. `make export MODEL=Qwen/Qwen2.5-VL-3B-Instruct` exports trained ones.")
        print(
            "`make serve OUT=demo/artifact METRICS=127.0.0.1:9464` serves this one, with a status page at that address."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
