"""`python -m sidecar COMMAND`: serve, encode, info, health, load, plan."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from importlib import import_module

from sidecar import __version__

# gRPC's C core writes lines of its own to stderr, in the middle of ours.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

COMMANDS = ("serve", "encode", "info", "health", "load", "plan")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["serve"]:
        _handle_early_signals()
    parser = argparse.ArgumentParser(prog="python -m sidecar", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    # Only the command that is asked for is imported: a health probe must not load what serving needs.
    asked = [name for name in COMMANDS if name in arguments[:1]]
    for name in asked or COMMANDS:
        import_module(f"sidecar.commands.{name}").add_parser(subparsers)
    options = parser.parse_args(arguments)
    code: int = options.run(options)
    return code


def _handle_early_signals() -> None:
    """Set what signals do until the server has its own handlers; its imports alone take tenths of a second.

    SIGHUP, which asks a server to reload, would end the process, and SIGTERM would be lost where the process is a container's
    first. Nothing has been started yet, so there is nothing to tidy up, and an exception would surface inside an import.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))


if __name__ == "__main__":
    sys.exit(main())
