"""Pictures by URL: what strangers may name, what may answer, and that nothing inside is ever reached."""

from __future__ import annotations

import asyncio
import base64
import gc
import gzip
import socket
import ssl
import subprocess
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import trustme
from PIL import Image

from sidecar.engine.memory import Memory, Share
from sidecar.errors import EncoderError, Overloaded, TooLarge, UrlRefused, UrlUnreachable
from sidecar.urls.addresses import is_public
from sidecar.urls.fetcher import UrlFetcher, UrlsUnavailable
from sidecar.urls.forms import decode_data_url

JPEG = b"\xff\xd8\xff\xe0" + bytes(range(200))
PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


def encoded(kind: str) -> bytes:
    out = BytesIO()
    Image.new("RGB", (16, 16)).save(out, kind)
    return out.getvalue()


HEIC = b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(40)
WEBP = b"RIFF\x10\x00\x00\x00WEBPVP8 " + bytes(12)

# In these tests the internet is one address, and all the others of loopback are the inside.
INTERNET, INSIDE = "127.0.0.1", "127.0.0.2"

Route = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Site:
    """A TLS server that says what a test tells it to, byte for byte."""

    def __init__(self) -> None:
        self.routes: dict[str, bytes | Route] = {}
        self.requests: list[str] = []
        self.connections = 0
        self.port = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            request = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.requests.append(request)
            route = self.routes[request.split(" ")[1]]
            if isinstance(route, bytes):
                writer.write(route)
                await writer.drain()
            else:
                await route(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the fetcher had enough
        finally:
            writer.close()

    def url(self, path: str, host: str = "pictures.example") -> str:
        return f"https://{host}:{self.port}{path}"

    def allowed(self, *hosts: str) -> list[str]:
        return [f"{host}:{self.port}" for host in hosts or ("pictures.example",)]


def http(body: bytes, *headers: str, status: str = "200 OK", kind: str = "image/jpeg") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return http(b"", f"Location: {location}", "Content-Length: 0", status=status)


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def ca(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("urls") / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return path


@asynccontextmanager
async def serving(authority: trustme.CA, address: str = INTERNET, port: int = 0) -> AsyncIterator[Site]:
    site = Site()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("pictures.example", "elsewhere.example", "inside.example").configure_cert(context)
    server = await asyncio.start_server(site.answer, address, port, ssl=context)
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        server.close()


async def internet(host: str) -> list[str]:
    return [INSIDE if host == "inside.example" else INTERNET]


async def nobody_asks(host: str) -> list[str]:
    raise AssertionError(f"{host} was looked up")


@asynccontextmanager
async def fetching(
    allowed: Collection[str] = (),
    *,
    lookup: Callable[[str], Awaitable[Collection[str]]] = internet,
    may_connect: Callable[[str], bool] = INTERNET.__eq__,
    **limits: Any,
) -> AsyncIterator[UrlFetcher]:
    fetcher = UrlFetcher(allowed, lookup=lookup, may_connect=may_connect, **limits)
    try:
        yield fetcher
    finally:
        await fetcher.close()


def fetch_route(
    authority: trustme.CA,
    ca: Path,
    route: bytes | Route,
    patience_s: float | None = None,
    room: Callable[[int], None] = lambda size: None,
    **limits: Any,
) -> bytes:
    """What comes from a site with that one answer."""

    async def run() -> bytes:
        async with serving(authority) as site, fetching(site.allowed(), ca=ca, **limits) as fetcher:
            site.routes["/"] = route
            return await fetcher.fetch(site.url("/"), patience_s, room)

    return asyncio.run(run())


@pytest.mark.parametrize(("picture", "kind"), [(JPEG, "image/jpeg"), (PNG, "image/png"), (WEBP, "image/webp; q=1")])
def test_a_picture_arrives_as_it_lies_there(authority: trustme.CA, ca: Path, picture: bytes, kind: str) -> None:
    assert fetch_route(authority, ca, http(picture, f"Content-Length: {len(picture)}", kind=kind)) == picture


def test_a_picture_of_a_storage_that_knows_no_types_arrives(authority: trustme.CA, ca: Path) -> None:
    assert fetch_route(authority, ca, http(JPEG, kind="binary/octet-stream")) == JPEG
    assert fetch_route(authority, ca, b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + JPEG) == JPEG


def test_a_signed_url_is_sent_as_it_was_written(authority: trustme.CA, ca: Path) -> None:
    path = "/a%2Fb/%e4/../x?sig=%2b+%2B==&next=https://h"

    async def run() -> None:
        async with serving(authority) as site, fetching(site.allowed(), ca=ca) as fetcher:
            site.routes[path] = http(JPEG)
            assert await fetcher.fetch(site.url(path) + "#fragment", None) == JPEG

    asyncio.run(run())


def test_neither_proxies_nor_credentials_nor_cookies_are_used(
    authority: trustme.CA, ca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def run() -> Site:
        async with serving(authority) as site, fetching(site.allowed(), ca=ca) as fetcher:
            site.routes["/"] = http(b"", "Location: /2", "Set-Cookie: id=1", "Content-Length: 0", status="302 Found")
            site.routes["/2"] = http(JPEG)
            assert await fetcher.fetch(site.url("/"), None) == JPEG
            return site

    for request in asyncio.run(run()).requests:
        names = {line.partition(":")[0].lower() for line in request.splitlines()[1:] if line}
        assert names == {"host", "accept", "accept-encoding", "user-agent"}
        assert "accept-encoding: identity" in request.lower()


HOSTILE = {
    "http": "http://pictures.example/a.jpg",
    "file": "file:///etc/passwd",
    "no scheme": "//pictures.example/a.jpg",
    "path": "/etc/passwd",
    "empty": "",
    "no host": "https:///a.jpg",
    "one slash": "https:/pictures.example/a.jpg",
    "user and password": "https://user:pass@pictures.example/",
    "host as user name": "https://pictures.example@10.0.0.1/",
    "dotted": "https://127.0.0.1/",
    "public address": "https://8.8.8.8/",
    "decimal": "https://2130706433/",
    "octal": "https://0177.0.0.1/",
    "hex": "https://0x7f.1/",
    "whole hex": "https://0x7f000001/",
    "hex at the end": "https://1.1.1.0x7f/",
    "short": "https://127.1/",
    "dotted with a trailing dot": "https://127.0.0.1./",
    "name with a trailing dot": "https://pictures.example./",
    "full-width digits": "https://１２７.0.0.1/",
    "circled digits": "https://①②⑦.⓪.⓪.①/",
    "ideographic dots": "https://127。0。0。1/",
    "name not in ASCII": "https://bücher.example/",
    "percent-encoded address": "https://%31%32%37.0.0.1/",
    "percent-encoded dot": "https://pictures%2eexample/",
    "IPv6 loopback": "https://[::1]/",
    "IPv6 zone": "https://[fe80::1%25eth0]/",
    "IPv4-mapped": "https://[::ffff:169.254.169.254]/",
    "IPv6 without brackets": "https://::1/",
    "brackets around a name": "https://[pictures.example]/",
    "half a bracket": "https://[::1/",
    "localhost": "https://localhost/",
    "single label": "https://metadata/",
    "empty label": "https://pictures..example/",
    "leading dot": "https://.pictures.example/",
    "leading hyphen": "https://-pictures.example/",
    "endless label": f"https://{'a' * 64}.example/",
    "endless name": f"https://{'a.' * 130}example/",
    "endless URL": f"https://pictures.example/{'a' * 9000}",
    "backslash for slash": "https:\\\\pictures.example/",
    "backslash before at": "https://pictures.example\\@10.0.0.1/",
    "leading space": " https://pictures.example/",
    "space in the path": "https://pictures.example/a b",
    "tab in the host": "https://pic\ttures.example/",
    "line break": "https://pictures.example/\r\nHost: inside",
    "null": "https://pictures.example\0.other.example/",
    "soft hyphen": "https://pictures\u00ad.example/",
    "port 80": "https://pictures.example:80/",
    "port 22": "https://pictures.example:22/",
    "port 0": "https://pictures.example:0/",
    "port over 65535": "https://pictures.example:65979/",
    "port without digits": "https://pictures.example:/",
    "port that is a word": "https://pictures.example:https/",
    "port in Arabic digits": "https://pictures.example:٤٤٣/",
    "two ports": "https://pictures.example:443:80/",
    "data of another type": "data:text/html;base64,PGI+",
    "data as SVG": "data:image/svg+xml;base64,PHN2Zy8+",
    "data not in base64": "data:image/png,%89PNG",
    "data cut short": "data:image/png;base64,iVBORw0KGgo",
    "data with line breaks": "data:image/png;base64,iVBO\nRw0K",
    "data that is no picture": "data:image/png;base64,PGI+PGI+PGI+PGI+",
    "data without any": "data:image/png;base64,",
}


@pytest.mark.parametrize("form", HOSTILE)
def test_a_hostile_url_is_refused_before_anybody_is_asked(form: str) -> None:
    async def run() -> None:
        async with fetching(lookup=nobody_asks) as fetcher:
            with pytest.raises(UrlRefused) as refused:
                await fetcher.fetch(HOSTILE[form], None)
            assert len(str(refused.value).splitlines()) == 1

    asyncio.run(run())


NOT_PUBLIC = {
    "loopback": "127.0.0.1",
    "the rest of loopback": "127.255.255.254",
    "unspecified": "0.0.0.0",
    "this network": "0.1.2.3",
    "private 10": "10.0.0.1",
    "private 172.16": "172.31.255.255",
    "private 192.168": "192.168.1.1",
    "carrier NAT": "100.64.0.1",
    "Alibaba's metadata": "100.100.100.200",
    "metadata": "169.254.169.254",
    "Azure's host agent": "168.63.129.16",
    "Oracle's metadata": "192.0.0.192",
    "documentation": "203.0.113.9",
    "benchmarks": "198.19.255.255",
    "6to4 relay": "192.88.99.1",
    "multicast": "224.0.0.1",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "IPv6 loopback": "::1",
    "IPv6 unspecified": "::",
    "IPv4-mapped private": "::ffff:10.0.0.1",
    "IPv4-mapped public": "::ffff:8.8.8.8",
    "IPv4-compatible": "::127.0.0.1",
    "IPv4-translated": "::ffff:0:127.0.0.1",
    "NAT64": "64:ff9b::7f00:1",
    "local NAT64": "64:ff9b:1::7f00:1",
    "6to4": "2002:7f00:1::",
    "Teredo": "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "ORCHID": "2001:20::1",
    "IPv6 benchmarks": "2001:2::1",
    "IPv6 documentation": "2001:db8::1",
    "newer IPv6 documentation": "3fff::1",
    "segment routing": "5f00::1",
    "discard": "100::1",
    "unique local": "fd00:ec2::254",
    "link-local": "fe80::1",
    "link-local with a zone": "fe80::1%1",
    "site-local": "fec0::1",
    "IPv6 multicast": "ff02::1",
    "no address": "pictures.example",
}


@pytest.mark.parametrize("kind", NOT_PUBLIC)
def test_a_name_that_leads_inside_reads_like_one_that_does_not_exist(kind: str) -> None:
    async def no_such_name(host: str) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def inside(host: str) -> list[str]:
        return [NOT_PUBLIC[kind]]

    async def both(host: str) -> list[str]:
        return ["93.184.215.14", NOT_PUBLIC[kind]]

    async def run() -> None:
        told = set()
        for lookup in (no_such_name, inside, both):
            async with fetching(lookup=lookup, may_connect=is_public) as fetcher:
                with pytest.raises(UrlRefused) as refused:
                    await fetcher.fetch("https://pictures.example/a.jpg", None)
                told.add(str(refused.value))
        assert told == {"the URL's host has no public address"}

    asyncio.run(run())


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "172.32.0.1", "100.128.0.1", "198.20.0.1", "2606:4700::1111", "2a00::1"]
)
def test_a_public_address_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    ("errno", "error", "words"),
    [
        (socket.EAI_NONAME, UrlRefused, "no public address"),
        (socket.EAI_AGAIN, UrlUnreachable, "could not be looked up"),
    ],
)
def test_the_systems_resolver_is_asked_without_search_domains(
    monkeypatch: pytest.MonkeyPatch, errno: int, error: type[EncoderError], words: str
) -> None:
    asked: list[str] = []

    def getaddrinfo(host: str, *_: object, **__: object) -> list[object]:
        asked.append(host)
        raise socket.gaierror(errno, "")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    async def run() -> None:
        fetcher = UrlFetcher()
        try:
            with pytest.raises(error, match=words):
                await fetcher.fetch("https://pictures.example/a.jpg")
        finally:
            await fetcher.close()

    asyncio.run(run())
    assert asked == ["pictures.example."]


def test_a_name_that_changes_its_mind_never_leads_inside(authority: trustme.CA, ca: Path) -> None:
    answers = [INTERNET, INSIDE]
    asked: list[str] = []

    async def rebinding(host: str) -> list[str]:
        asked.append(host)
        return [answers[min(len(asked), 2) - 1]]

    async def run() -> None:
        async with (
            serving(authority) as site,
            serving(authority, INSIDE, site.port) as inside,
            fetching(site.allowed(), lookup=rebinding, ca=ca) as fetcher,
        ):
            site.routes["/"] = inside.routes["/"] = http(JPEG)
            assert await fetcher.fetch(site.url("/"), None) == JPEG
            assert asked == ["pictures.example"]  # once: there was no second answer to be led astray by
            with pytest.raises(UrlRefused, match="no public address"):
                await fetcher.fetch(site.url("/"), None)
            assert (site.connections, inside.connections) == (1, 0)

    asyncio.run(run())


def test_redirects_are_followed_within_the_rules(authority: trustme.CA, ca: Path) -> None:
    async def run() -> None:
        async with (
            serving(authority) as site,
            fetching(site.allowed("pictures.example", "elsewhere.example"), ca=ca, max_redirects=3) as fetcher,
        ):
            site.routes = {
                "/4": redirect("/3"),
                "/3": redirect("2?a=b", "307 Temporary Redirect"),
                "/2?a=b": redirect(site.url("/1", "elsewhere.example"), "301 Moved Permanently"),
                "/1": http(PNG),
            }
            assert await fetcher.fetch(site.url("/4"), None) == PNG
            site.routes["/5"] = redirect("/4")
            with pytest.raises(UrlRefused, match="more than 3 times"):
                await fetcher.fetch(site.url("/5"), None)

    asyncio.run(run())


@pytest.mark.parametrize(
    "location",
    [
        "https://inside.example:{port}/",
        "//inside.example:{port}/",
        "https://127.0.0.2:{port}/",
        "https://169.254.169.254/latest/meta-data/",
        "https://[::1]:{port}/",
        "https://pictures.example@127.0.0.2:{port}/",
        "http://pictures.example:{port}/picture",
        "https://pictures.example:22/",
        "https://pictures.example/picture",
        "https://other.example:{port}/",
        "//\\127.0.0.2/",
        "file:///etc/passwd",
        "data:image/png;base64,iVBORw0KGgo=",
        "",
    ],
)
def test_a_redirect_out_of_the_rules_is_refused(authority: trustme.CA, ca: Path, location: str) -> None:
    async def run() -> None:
        async with (
            serving(authority) as site,
            serving(authority, INSIDE, site.port) as inside,
            fetching(site.allowed("pictures.example", "inside.example"), ca=ca) as fetcher,
        ):
            site.routes = {"/": redirect(location.format(port=site.port)), "/picture": http(JPEG)}
            inside.routes["/"] = http(JPEG)
            with pytest.raises(UrlRefused):
                await fetcher.fetch(site.url("/"), None)
            assert inside.connections == 0

    asyncio.run(run())


REFUSED_ANSWERS = {
    "HTML by type": (http(b"<html>", kind="text/html"), UrlRefused, "of another type"),
    "JPEG called SVG": (http(JPEG, kind="image/svg+xml"), UrlRefused, "of another type"),
    "HTML called JPEG": (http(b"<html><body>secret</body></html>"), UrlRefused, "an HTML page"),
    "icon called PNG": (http(b"\0\0\1\0" + bytes(50), kind="image/png"), UrlRefused, "an ICO icon"),
    "HEIC called AVIF": (http(HEIC, kind="image/avif"), UrlRefused, "a HEIC photo"),
    "nothing": (http(b"", "Content-Length: 0"), UrlRefused, "no JPEG, PNG, WEBP"),
    "gzip bomb": (http(gzip.compress(bytes(10**6)), "Content-Encoding: gzip"), UrlRefused, "compressed"),
    "gzip hidden behind identity": (
        http(gzip.compress(JPEG), "Content-Encoding: identity, gzip"),
        UrlRefused,
        "compressed",
    ),
    "too large by its own word": (http(JPEG, "Content-Length: 999999"), UrlUnreachable, "broke off"),
    "too large": (http(JPEG + bytes(1000)), TooLarge, "over 1000 bytes"),
    "too large in chunks": (
        http(b"400\r\n" + JPEG.ljust(1024) + b"\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
        TooLarge,
        "over 1000 bytes",
    ),
    "cut short": (http(JPEG, "Content-Length: 900"), UrlUnreachable, "broke off"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.9\r\n", UrlUnreachable, "no HTTP"),
    "silence": (b"", UrlUnreachable, "broke off"),
    "not found": (http(b"", status="404 Not Found"), UrlRefused, "HTTP status 404"),
    "asks for a password": (http(b"", "WWW-Authenticate: Basic", status="401 No"), UrlRefused, "HTTP status 401"),
    "redirect to nowhere": (http(b"", status="302 Found"), UrlRefused, "HTTP status 302"),
    "a part": (http(JPEG, status="206 Partial Content"), UrlRefused, "HTTP status 206"),
    "overloaded": (http(b"", status="503 Busy"), UrlUnreachable, "HTTP status 503"),
    "too often": (http(b"", status="429 Slow down"), UrlUnreachable, "HTTP status 429"),
}


@pytest.mark.parametrize("kind", REFUSED_ANSWERS)
def test_an_answer_that_is_no_picture_is_told_apart(authority: trustme.CA, ca: Path, kind: str) -> None:
    route, error, words = REFUSED_ANSWERS[kind]
    with pytest.raises(EncoderError, match=words) as raised:
        fetch_route(authority, ca, route, max_bytes=1000)
    assert type(raised.value) is error


async def without_end(writer: asyncio.StreamWriter, head: bytes, piece: bytes, pause_s: float) -> None:
    writer.write(head)
    while not writer.is_closing():
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(pause_s)  # drain alone need not give way to the fetcher


async def endless(writer: asyncio.StreamWriter) -> None:
    await without_end(writer, http(JPEG), bytes(65536), pause_s=0)


async def endless_header(writer: asyncio.StreamWriter) -> None:
    await without_end(writer, b"HTTP/1.1 200 OK\r\nX: ", b"a" * 65536, pause_s=0)


async def drip(writer: asyncio.StreamWriter) -> None:
    await without_end(writer, http(JPEG), b"\0", pause_s=0.01)


def test_a_download_without_end_is_dropped_at_the_limit(authority: trustme.CA, ca: Path) -> None:
    with pytest.raises(TooLarge, match="over 1000000 bytes"):
        fetch_route(authority, ca, endless, max_bytes=1_000_000)
    with pytest.raises(UrlUnreachable):
        fetch_route(authority, ca, endless_header)


def test_what_is_fetched_is_held_against_the_budget_while_it_comes(authority: trustme.CA, ca: Path) -> None:
    memory = Memory(5_000_000)
    memory.take(1_000_000)  # somebody else's
    with pytest.raises(Overloaded, match="max_held_bytes") as raised:
        fetch_route(authority, ca, endless, room=Share(memory).add)
    assert raised.value.retry_after_s > 0
    del raised
    gc.collect()
    assert memory.held == 1_000_000


def test_a_server_that_drips_is_left_when_the_time_is_over(authority: trustme.CA, ca: Path) -> None:
    with pytest.raises(UrlUnreachable, match=r"within 0.3 s"):
        fetch_route(authority, ca, drip, patience_s=0.3)
    with pytest.raises(UrlUnreachable, match=r"within 0.2 s"):
        fetch_route(authority, ca, drip, timeout_s=0.2)


def test_a_certificate_of_a_stranger_or_of_another_host_is_not_trusted(authority: trustme.CA, ca: Path) -> None:
    async def run() -> None:
        async with (
            serving(trustme.CA()) as strange,
            serving(authority) as site,
            fetching([*strange.allowed(), *site.allowed("other.example")], ca=ca) as fetcher,
        ):
            for url in (strange.url("/"), site.url("/", "other.example")):
                with pytest.raises(UrlUnreachable, match="no certificate that can be verified"):
                    await fetcher.fetch(url, None)
            assert (strange.requests, site.requests) == ([], [])

    asyncio.run(run())


def test_a_server_that_is_not_there_is_told_without_its_address(ca: Path) -> None:
    with socket.create_server((INTERNET, 0)) as taken:
        port = taken.getsockname()[1]

    async def run() -> None:
        async with fetching([f"pictures.example:{port}"], ca=ca) as fetcher:
            with pytest.raises(UrlUnreachable) as raised:
                await fetcher.fetch(f"https://pictures.example:{port}/", None)
            assert str(raised.value) == "the URL's server cannot be reached over TLS"

    asyncio.run(run())


def test_a_host_that_is_not_on_the_list_is_not_even_looked_up() -> None:
    async def run() -> None:
        async with fetching(["pictures.example", "Elsewhere.example:8443"], lookup=nobody_asks) as fetcher:
            for url in (
                "https://other.example/",
                "https://sub.pictures.example/",
                "https://pictures.example:8443/",
                "https://elsewhere.example/",
            ):
                with pytest.raises(UrlRefused, match="not among those"):
                    await fetcher.fetch(url, None)

    asyncio.run(run())


@pytest.mark.parametrize("entry", ["", "*", "10.0.0.1", "localhost", "https://pictures.example", "pictures.example:x"])
def test_an_allowed_host_that_can_be_none_is_told_at_the_start(entry: str) -> None:
    with pytest.raises(ValueError, match="an allowed host must be a full DNS name"):
        UrlFetcher([entry])


@pytest.mark.parametrize(
    "name", ["jpeg", "jpg", "JPEG", "png", "webp", "gif", "x-ms-bmp", "png;charset=utf-8", "svg+xml"]
)
def test_a_data_url_is_its_picture(name: str) -> None:
    async def run() -> bytes:
        async with fetching(lookup=nobody_asks) as fetcher:
            return await fetcher.fetch(f"Data:image/{name};base64,{base64.b64encode(PNG).decode()}", None)

    assert asyncio.run(run()) == PNG


PICTURES = {kind: encoded(kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF")}


@pytest.mark.parametrize("kind", PICTURES)
def test_a_data_url_takes_every_format_in_every_notation(kind: str) -> None:
    picture = PICTURES[kind] + b"\xfb\xff\xfe"  # in URL-safe base64 - and _
    head = f"data:image/{kind.lower()};charset=utf-8;base64,"
    plain, safe = base64.b64encode(picture).decode(), base64.urlsafe_b64encode(picture).decode()
    assert "-" in safe or "_" in safe
    notations = (
        plain,
        safe,
        safe.rstrip("="),
        plain.replace("=", "%3D"),
        *(mark.join(plain[at : at + 76] for at in range(0, len(plain), 76)) for mark in ("\n", "\r\n", "%0A", " ")),
    )
    for notation in notations:
        assert decode_data_url(head + notation, max_bytes=1 << 20) == picture


def test_a_data_url_may_be_as_large_as_a_download_and_no_larger() -> None:
    for length in range(200, 204):
        picture = PNG.ljust(length, b"x")
        url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        assert decode_data_url(url, max_bytes=length) == picture
        with pytest.raises(TooLarge, match=f"over {length - 1} bytes"):
            decode_data_url(url, max_bytes=length - 1)


@pytest.mark.parametrize("mark", ["", "\n", "%0A", "%0d%0a"])
def test_a_data_url_of_several_chunks_is_decoded_whole(mark: str) -> None:
    picture = PNG + bytes(range(256)) * 9000
    plain = base64.b64encode(picture).decode()
    for line in (75, 76):
        lines = mark.join(plain[at : at + line] for at in range(0, len(plain), line))
        assert decode_data_url("data:image/png;base64," + lines, max_bytes=1 << 24) == picture


def test_a_data_url_that_goes_on_after_its_padding_is_refused() -> None:
    text = base64.b64encode(PNG + bytes(1 << 20)).decode()
    assert text.endswith("=")
    for more in ("AAAA", text):
        with pytest.raises(UrlRefused, match="not whole base64"):
            decode_data_url("data:image/png;base64," + text + "\n" * (1 << 20) + more, max_bytes=1 << 24)


@pytest.mark.parametrize("body", ["A" * 12_000_000, "A " * 6_000_000, "A%0a" * 3_000_000, " " * 12_000_000])
def test_a_long_data_url_leaves_the_event_loop_running_and_the_memory_small(body: str) -> None:
    url = "data:image/png;base64," + body

    async def longest_pause_s() -> float:
        longest, before = 0.0, time.perf_counter()
        decoding = asyncio.create_task(asyncio.to_thread(decode_data_url, url, 1 << 24))
        while not decoding.done():
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, before = max(longest, now - before), now
        with pytest.raises(UrlRefused):
            decoding.result()
        return longest

    # On a machine that is busy with other work one run may be interrupted, but hardly three of them.
    assert min(asyncio.run(longest_pause_s()) for _ in range(3)) < 0.25
    tracemalloc.start()
    try:
        with pytest.raises(UrlRefused):
            decode_data_url(url, 1 << 24)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * len(url) + (8 << 20)
    finally:
        tracemalloc.stop()


def test_without_the_extra_the_server_imports_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sidecar.urls.fetcher, sys; print('aiohttp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(UrlsUnavailable, match=r"pip install 'epd-encoder-sidecar\[urls\]'"):
        UrlFetcher()
