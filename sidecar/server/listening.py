"""Addresses: taking them, refusing those that are somebody else's, and what connections to them may cost."""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import grpc

from sidecar.settings import Settings

logger = logging.getLogger(__name__)

# What the process needs descriptors for beside connections: the store's files, pictures being fetched, the runtimes, the log.
_OTHER_DESCRIPTORS = 128
_MOST_CONNECTIONS, _LEAST_CONNECTIONS = 1024, 8
# Calls that were received and not yet taken up by the event loop. gRPC answers CANCELLED from the first number on, at random,
# and always from the second; its own 1000 and 3000 are reached by a dozen connections that open and reset calls. One such call
# holds about 11 kB and takes 0.19 ms, so that the second number stands for 180 MB and 3 s.
_MAY_WAIT, _MUST_NOT_WAIT = 12_288, 16_384
_HANDSHAKE_MS = 20_000


class BindError(OSError):
    """An address cannot be listened on."""


def bind(
    server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None, socket_mode: int = 0o600
) -> str:
    """Listen on an address and return it with the port that was really taken. A unix socket has `socket_mode` from then on.

    Raises:
        BindError: if it is in use, or cannot be.
    """
    path = _path_of(address) if address.startswith("unix:") else None
    if path is not None:
        _refuse_living_socket(path)
    before = os.umask(0o177) if path is not None else None  # never open to others, not even for a moment
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        if path is not None:
            path.chmod(socket_mode)
    except RuntimeError as error:
        reason = "it is in use, or not an address of this machine"
        if address.startswith("unix:"):
            reason = "a file is in its place, its directory does not exist, or its path has over 107 bytes"
        raise BindError(f"cannot listen on {address}: {reason}") from error
    finally:
        if before is not None:
            os.umask(before)
    if address.startswith(("unix:", "unix-abstract:")):
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def server_options(settings: Settings, descriptors: int) -> list[tuple[str, int]]:
    """gRPC's channel arguments for the server.

    Args:
        descriptors: how many files the process may have open.
    """
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        # Without this a second server on the same port would share its connections instead of failing to start.
        ("grpc.so_reuseport", 0),
        # Clients may ping once in 10 s to notice a dead connection early.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A stream that the caller has reset counts until the event loop has taken it up; without a limit, one connection that
        # opens and resets streams (HTTP/2 rapid reset, CVE-2023-44487) fills the queue of all callers.
        ("grpc.max_concurrent_streams", settings.max_connection_calls),
        ("grpc.server.max_pending_requests", _MAY_WAIT),
        ("grpc.server.max_pending_requests_hard_limit", _MUST_NOT_WAIT),
        ("grpc.max_allowed_incoming_connections", settings.max_connections or connections_for(settings, descriptors)),
        ("grpc.max_connection_idle_ms", round(settings.connection_idle_seconds * 1e3)),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
    ]


def connections_for(settings: Settings, descriptors: int) -> int:
    """How many connections each address may have open, so that some descriptors are left for everything else."""
    spare = (descriptors - _OTHER_DESCRIPTORS) // len(settings.listen)
    return max(_LEAST_CONNECTIONS, min(_MOST_CONNECTIONS, spare))


def remove_sockets(addresses: Iterable[str]) -> None:
    """Take away the socket files of a server that never started; gRPC does so for those that did."""
    for address in addresses:
        if address.startswith("unix:"):
            with suppress(OSError):
                _path_of(address).unlink()


def is_local(address: str) -> bool:
    """Whether nobody but this host can reach it."""
    host = address.rpartition(":")[0].strip("[]")
    return address.startswith(("unix:", "unix-abstract:")) or host in ("localhost", "::1") or host.startswith("127.")


def _path_of(address: str) -> Path:
    return Path(address.removeprefix("unix:").removeprefix("//"))


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


def warn_of_plaintext(settings: Settings, *, encrypted: bool) -> None:
    """Warn of addresses that other hosts can reach, where calls or tokens travel in plain text."""
    reachable = [address for address in settings.listen if not is_local(address)]
    if encrypted or not reachable:
        return
    if settings.token_file:
        logger.warning("tokens travel in the clear: give --tls-cert and --tls-key, or encrypt the network")
        return
    logger.warning(
        "whoever reaches %s may call, and all of it travels in the clear: give --tls-cert, --tls-key and --token-file, or let "
        "only callers of yours reach it (a network policy, a mesh, --listen with a loopback address)",
        ", ".join(reachable),
    )


def warn_of_open_sockets(settings: Settings) -> None:
    """Warn of a socket that every user of this host may use, unless a token is wanted of each call."""
    sockets = [address for address in settings.listen if address.startswith("unix:")]
    if sockets and not settings.token_file and int(settings.socket_mode, 8) & stat.S_IRWXO:
        logger.warning(
            "--socket-mode %s lets every user of this host call over %s: use 0600, or 0660 for a group, or give --token-file",
            settings.socket_mode,
            ", ".join(sockets),
        )
