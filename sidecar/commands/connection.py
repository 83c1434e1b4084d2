"""How a command reaches a sidecar, or several, and proves who it is."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sidecar.client import Embedding, EncoderClient, image_item
from sidecar.credentials import client_credentials, read_token
from sidecar.fleet import Fleet

# For a sidecar among several that starts, or a name that is not known yet; nobody wants to wait longer for nothing.
_UNREACHABLE_S = 5.0


def add_credential_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("TLS and tokens", "Any of the --tls flags calls the server over TLS.")
    group.add_argument("--tls", action="store_true", help="trust the authorities that gRPC knows by itself")
    group.add_argument("--tls-ca", metavar="FILE", type=Path, help="trust the authorities in this PEM file instead")
    group.add_argument("--tls-cert", metavar="FILE", type=Path, help="this caller's certificate, for mutual TLS")
    group.add_argument("--tls-key", metavar="FILE", type=Path, help="the certificate's key")
    group.add_argument("--token-file", metavar="FILE", type=Path, help="send the first token in this file")


def names_several(arguments: argparse.Namespace) -> bool:
    """Whether --server is a list, or a name that is to stand for all its addresses."""
    server: str = arguments.server
    return server.startswith("dns:") or ("," in server and not server.startswith("unix:"))


def open_client(arguments: argparse.Namespace) -> EncoderClient:
    """A client of the one server that the arguments name. Raises as `proofs`."""
    return EncoderClient(arguments.server, **proofs(arguments))


def open_fleet(arguments: argparse.Namespace) -> Fleet:
    """All servers that the arguments name. Raises as `proofs`.

    Raises:
        AddressError: if --server is no list of addresses.
    """
    return Fleet([arguments.server], **proofs(arguments))


class FleetClient:
    """Of a fleet, what a command that encodes needs of an `EncoderClient`. Raises as `open_fleet`."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._fleet = open_fleet(arguments)
        self._runner = asyncio.Runner()

    def encode_image(
        self, data: bytes, *, min_pixels: int | None, max_pixels: int | None, timeout_s: float
    ) -> Embedding:
        """Raises:
        ValueError: if there are no bytes.
        EncodeError, ProtocolError: if no sidecar could.
        """
        item = image_item(data, min_pixels=min_pixels, max_pixels=max_pixels)
        return self._runner.run(self._fleet.encode(item, timeout_s, unreachable_s=_UNREACHABLE_S))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._runner.run(self._fleet.close())
        self._runner.close()


def proofs(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a client proves itself with, as keyword arguments of either client.

    Raises:
        CredentialsError: if a certificate, key or token will not do.
    """
    ca, cert, key = arguments.tls_ca, arguments.tls_cert, arguments.tls_key
    over_tls = arguments.tls or ca is not None or cert is not None or key is not None
    return {
        "credentials": client_credentials(ca, cert, key) if over_tls else None,
        "token": None if arguments.token_file is None else read_token(arguments.token_file),
    }
