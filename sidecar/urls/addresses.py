"""Which addresses belong to the public internet, and the resolver that lets a connection be made to no others.

Sources: IANA's special-purpose registries (RFC 6890) for both families, as of 2026. They are spelled out because
`ipaddress.is_global` differs between Python's patch releases and looks through only some of the IPv6 forms that carry
an IPv4 address.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Collection
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import TYPE_CHECKING

from sidecar.errors import UrlRefused, UrlUnreachable

if TYPE_CHECKING:
    from aiohttp.abc import ResolveResult

# A name's numeric addresses; `socket.gaierror` if it has none.
Lookup = Callable[[str], Awaitable[Collection[str]]]

# One wording for names that do not exist and names that lead inside: nobody can map the inside by asking.
_NO_PUBLIC_ADDRESS = "the URL's host has no public address"

_NOT_PUBLIC_V4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carriers' NAT; Alibaba's metadata
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's host agent, which answers inside every virtual machine
        "169.254.0.0/16",  # link-local; most clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
# IPv6 the other way round: only global unicast has ever been given out. Outside of it lie ::, ::1, the IPv4-mapped,
# IPv4-compatible and NAT64 forms, unique local, link-local, site-local and multicast.
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
)


def is_public(address: str) -> bool:
    """Whether a numeric address is one that anybody on the internet may own; what is no address is not.

    A network's own NAT64 prefix (RFC 6052) looks like any other: nothing in the address tells it.
    """
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if parsed.version == 4:
        return not any(parsed in network for network in _NOT_PUBLIC_V4)
    return parsed in _GLOBAL_UNICAST and not any(parsed in network for network in _NOT_PUBLIC_V6)


class PublicResolver:
    """What aiohttp asks for a name's addresses before each connection; it connects to these and no others."""

    def __init__(self, lookup: Lookup, may_connect: Callable[[str], bool]) -> None:
        self._lookup = lookup
        self._may_connect = may_connect

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list[ResolveResult]:
        try:
            addresses = list(dict.fromkeys(await self._lookup(host)))
        except socket.gaierror as error:
            if error.errno == socket.EAI_AGAIN:
                raise UrlUnreachable("the URL's host could not be looked up") from error
            raise UrlRefused(_NO_PUBLIC_ADDRESS) from error
        except UnicodeError as error:
            raise UrlRefused(_NO_PUBLIC_ADDRESS) from error
        # One address inside is enough: a name of two minds is not worth an argument.
        if not addresses or not all(map(self._may_connect, addresses)):
            raise UrlRefused(_NO_PUBLIC_ADDRESS)
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
                "proto": socket.IPPROTO_TCP,
                "flags": socket.AI_NUMERICHOST,
            }
            for address in addresses
        ]

    async def close(self) -> None:
        """Nothing is held."""
