"""Addresses: taking them, and refusing those that are somebody else's."""

from __future__ import annotations

import socket
from pathlib import Path

import grpc


class BindError(OSError):
    """An address cannot be listened on."""


def bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> str:
    """Listen on an address and return it with the port that was really taken.

    Raises:
        BindError: if it is in use, or cannot be.
    """
    if address.startswith("unix:"):
        _refuse_living_socket(Path(address.removeprefix("unix:").removeprefix("//")))
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        reason = "it is in use, or not an address of this machine"
        if address.startswith("unix:"):
            reason = "a file is in its place, its directory does not exist, or its path has over 107 bytes"
        raise BindError(f"cannot listen on {address}: {reason}") from error
    if address.startswith(("unix:", "unix-abstract:")):
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def is_local(address: str) -> bool:
    """Whether nobody but this host can reach it."""
    host = address.rpartition(":")[0].strip("[]")
    return address.startswith(("unix:", "unix-abstract:")) or host in ("localhost", "::1") or host.startswith("127.")


def _refuse_living_socket(path: Path) -> None:
    """gRPC replaces a socket file without asking; one that still answers belongs to somebody."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return
    raise BindError(f"another server is listening on unix:{path}")
