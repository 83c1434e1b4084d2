"""Who is calling, and for how long it will wait."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

# What a caller on this host may call itself: there, addresses do not tell callers apart, and nobody is to be kept from
# taking more than a fair share by a name that anybody can make up.
CLIENT_METADATA = "epd-client"
_MOST_NAME = 128

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class Caller:
    """`client`: whose share of the server the call takes. `deadline`: in `time.monotonic` seconds."""

    client: str
    peer: str
    deadline: float


def caller_of(context: Any, name_of: Callable[[Metadata], str | None] | None) -> Caller:
    """The name behind a token or a certificate where there is one, else the address: a host's own, however many connections it
    opens; on this host each connection's, or the name that the caller gives itself."""
    left_s = context.time_remaining()
    deadline = math.inf if left_s is None else time.monotonic() + left_s
    peer = context.peer()
    metadata = context.invocation_metadata() or ()
    if name_of is not None and (name := name_of(metadata)):
        return Caller(f"token {name}", peer, deadline)
    common_name = context.auth_context().get("x509_common_name")
    if common_name:
        return Caller(f"certificate {common_name[0].decode(errors='replace')}", peer, deadline)
    if peer.startswith(("unix:", "ipv4:127.", "ipv6:%5B::1%5D")):
        given = next((value for key, value in metadata if key == CLIENT_METADATA and isinstance(value, str)), "")
        return Caller(f"local {given[:_MOST_NAME] or peer}", peer, deadline)
    return Caller(peer.rpartition(":")[0], peer, deadline)
