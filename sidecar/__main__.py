"""`python -m sidecar COMMAND`: serve, encode, info, health, load, plan."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper

from sidecar import __version__

# gRPC's C core writes lines of its own to stderr, in the middle of ours.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

COMMANDS = ("serve", "encode", "info", "health", "load", "plan")


BROKEN_PIPE = 128 + signal.SIGPIPE  # as a shell reports a command that wrote to a reader who had left


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    Raises:
        SystemExit: argparse's, for --help and for arguments that will not do.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a locale has no sign for is no reason to fail
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where it can be told that nobody reads it
    except BrokenPipeError:
        _write_nothing_more()
        return BROKEN_PIPE
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        _write_nothing_more()
        sys.stderr.write(f"standard output cannot be written: {error.strerror}; make room, or write elsewhere\n")
        return 1


def _run(arguments: list[str]) -> int:
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


def _write_nothing_more() -> None:
    """Python would try again at its end to write what is left, and say so."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
