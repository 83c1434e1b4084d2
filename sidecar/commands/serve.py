"""`python -m sidecar serve`: encode for others."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys

from sidecar.artifact import ArtifactError
from sidecar.commands import BAD_ARGUMENTS, FAILED, print_error
from sidecar.runtimes.base import RuntimeFault
from sidecar.settings import Settings, SettingsError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("serve", help="serve an artifact over gRPC", description=__doc__, allow_abbrev=False)
    Settings.add_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until told to stop. 0 after a drain, 1 if a run outlasted it, 2 if the settings, the artifact or an
    address will not do."""
    # As a container's first process it has no default handlers: until the server has its own, SIGTERM would be lost.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # The other commands import neither the engine nor a runtime.
    from sidecar.machine import MachineError
    from sidecar.monitoring.request_log import configure_logging
    from sidecar.server.app import serve
    from sidecar.server.security import SecurityError
    from sidecar.urls.fetcher import UrlsUnavailable

    as_json = False
    try:
        settings = Settings.from_sources(vars(options))
        configure_logging(settings.log_level, settings.log_format)
        as_json = settings.log_format == "json"
        if unknown := Settings.unknown_variables():
            logging.getLogger(__name__).warning("no setting has these variables: %s", ", ".join(unknown))
        for name in Settings.emptied_variables():
            logging.getLogger(__name__).warning("%s is set to nothing and protects nothing: name a file, or none", name)
        drained = asyncio.run(serve(settings))
        # The interpreter's end takes its handlers away, and a signal repeated then would decide how the process ends.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    except (
        *(ArtifactError, MachineError, OSError, RuntimeFault),
        *(SecurityError, SettingsError, UrlsUnavailable),
    ) as error:
        if as_json:  # a log's every line has its form
            logging.getLogger(__name__).critical("sidecar serve: %s", error)
        else:
            print_error(f"sidecar serve: {error}")
        return BAD_ARGUMENTS
    if not drained:
        # A run cannot be stopped, and a runtime that is torn down under one may crash the process or keep it for minutes.
        logging.shutdown()
        os._exit(FAILED)
    return 0
