"""`python -m sidecar load`: what a server takes before it refuses, how long answers take, and whether any is lost."""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from sidecar.client import AsyncEncoderClient, ClientError, EncodeError
from sidecar.commands import (
    BAD_ARGUMENTS,
    FAILED,
    INTERRUPTED,
    NO_SERVER,
    add_server_argument,
    print_error,
    print_no_server,
    printable,
)
from sidecar.commands.load_flags import add_load_arguments, check, client_options, mix_of, pace_of, settings_of
from sidecar.credentials import CredentialsError
from sidecar.load import progress
from sidecar.load.drive import Driver
from sidecar.load.mix import Mix
from sidecar.load.pictures import PatchRules
from sidecar.load.plot import write_plot
from sidecar.load.record import write_record
from sidecar.load.report import Summary, lines, sum_holds, summary
from sidecar.load.tally import Kind, Tally
from sidecar.pb import encoder_pb2
from sidecar.vision.grid import GridError

_INFO_TIMEOUT_S = 10.0

_WORDS = """\
The figures count items. Every item that is sent ends in one of five ways, and their sum is checked:
  answered   with an embedding
  refused    the server says that it cannot take the item now, or not in time
  expired    its deadline (--timeout) passed without an answer
  cancelled  by this command (--cancel-fraction, Ctrl-C)
  failed     anything else; the connection was lost, for one

Exit code: 0 if the sum holds and nothing failed, nor expired unless --timeout is given; 1 otherwise; 2 if no server
answers or the arguments are wrong; 130 after Ctrl-C, with the report on what was sent until then.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "load",
        help="send many pictures; report latencies, refusals, losses",
        description=__doc__,
        epilog=_WORDS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_server_argument(parser)
    add_load_arguments(parser)
    group = parser.add_argument_group("what comes out")
    group.add_argument("--json", action="store_true", help="the report as one JSON object")
    group.add_argument("--plot", metavar="FILE", type=Path, help="draw latencies: .svg, or .html with the report below")
    group.add_argument(
        "--record", metavar="FILE", type=Path, help="each item as a line of JSON, which `plan --trace` replays"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        check(arguments)
        photos = [path.read_bytes() for path in arguments.photos or ()]
        options = client_options(arguments)
    except (ValueError, CredentialsError) as error:
        print_error(str(error))
        return BAD_ARGUMENTS
    except OSError as error:
        print_error(f"{error.filename}: {error.strerror or error}")
        return BAD_ARGUMENTS
    load = _Load(arguments, photos, options)
    try:
        asyncio.run(load.run())
    except KeyboardInterrupt:
        if load.tally is None:
            print_error("interrupted")
            return INTERRUPTED
        load.report()
        return INTERRUPTED
    except EncodeError as error:
        if error.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            print_no_server(arguments.server, error)
            return NO_SERVER
        print_error(f"{arguments.server}: {error}")
        return FAILED
    except ClientError as error:
        print_error(f"{arguments.server}: {error}")
        return FAILED
    except GridError as error:
        print_error(str(error))
        return BAD_ARGUMENTS
    return load.report()


class _Load:
    """One run, and what is known of it when it ends, whichever way."""

    def __init__(self, arguments: argparse.Namespace, photos: Sequence[bytes], client_options: dict[str, Any]) -> None:
        self.tally: Tally | None = None
        self._arguments = arguments
        self._photos = photos
        self._client_options = client_options
        # Not the same every time: the second run's pictures would be in the server's store.
        self._seed: int = secrets.randbelow(1 << 31) if arguments.seed is None else arguments.seed
        self._info = encoder_pb2.InfoResponse()
        self._mix: Mix | None = None

    async def run(self) -> None:
        arguments = self._arguments
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(AsyncEncoderClient(arguments.server, **self._client_options))
                for _ in range(arguments.channels)
            ]
            # Every connection stands, and every picture is drawn, before the clock starts.
            self._info, *_ = await asyncio.gather(*(client.info(_INFO_TIMEOUT_S) for client in clients))
            self._mix = mix = mix_of(arguments, self._photos, PatchRules.of(self._info), self._seed)
            self.tally = tally = Tally(asyncio.get_running_loop().time())
            async with progress.shown(tally, sys.stderr):
                await Driver(clients, mix, pace_of(arguments), tally, retry=arguments.retry).run()

    def report(self) -> int:
        """Print and draw what is known; returns the exit code."""
        assert self.tally is not None
        figures = summary(self.tally, settings_of(self._arguments, self._seed), self._server())
        if self._arguments.json:
            print(json.dumps(figures, ensure_ascii=False))
        else:
            print("\n".join(printable(line) for line in lines(figures)))
        if not sum_holds(figures):
            print_error(f"the sum does not hold: of {figures['sent']} items, {figures['missing']} have no end")
        # A deadline that nobody asked for is this command's patience with a server that hangs.
        unexpected = figures[Kind.FAILED] or (figures[Kind.EXPIRED] and self._arguments.timeout is None)
        drawn = self._arguments.plot is None or _draw(self._arguments.plot, self.tally, figures)
        recorded = self._arguments.record is None or self._record(self._arguments.record, self.tally)
        return 0 if sum_holds(figures) and drawn and recorded and not unexpected else FAILED

    def _record(self, target: Path, tally: Tally) -> bool:
        assert self._mix is not None
        try:
            write_record(target, tally, self._mix, PatchRules.of(self._info))
        except OSError as error:
            print_error(f"{target}: no record: {error.strerror or error}")
            return False
        return True

    def _server(self) -> dict[str, object]:
        checkpoint = self._info.checkpoint
        return {
            "address": self._arguments.server,
            "version": self._info.version,
            "checkpoint": checkpoint.source,
            "weights": "random" if checkpoint.random_weights else None,
        }


def _draw(target: Path, tally: Tally, figures: Summary) -> bool:
    try:
        write_plot(target, tally, figures)
    except OSError as error:
        print_error(f"{target}: no plot: {error.strerror or error}")
        return False
    return True
