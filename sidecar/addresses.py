"""Where sidecars are: what a user writes, and the numeric addresses that it stands for now. Imports nothing of the project.

    host:port, dns:///host:port    every address that the name has, looked up again and again
    [2001:db8::1]:50051            itself; so is ipv4:10.0.0.1:50051,10.0.0.2:50051
    unix:/path                     itself; alone

gRPC's own resolver is not asked. It looks a name up again only when a connection breaks, so that a sidecar that was added would
get no work until one is lost; and it takes the IPv4 and the IPv6 address of a host for two sidecars.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from contextlib import suppress

_SOCKET = ("unix:", "unix-abstract:")
_NAME_PREFIXES = ("dns:///", "dns:")
_NUMBER_PREFIXES = ("ipv4:", "ipv6:")


# What a resolver says of a name that has no address: not that it could not find out.
_GONE = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


class AddressError(ValueError):
    """No address, or not together with the others."""


class UnknownNameError(AddressError):
    """A name that has no address now, or that could not be looked up."""


class Addresses:
    """
    Attributes:
        may_be_several: whether they are, or may come to be, more than one sidecar.
        may_change: whether looking them up later may give others.
        host: of the first; what a certificate is for. None for a unix socket.
    """

    def __init__(self, given: Sequence[str]) -> None:
        """Raises:
        AddressError: if one is no address, or a unix socket is not alone.
        """
        entries = [entry for address in given for entry in _entries(address)]
        if not entries:
            raise AddressError("no address of a sidecar was given")
        sockets = [entry for entry in entries if entry.startswith(_SOCKET)]
        if sockets and len(entries) > 1:
            raise AddressError(f"a list may hold host:port only, got {sockets[0]}")
        self._socket = sockets[0] if sockets else None
        self._hosts = [] if sockets else [_host_and_port(entry) for entry in dict.fromkeys(entries)]
        self.may_change = any(not _is_number(host) for host, _ in self._hosts)
        self.may_be_several = self.may_change or len(self._hosts) > 1
        self.host = self._hosts[0][0] if self._hosts else None

    async def look_up(self) -> tuple[str, ...]:
        """What gRPC takes as addresses of one sidecar each, sorted: `10.0.0.1:50051`, `[2001:db8::1]:50051`, `unix:/path`.

        All are of one family, IPv4 where every name has one. A name of a list that does not exist is left out while others do.

        Raises:
            UnknownNameError: if no name exists, or one could not be looked up.
            AddressError: if no family is common to all.
        """
        if self._socket is not None:
            return (self._socket,)
        found = await asyncio.gather(*(_look_up(host, port) for host, port in self._hosts))
        known = [addresses for addresses in found if addresses]
        if not known:
            raise UnknownNameError(f"{', '.join(host for host, _ in self._hosts)} cannot be looked up: no such name")
        for version in (4, 6):
            if all(version in addresses for addresses in known):
                return tuple(sorted({address for addresses in known for address in addresses[version]}))
        raise AddressError("a list must be of IPv4 addresses or of IPv6 addresses, not of both")


def target(found: Sequence[str]) -> str:
    """Addresses as `look_up` gives them as one target of gRPC's."""
    if found[0].startswith(_SOCKET):
        return found[0]
    return f"{'ipv6' if found[0].startswith('[') else 'ipv4'}:{','.join(found)}"


def _entries(address: str) -> list[str]:
    address = address.strip()
    if address.startswith(_SOCKET):
        return [address]
    for prefix in _NAME_PREFIXES:
        if address.startswith(prefix):
            return [address.removeprefix(prefix)]
    for prefix in _NUMBER_PREFIXES:
        address = address.removeprefix(prefix)
    return [entry.strip() for entry in address.split(",")]


def _host_and_port(entry: str) -> tuple[str, int]:
    host, _, port = entry.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    is_port = port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16
    if not bare or not is_port or "/" in host or (":" in host and bare == host):
        raise AddressError(f"{entry!r} is not host:port; an address is host:port, dns:///name:port or unix:/path")
    return bare, int(port)


async def _look_up(host: str, port: int) -> dict[int, list[str]]:
    """IP version → addresses; empty if there is no such name."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        if isinstance(error, UnicodeError) or error.errno in _GONE:
            return {}
        raise UnknownNameError(f"{host} cannot be looked up: {error.strerror or error}") from error
    addresses: dict[int, list[str]] = {}
    for entry in found:
        number = ipaddress.ip_address(entry[4][0])
        addresses.setdefault(number.version, []).append(
            f"{number}:{port}" if number.version == 4 else f"[{number}]:{port}"
        )
    return addresses


def _is_number(host: str) -> bool:
    with suppress(ValueError):
        ipaddress.ip_address(host)
        return True
    return False
