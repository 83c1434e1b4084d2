"""Ports for a chain's parts: the environment's, or free ones, kept from everybody else until the part listens."""

from __future__ import annotations

import random
import socket
from collections.abc import Mapping

HOST = "127.0.0.1"
_LOW_PORTS = range(20_000, 32_768)
_TRIES = 200


class PortError(ValueError):
    """A port that cannot be had. The message names the variable."""


class Ports:
    """Holds each port with a socket that never listens, for as long as it lives.

    So no other program is given the port, nor does the kernel use it for an outgoing connection, in the minute until its part
    listens. The part may: Linux lets sockets with SO_REUSEADDR share a port while only one listens (socket(7)), and gRPC,
    uvicorn, ZeroMQ and Rust's standard library all set it.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._held: list[socket.socket] = []

    def take(self, variable: str, *, low: bool = False) -> int:
        """The port that the variable names, or a free one.

        Args:
            low: below 32768, for programs that keep it in 15 bits. The kernel gives none of those by itself.

        Raises:
            PortError: if the variable is not a port, or that port is in use.
        """
        given = self._environment.get(variable, "")
        if given or not low:
            return self._take(variable, given)
        for port in random.sample(_LOW_PORTS, _TRIES):
            try:
                return self._take(variable, str(port))
            except PortError:
                continue
        raise PortError(
            f"there is no free port from {_LOW_PORTS.start} to {_LOW_PORTS.stop - 1}; name one in {variable}"
        )

    def take_many(self, variable: str, count: int) -> list[int]:
        """As many as wanted; the variable has them with spaces or commas between.

        Raises:
            PortError: as `take`, and if the variable names more or fewer.
        """
        given = self._environment.get(variable, "").replace(",", " ").split()
        if given and len(given) != count:
            raise PortError(f"{variable} must name {count} ports, one an encoder; it names {len(given)}")
        return [self._take(variable, text) for text in given or [""] * count]

    def _take(self, variable: str, text: str) -> int:
        if text and not (text.isdecimal() and 0 < int(text) < 65536):
            raise PortError(f"{variable} must be a port from 1 to 65535, got {text!r}")
        holder = socket.socket()
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind((HOST, int(text or 0)))
        except OSError as error:
            holder.close()
            raise PortError(f"{variable}={text}: {error.strerror}; leave it out for a free one") from error
        port: int = holder.getsockname()[1]
        # Two variables with one port: the second would bind as a part would.
        if any(port == held.getsockname()[1] for held in self._held):
            holder.close()
            raise PortError(f"{variable}={text} is another part's port too")
        self._held.append(holder)
        return port
