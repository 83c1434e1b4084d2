"""`python -m sidecar info`: what a server holds, on what it runs, and what it accepts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

from google.protobuf import json_format

from sidecar.client import ClientError, EncodeError
from sidecar.commands import (
    BAD_ARGUMENTS,
    FAILED,
    INTERRUPTED,
    NO_SERVER,
    add_server_argument,
    positive_float,
    print_error,
    print_no_server,
    printable,
)
from sidecar.commands.connection import add_credential_arguments, open_client
from sidecar.credentials import CredentialsError
from sidecar.pb import encoder_pb2


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "info", help="print what a server holds and accepts", description=__doc__, allow_abbrev=False
    )
    add_server_argument(parser)
    add_credential_arguments(parser)
    parser.add_argument("--timeout", metavar="SECONDS", type=positive_float, default=10.0, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="the reply as protobuf's JSON (64-bit numbers are strings)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        with open_client(arguments) as client:
            info = client.info(arguments.timeout)
    except CredentialsError as error:
        print_error(str(error))
        return BAD_ARGUMENTS
    except EncodeError as error:
        if error.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            print_no_server(arguments.server, error)
            return NO_SERVER
        print_error(f"{arguments.server}: {error}")
        return FAILED
    except ClientError as error:
        print_error(f"{arguments.server}: {error}")
        return FAILED
    except KeyboardInterrupt:
        print_error("interrupted")
        return INTERRUPTED
    if arguments.json:
        values = json_format.MessageToDict(
            info, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        print(json.dumps(values, indent=2))
        return 0
    for name, value in (("server", arguments.server), *_rows(info)):
        print(f"{name:<12} {printable(value)}".rstrip())
    return 0


def _rows(info: encoder_pb2.InfoResponse) -> Iterator[tuple[str, str]]:
    """The table's lines as (name, value); a name is left out where it is the line above's."""
    checkpoint, tower, pixels, limits = info.checkpoint, info.tower, info.pixels, info.limits
    yield "version", info.version
    yield "fingerprint", info.fingerprint
    yield "checkpoint", ", ".join(filter(None, (checkpoint.source, checkpoint.dtype)))
    if checkpoint.random_weights:
        yield "", "RANDOM WEIGHTS: good for tests and benchmarks, useless for answers"
    yield "tower", f"{tower.depth} blocks, {tower.hidden_size} wide"
    merge = tower.spatial_merge_size
    yield (
        "",
        f"{tower.patch_size} px patches in pairs of {tower.temporal_patch_size} frames, {merge}×{merge} to a token",
    )
    yield (
        "embedding",
        f"{tower.out_hidden_size} × {encoder_pb2.DType.Name(info.embedding_dtype).lower()} for each token",
    )
    yield "image", f"{pixels.min_pixels} to {pixels.max_pixels} pixels after resizing"
    yield "video", f"{pixels.video_min_pixels} to {pixels.video_max_pixels} pixels a frame after resizing"
    measured = {(accuracy.runtime, accuracy.precision): accuracy for accuracy in info.accuracy}
    for number, lane in enumerate(info.lanes):
        line = f"{lane.runtime} on {lane.device}, {lane.precision}"
        if (accuracy := measured.get((lane.runtime, lane.precision))) is not None:
            line += f": cosine to float32 {accuracy.cosine_mean:.5f} on average, {accuracy.cosine_min:.5f} at worst"
            line += f", relative error {accuracy.relative_error:.2g}"
        yield "" if number else "lanes", line
    yield "limits", f"{limits.items} items and {limits.message_bytes / 2**20:g} MiB a request"
    yield "", f"{limits.image_pixels} pixels an image as sent, {limits.item_patches} patches an item"
