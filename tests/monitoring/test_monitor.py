"""The HTTP side: what it serves, to whom, and what nobody can make it do."""

from __future__ import annotations

import http.client
import json
import re
import socket
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256

import pytest
from engine_fakes import engine_status

from sidecar.monitoring import monitor as module
from sidecar.monitoring.metrics import Metrics
from sidecar.monitoring.monitor import MOST_CONNECTIONS, Monitor, parse_address

PATHS = ("/", "/metrics", "/status.json", "/healthz")


class Site:
    """A monitor that can be asked."""

    def __init__(self) -> None:
        self.healthy = True
        self.metrics = Metrics()
        self.metrics.watch(engine_status)
        self.monitor = Monitor.start("127.0.0.1:0", self.metrics, lambda: self.healthy)

    @property
    def endpoint(self) -> tuple[str, int]:
        host, _, port = self.monitor.address.rpartition(":")
        return host, int(port)

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection(*self.endpoint, timeout=30)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer, body

    def send(self, data: bytes) -> bytes:
        """Raw bytes; everything that comes back until the other side ends."""
        with socket.create_connection(self.endpoint, timeout=30) as connection:
            connection.sendall(data)
            return _until_the_end(connection)


def _until_the_end(connection: socket.socket) -> bytes:
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionResetError:
        pass  # it ended with something of ours unread
    return received


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.monitor.close()


@pytest.mark.parametrize("path", PATHS)
def test_answers_get_and_head_alike(site: Site, path: str) -> None:
    got, body = site.ask(path)
    head, nothing = site.ask(path, "HEAD")
    assert got.status == head.status == 200
    assert int(got.headers["Content-Length"]) == len(body) > 0
    assert nothing == b""
    assert head.headers["Content-Type"] == got.headers["Content-Type"]


def test_metrics_come_as_the_scraper_prefers(site: Site) -> None:
    plain, body = site.ask("/metrics")
    assert plain.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert b"epd_encoder_queue_patches 5120.0" in body
    openmetrics, body = site.ask("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert openmetrics.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")


@pytest.mark.parametrize(
    "accept",
    [
        *("application/openmetrics-text; version=x", "application/openmetrics-text; version=99.0.0"),
        *("text/plain; version=1.0.0.0.0", "text/plain; version=-1.٣.0"),
        "text/plain; version=1.0.0; escaping=" + "y" * 1000,
        "application/openmetrics-text; version=1.0.0\r\n Set-Cookie: taken=1",
        ";;;,,,===",
    ],
)
def test_no_accept_header_breaks_the_metrics(site: Site, accept: str) -> None:
    head, _, body = site.send(b"GET /metrics HTTP/1.1\r\nAccept: " + accept.encode() + b"\r\n\r\n").partition(
        b"\r\n\r\n"
    )
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nSet-Cookie" not in head and b"\n Set-Cookie" not in head
    assert b"epd_encoder_queue_patches" in body


def test_the_status_is_json(site: Site) -> None:
    answer, body = site.ask("/status.json")
    document = json.loads(body)
    assert answer.headers["Content-Type"] == "application/json"
    assert document["healthy"] is True
    assert document["engine"]["lanes"][0]["device"].startswith("Intel")


def test_healthz_is_for_probes(site: Site) -> None:
    assert site.ask("/healthz")[0].status == 200
    site.healthy = False
    answer, body = site.ask("/healthz")
    assert (answer.status, body) == (503, b"not serving\n")


@pytest.mark.parametrize(
    "path",
    [
        *("/nothing", "/page.html", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd"),
        *("/metrics/", "/status.json/..", "http://127.0.0.1/etc/passwd", "/<script>alert(1)</script>"),
    ],
)
def test_other_paths_are_not_found_and_not_quoted(site: Site, path: str) -> None:
    answer = site.send(b"GET " + path.encode() + b" HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert answer.endswith(b"\r\n\r\nNot Found\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "<b>"])
def test_other_methods_are_not_allowed(site: Site, method: str) -> None:
    answer = site.send(f"{method} / HTTP/1.1\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b"\r\nAllow: GET, HEAD\r\n" in answer
    assert b"<b>" not in answer


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\xff\xfe\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n",
    ],
    ids=["binary", "version", "no path", "long path", "many headers", "tls"],
)
def test_garbage_does_no_harm(site: Site, garbage: bytes) -> None:
    answer = site.send(garbage)
    assert b" 200 " not in answer.partition(b"\r\n")[0]
    assert site.ask("/healthz")[0].status == 200


@pytest.mark.parametrize("path", [*PATHS, "/nothing"])
def test_browsers_are_told_to_be_careful(site: Site, path: str) -> None:
    headers = site.ask(path)[0].headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"


def test_the_policy_names_the_pages_own_script_and_style(site: Site) -> None:
    answer, page = site.ask("/")
    for tag in (b"script", b"style"):
        found = re.search(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        assert found
        expected = f"{tag.decode()}-src 'sha256-{b64encode(sha256(found[1]).digest()).decode()}'"
        assert expected in answer.headers["Content-Security-Policy"]


def test_the_host_header_does_not_matter(site: Site) -> None:
    assert site.ask("/metrics", Host="elsewhere.example")[0].status == 200


def test_who_sends_slowly_is_cut(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECTION_S", 0.2)
    monkeypatch.setattr(module._Handler, "timeout", None)  # which a sender of a byte now and then never meets
    with socket.create_connection(site.endpoint, timeout=30) as slow:
        slow.sendall(b"GET /metrics HTTP/1.1\r\nX-")
        assert _until_the_end(slow) == b""
    assert site.ask("/healthz")[0].status == 200


def test_probes_are_answered_while_others_hold_connections_open(site: Site) -> None:
    """Senders of a byte now and then, more of them than there may be connections."""
    held = []
    try:
        for _ in range(MOST_CONNECTIONS + 8):
            held.append(socket.create_connection(site.endpoint, timeout=30))
            held[-1].sendall(b"GET /metrics HTTP/1.1\r\nX-")
        for _ in range(20):
            assert site.ask("/healthz")[0].status == 200
        assert _until_the_end(held[0]) == b"", "the oldest had to go"
    finally:
        for connection in held:
            connection.close()


def test_an_address_that_holds_most_connections_loses_its_own(site: Site) -> None:
    """Not those of a scraper elsewhere, however old."""
    with socket.create_connection(site.endpoint, 30, ("127.0.0.2", 0)) as scraper:
        scraper.sendall(b"GET /healthz HTTP/1.1\r\n")
        held = [socket.create_connection(site.endpoint, timeout=30) for _ in range(3 * MOST_CONNECTIONS)]
        try:
            assert _until_the_end(held[0]) == b"", "by now the others are more than there may be"
            scraper.sendall(b"\r\n")
            assert _until_the_end(scraper).startswith(b"HTTP/1.1 200 ")
        finally:
            for connection in held:
                connection.close()


def test_a_fault_inside_is_an_error_without_details(site: Site) -> None:
    def broken() -> None:
        raise RuntimeError("/secret/path")

    site.metrics.watch(broken)  # type: ignore[arg-type]
    for path in ("/metrics", "/status.json"):
        answer, body = site.ask(path)
        assert (answer.status, body) == (500, b"Internal Server Error\n")
    assert site.ask("/healthz")[0].status == 200


def test_a_port_in_use_is_said_clearly(site: Site) -> None:
    with pytest.raises(OSError, match=f"cannot serve metrics on {site.monitor.address}: address already in use"):
        Monitor.start(site.monitor.address, Metrics(), lambda: True)


def test_an_address_that_is_not_ours_is_said_clearly() -> None:
    with pytest.raises(OSError, match="cannot serve metrics on 192.0.2.1:0: cannot assign requested address"):
        Monitor.start("192.0.2.1:0", Metrics(), lambda: True)


def test_the_port_is_free_again_after_the_end(site: Site) -> None:
    address = site.monitor.address
    site.monitor.close()
    again = Monitor.start(address, Metrics(), lambda: True)
    again.close()
    with pytest.raises(ConnectionRefusedError):
        site.ask("/healthz")


def test_serves_ipv6_where_there_is_any() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        monitor = Monitor.start("[::1]:0", Metrics(), lambda: True)
    except OSError:
        pytest.skip("no IPv6 loopback here")
    host, _, port = monitor.address.rpartition(":")
    assert host == "[::1]"
    connection = http.client.HTTPConnection("::1", int(port), timeout=30)
    connection.request("GET", "/healthz")
    assert connection.getresponse().status == 200
    connection.close()
    monitor.close()


@pytest.mark.parametrize(
    ("listen", "expected"),
    [("127.0.0.1:9464", ("127.0.0.1", 9464)), ("[::]:0", ("::", 0)), ("localhost:80", ("localhost", 80))],
)
def test_addresses_that_can_be(listen: str, expected: tuple[str, int]) -> None:
    assert parse_address(listen) == expected


@pytest.mark.parametrize(
    "listen", ["", "9464", ":9464", "127.0.0.1", "127.0.0.1:x", "::1:9464", "h:65536", "a b:1", "h:1\n"]
)
def test_addresses_that_cannot_be(listen: str) -> None:
    with pytest.raises(ValueError, match=r"must be host:port such as 127\.0\.0\.1:9464"):
        parse_address(listen)
