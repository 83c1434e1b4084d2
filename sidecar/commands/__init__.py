"""The commands of `python -m sidecar`, one module each, and what those that call a sidecar share.

A command module has `add_parser(subparsers)`, which sets `run`, a function from the parsed arguments to an exit code.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing the client takes longer than a health probe
    from sidecar.client import EncodeError

FAILED = 1  # something that was asked for could not be had
NO_SERVER = 2  # nobody there to ask
BAD_ARGUMENTS = 2  # argparse's own code for them
INTERRUPTED = 130  # as a shell reports Ctrl-C

_DEFAULT_SERVER = "127.0.0.1:50051"


def add_server_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--server",
        metavar="ADDRESS",
        default=os.environ.get("EPD_SERVER") or _DEFAULT_SERVER,
        help="host:port, unix:/path or dns:///name:port (environment: EPD_SERVER; default: %(default)s)",
    )


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def positive_float(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return number


def print_error(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    print(printable(" ".join(message.split())), file=sys.stderr)


def print_no_server(address: str, error: EncodeError) -> None:
    if error.details:  # one did
        print_error(f"{address}: {error}")
        return
    hint = " (it closed the connection: does it want TLS, --tls-ca?)" if "Socket closed" in error.message else ""
    print_error(f"no encoder sidecar answers at {address}: {error.message}{hint}")


def printable(text: str) -> str:
    """Text that any terminal takes: file names may hold bytes that are no UTF-8, and anything control characters."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
