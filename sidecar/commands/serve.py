"""`python -m sidecar serve`: encode for others."""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import logging
import os
from contextlib import suppress
from typing import NoReturn

from sidecar.artifact import ArtifactError
from sidecar.commands import BAD_ARGUMENTS, FAILED, print_error
from sidecar.runtimes.base import RuntimeFault
from sidecar.settings import Settings, SettingsError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("serve", help="serve an artifact over gRPC", description=__doc__, allow_abbrev=False)
    Settings.add_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until told to stop, and end the process: with 0 after a drain, 1 if it was cut short.

    Returns:
        2 if the settings, the artifact, a runtime or an address will not do.
    """
    # Runtimes make files in the cache by themselves, and whoever could write there could have us load another model.
    os.umask(os.umask(0o022) | 0o022)
    # The other commands import neither the engine nor a runtime.
    from sidecar.machine import MachineError
    from sidecar.monitoring.request_log import configure_logging
    from sidecar.server.app import serve
    from sidecar.server.security import SecurityError
    from sidecar.server.stopping import end_process
    from sidecar.urls.fetcher import UrlsUnavailable

    async def serve_and_end(settings: Settings) -> NoReturn:
        drained = await serve(settings)
        # Before the loop is closed, which would wait for threads that nothing can stop: a runtime that loads, a run.
        end_process(0 if drained else FAILED)

    as_json = False
    try:
        settings = Settings.from_sources(vars(options))
        configure_logging(settings.log_level, settings.log_format)
        as_json = settings.log_format == "json"
        # A crash of native code then names the signal and what each thread did; these lines alone are never JSON.
        with suppress(OSError, RuntimeError, ValueError):  # there is no stderr, or none with a descriptor
            faulthandler.enable()
        if unknown := Settings.unknown_variables():
            logging.getLogger(__name__).warning("no setting has these variables: %s", ", ".join(unknown))
        for name in Settings.emptied_variables():
            logging.getLogger(__name__).warning("%s is set to nothing and protects nothing: name a file, or none", name)
        asyncio.run(serve_and_end(settings))
    except (
        *(ArtifactError, MachineError, OSError, RuntimeFault),
        *(SecurityError, SettingsError, UrlsUnavailable),
    ) as error:
        if as_json:  # a log's every line has its form
            logging.getLogger(__name__).critical("sidecar serve: %s", error)
        else:
            print_error(f"sidecar serve: {error}")
    return BAD_ARGUMENTS
