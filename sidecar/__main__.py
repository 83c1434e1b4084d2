"""`python -m sidecar COMMAND`: serve, encode, info."""

from __future__ import annotations

import argparse
import sys

from sidecar import __version__
from sidecar.commands import encode, info, serve


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sidecar", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (serve, encode, info):
        command.add_parser(subparsers)
    options = parser.parse_args(arguments)
    code: int = options.run(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
