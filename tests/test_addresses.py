"""What may be written for sidecars' addresses, and what it stands for."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from sidecar.addresses import AddressError, Addresses, UnknownNameError, target

KNOWN = {
    "one.test": ["10.0.0.1"],
    "many.test": ["10.0.0.9", "10.0.0.8", "10.0.0.9"],
    "dual.test": ["10.0.0.3", "2001:db8::3"],
    "six.test": ["2001:db8::6"],
    "unix-1.test": ["10.0.0.5"],
    "unix-2.test": ["10.0.0.6"],
}


@pytest.fixture(autouse=True)
def resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo

    def resolved(host: str, port: int, *rest: Any, **options: Any) -> list[Any]:
        if host == "flaky.test":
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        if host.endswith(".test") and host not in KNOWN:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [entry for each in KNOWN.get(host, [host]) for entry in resolve(each, port, *rest, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)


def found(*given: str) -> tuple[str, ...]:
    return asyncio.run(Addresses(given).look_up())


@pytest.mark.parametrize(
    ("given", "stands_for"),
    [
        (["10.0.0.1:50051"], "ipv4:10.0.0.1:50051"),
        (["[2001:db8::1]:50051"], "ipv6:[2001:db8::1]:50051"),
        (["ipv4:10.0.0.1:1,10.0.0.2:2"], "ipv4:10.0.0.1:1,10.0.0.2:2"),
        (["10.0.0.1:1,10.0.0.2:2"], "ipv4:10.0.0.1:1,10.0.0.2:2"),
        (["10.0.0.2:2", "10.0.0.1:1", "10.0.0.2:2"], "ipv4:10.0.0.1:1,10.0.0.2:2"),
        (["many.test:7"], "ipv4:10.0.0.8:7,10.0.0.9:7"),
        (["dns:///many.test:7"], "ipv4:10.0.0.8:7,10.0.0.9:7"),
        (["dns:many.test:7"], "ipv4:10.0.0.8:7,10.0.0.9:7"),
        (["dual.test:7"], "ipv4:10.0.0.3:7"),
        (["dual.test:7", "six.test:7"], "ipv6:[2001:db8::3]:7,[2001:db8::6]:7"),
        (["one.test:7", "gone.test:7"], "ipv4:10.0.0.1:7"),
        (["unix:/tmp/socket"], "unix:/tmp/socket"),
        (["unix-1.test:7", "unix-2.test:7"], "ipv4:10.0.0.5:7,10.0.0.6:7"),
    ],
    ids=" ".join,
)
def test_addresses_become_one_target(given: list[str], stands_for: str) -> None:
    assert target(found(*given)) == stands_for


@pytest.mark.parametrize(
    "given",
    [
        [],
        [""],
        ["host"],
        ["host:"],
        ["host:port"],
        ["host:0"],
        ["host:65536"],
        [":50051"],
        ["2001:db8::1:50051"],
        ["http://host:50051"],
        ["dns://server/host:50051"],
        ["unix:/a", "unix:/b"],
        ["host:1", "unix:/a"],
        ["host:1,,host:2"],
    ],
    ids=repr,
)
def test_what_cannot_be_an_address_is_refused(given: list[str]) -> None:
    with pytest.raises(AddressError):
        Addresses(given)


@pytest.mark.parametrize(
    ("given", "several", "change"),
    [
        (["10.0.0.1:1"], False, False),
        (["unix:/a"], False, False),
        (["10.0.0.1:1", "10.0.0.2:1"], True, False),
        (["one.test:1"], True, True),
    ],
)
def test_a_name_may_come_to_stand_for_others(given: list[str], several: bool, change: bool) -> None:
    addresses = Addresses(given)
    assert (addresses.may_be_several, addresses.may_change) == (several, change)


def test_families_that_do_not_meet_are_refused() -> None:
    with pytest.raises(AddressError, match="IPv4 addresses or of IPv6") as caught:
        found("one.test:1", "six.test:1")
    assert not isinstance(caught.value, UnknownNameError)


def test_a_resolver_that_is_out_is_not_a_name_that_has_gone() -> None:
    """What is known stays as it is then."""
    with pytest.raises(UnknownNameError, match="flaky.test cannot be looked up: Temporary failure"):
        found("one.test:1", "flaky.test:1")
    with pytest.raises(UnknownNameError, match="gone.test cannot be looked up: no such name"):
        found("gone.test:1")
