"""The HTTP side: /metrics for Prometheus, a status page for people, /healthz for probes.

It runs in threads of its own beside the gRPC server's event loop and knows nothing of requests or embeddings. A connection
carries one request, in so many seconds, or is cut; only so many are open at once, and a new one takes the place of the oldest of
the address that holds most, so that a probe is answered whoever else holds connections open. Nothing that a caller sends is
echoed, no path is ever looked up in a file system, and which Host was asked for does not matter: everybody sees the same.
"""

from __future__ import annotations

import logging
import re
import socket
import socketserver
import sys
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from typing import Any, Self

from prometheus_client.exposition import choose_encoder

from sidecar.monitoring.metrics import Metrics
from sidecar.monitoring.overview import overview

logger = logging.getLogger(__name__)

# The page holds one connection at a time, so does a scraper, and each for milliseconds.
MOST_CONNECTIONS = 16
# From accepting a connection to its end, however slowly the other side sends or reads.
CONNECTION_S = 10.0

_POLL_S = 0.25
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Connection": "close",
}
_NOTHING_ALLOWED = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True, slots=True)
class _Reply:
    body: bytes
    content_type: str
    status: HTTPStatus = HTTPStatus.OK
    policy: str = _NOTHING_ALLOWED


class Monitor:
    """Serves until closed."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, args=(_POLL_S,), name="monitor", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, listen: str, metrics: Metrics, healthy: Callable[[], bool]) -> Self:
        """Listen on `host:port` (`[host]:port` for IPv6; port 0 takes a free one).

        `healthy` is called from any thread and must return at once.

        Raises:
            ValueError: if `listen` is no such address.
            OSError: if it cannot be listened on.
        """
        host, port = parse_address(listen)
        try:
            family, *_, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
            )[0]
            return cls(_Server(family, address, metrics, healthy))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise OSError(error.errno, f"cannot serve metrics on {listen}: {reason}") from error

    @property
    def address(self) -> str:
        """`host:port` as it can be put into a URL, with the port that was really taken."""
        host, port = self._server.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def close(self) -> None:
        """Stop listening; connections that are open are cut. Takes up to a quarter of a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def parse_address(listen: str) -> tuple[str, int]:
    """`host:port` or `[IPv6]:port` as (host, port).

    Raises:
        ValueError: if it is neither.
    """
    matched = re.fullmatch(r"(?:\[(?P<v6>[0-9a-fA-F:.%\w]+)\]|(?P<host>[\w.-]+)):(?P<port>\d{1,5})", listen, re.ASCII)
    if not matched or int(matched["port"]) > 65_535:
        raise ValueError(f"must be host:port such as 127.0.0.1:9464 or [::1]:9464, got {listen!r}")
    return matched["v6"] or matched["host"], int(matched["port"])


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True  # a restart need not wait for TIME_WAIT; a living listener still keeps its port
    allow_reuse_port = False
    request_queue_size = 32

    def __init__(
        self, family: socket.AddressFamily, address: Any, metrics: Metrics, healthy: Callable[[], bool]
    ) -> None:
        self.address_family = family
        self.metrics = metrics
        self.healthy = healthy
        self.page, self.page_policy = _page()
        self._open: dict[socket.socket, tuple[str, float]] = {}  # address and deadline; the oldest comes first
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def reply(self, path: str, accept: str) -> _Reply | None:
        """What lies at a path; None where nothing does."""
        if path == "/":
            return _Reply(self.page, "text/html; charset=utf-8", policy=self.page_policy)
        if path == "/status.json":
            return _Reply(overview(self.metrics, healthy=self.healthy()), "application/json")
        if path == "/metrics":
            encode, content_type = _encoder(accept)
            return _Reply(encode(self.metrics.registry), content_type)
        if path == "/healthz":
            healthy = self.healthy()
            status = HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE
            return _Reply(b"ok\n" if healthy else b"not serving\n", "text/plain; charset=utf-8", status)
        return None

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Take every connection, if need be in another's place."""
        with self._lock:
            crowded_out = self._one_too_many() if len(self._open) >= MOST_CONNECTIONS else None
            if crowded_out is not None:
                del self._open[crowded_out]
            self._open[request] = client_address[0], time.monotonic() + CONNECTION_S
        if crowded_out is not None:
            _cut(crowded_out)
        return True

    def _one_too_many(self) -> socket.socket:
        """The oldest connection of the address that holds most."""
        held = Counter(address for address, _ in self._open.values())
        most = max(held.values())
        return next(connection for connection, (address, _) in self._open.items() if held[address] == most)

    def service_actions(self) -> None:
        """Called by `serve_forever` at least every `_POLL_S`. A timeout on each read would let a slow sender go on."""
        now = time.monotonic()
        with self._lock:
            late = [connection for connection, (_, until) in self._open.items() if until < now]
        for connection in late:
            _cut(connection)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        with self._lock:
            living = list(self._open)
        for connection in living:
            _cut(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Callers who went away, or were cut, are nobody's fault."""
        if not isinstance(sys.exception(), OSError):
            logger.exception("a request to the monitor failed")


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = CONNECTION_S

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        try:
            reply = self.server.reply(path, self.headers.get("Accept", ""))
        except Exception:
            logger.exception("the monitor could not answer")
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        if reply is None:
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            self._send(reply)

    do_HEAD = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The base class calls this too, with messages that quote the caller, and with 501 for methods without a `do_`."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self._send(_Reply(f"{status.phrase}\n".encode(), "text/plain; charset=utf-8", status))

    def _send(self, reply: _Reply) -> None:
        self.send_response(reply.status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if reply.status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Security-Policy", reply.policy)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def version_string(self) -> str:
        return "epd-encoder"

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes and probes are not news."""


def _encoder(accept: str) -> tuple[Callable[[Any], bytes], str]:
    """prometheus_client's choice. It quotes the caller's version in the content type and fails on some."""
    try:
        return choose_encoder(" ".join(accept.split()))
    except (TypeError, ValueError):
        return choose_encoder("")


def _page() -> tuple[bytes, str]:
    """The status page, and the policy under which a browser runs nothing in it but its own script and style."""
    page = (files("sidecar.monitoring") / "page.html").read_bytes()

    def hashed(tag: bytes) -> str:
        (content,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        return f"'sha256-{b64encode(sha256(content).digest()).decode()}'"

    allowed = f"script-src {hashed(b'script')}; style-src {hashed(b'style')}; connect-src 'self'; img-src data:"
    return page, f"{_NOTHING_ALLOWED}; {allowed}"


def _cut(connection: socket.socket) -> None:
    """Whoever reads from it or writes to it in another thread returns at once."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is gone already
