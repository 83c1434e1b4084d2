"""`python -m sidecar info`: what a server holds, or each of several, on what it runs, and what it accepts."""

from __future__ import annotations

import argparse
import asyncio
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
from sidecar.commands.connection import add_credential_arguments, names_several, open_client, open_fleet
from sidecar.credentials import CredentialsError
from sidecar.fleet import AddressError
from sidecar.pb import encoder_pb2


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "info", help="print what a server holds and accepts", description=__doc__, allow_abbrev=False
    )
    add_server_argument(parser)
    add_credential_arguments(parser)
    parser.add_argument("--timeout", metavar="SECONDS", type=positive_float, default=10.0, help="default: %(default)s")
    parser.add_argument(
        "--json",
        action="store_true",
        help="the reply as protobuf's JSON (64-bit numbers are strings); by address, of several",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        if names_several(arguments):
            return _report_each(arguments, asyncio.run(_infos(arguments)))
        with open_client(arguments) as client:
            info = client.info(arguments.timeout)
    except (AddressError, CredentialsError) as error:
        print_error(str(error))
        return BAD_ARGUMENTS
    except ClientError as error:
        return _report_failure(arguments.server, error)
    except KeyboardInterrupt:
        print_error("interrupted")
        return INTERRUPTED
    if arguments.json:
        print(json.dumps(_values(info), indent=2))
    else:
        _print_table(arguments.server, info)
    return 0


async def _infos(arguments: argparse.Namespace) -> dict[str, encoder_pb2.InfoResponse | ClientError]:
    async with open_fleet(arguments) as fleet:
        return await fleet.infos(arguments.timeout)


def _report_each(arguments: argparse.Namespace, infos: dict[str, encoder_pb2.InfoResponse | ClientError]) -> int:
    """Print all that answered; the exit code is 0 if all did, and as for one server if none did."""
    failed = {address: info for address, info in infos.items() if isinstance(info, ClientError)}
    answered = {address: info for address, info in infos.items() if not isinstance(info, ClientError)}
    if arguments.json:
        errors = {address: {"error": str(error)} for address, error in failed.items()}
        print(json.dumps({address: _values(info) for address, info in answered.items()} | errors, indent=2))
    else:
        for number, (address, info) in enumerate(answered.items()):
            if number:
                print()
            _print_table(address, info)
    codes = [_report_failure(address, error) for address, error in failed.items()]
    if len({info.fingerprint for info in answered.values()}) > 1:
        print_error("the sidecars hold different models: their fingerprints differ")
        codes.append(FAILED)
    return FAILED if answered and codes else max(codes, default=0)


def _report_failure(address: str, error: ClientError) -> int:
    """Print why there was no answer; returns the exit code."""
    if isinstance(error, EncodeError) and error.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        print_no_server(address, error)
        return NO_SERVER
    print_error(f"{address}: {error}")
    return FAILED


def _values(info: encoder_pb2.InfoResponse) -> dict[str, object]:
    return json_format.MessageToDict(info, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _print_table(address: str, info: encoder_pb2.InfoResponse) -> None:
    for name, value in (("server", address), *_rows(info)):
        print(f"{name:<12} {printable(value)}".rstrip())


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
