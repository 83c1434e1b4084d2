"""How a command reaches a sidecar and proves who it is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sidecar.client import EncoderClient
from sidecar.credentials import client_credentials, read_token


def add_credential_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("TLS and tokens", "Any of the --tls flags calls the server over TLS.")
    group.add_argument("--tls", action="store_true", help="trust the authorities that gRPC knows by itself")
    group.add_argument("--tls-ca", metavar="FILE", type=Path, help="trust the authorities in this PEM file instead")
    group.add_argument("--tls-cert", metavar="FILE", type=Path, help="this caller's certificate, for mutual TLS")
    group.add_argument("--tls-key", metavar="FILE", type=Path, help="the certificate's key")
    group.add_argument("--token-file", metavar="FILE", type=Path, help="send the first token in this file")


def open_client(arguments: argparse.Namespace) -> EncoderClient:
    """A client of the server that the arguments name. Raises as `proofs`."""
    return EncoderClient(arguments.server, **proofs(arguments))


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
