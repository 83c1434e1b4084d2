"""A small Hugging Face hub on 127.0.0.1, serving one model repository out of a directory, and keeping a log.

It speaks what huggingface_hub needs to resolve and download files, and behaves as the real one does: configuration comes
from the hub itself, weights by a redirect to a storage host (a second port, so another origin). It can misbehave on demand.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

REPO = "acme/toy-vl"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Request(NamedTuple):
    """One request as it was answered: `host` is "hub" or "storage", `first` the range's first byte, None for no range."""

    host: str
    method: str
    file: str
    first: int | None
    sent: int
    token: str | None


@dataclass
class Mirror:
    directory: Path
    url: str = ""
    storage_url: str = ""
    requests: list[Request] = field(default_factory=list)
    serves_ranges: bool = True
    gated: bool = False
    token: str | None = None  # without it the repository is not shown
    fails_with: int | None = None  # status of every answer of the hub
    drops_after: int | None = None  # bytes of a body after which the storage closes the connection, once

    def stored(self) -> list[Request]:
        """What the storage host was asked for."""
        return [request for request in self.requests if request.host == "storage"]

    def sent(self, file: str) -> set[int]:
        """All bytes of a file that left the storage host, by position."""
        return {
            position
            for request in self.stored()
            if request.file == file
            for position in range(request.first or 0, (request.first or 0) + request.sent)
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    mirror: Mirror
    host: str

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        mirror = self.mirror
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        file, first, sent = unquote(self.path), None, 0
        if self.host == "storage":
            file = file.lstrip("/")
            first, sent = self._send_file(file)
        else:
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", file)
            file = found[3] if found else file
            if mirror.fails_with:
                self._send_error(mirror.fails_with, "")
            elif not found or found[1] != REPO or (mirror.token and token != mirror.token):
                self._send_error(401, "RepoNotFound")
            elif mirror.gated:
                self._send_error(403, "GatedRepo")
            elif found[2] not in ("main", COMMIT):
                self._send_error(404, "RevisionNotFound")
            elif not (mirror.directory / file).is_file():
                self._send_error(404, "EntryNotFound")
            elif file.endswith(".safetensors"):
                self._redirect(file)
            else:
                first, sent = self._send_file(file)
        mirror.requests.append(Request(self.host, self.command, file, first, sent, token))

    def _send_error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _redirect(self, file: str) -> None:
        self.send_response(302)
        self.send_header("Location", f"{self.mirror.storage_url}/{file}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Etag", f'"{sha1(file.encode()).hexdigest()}"')
        self.send_header("X-Linked-Size", str((self.mirror.directory / file).stat().st_size))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_file(self, file: str) -> tuple[int | None, int]:
        """Send a file or the range asked for. Returns the range's first byte and the bytes of the body."""
        mirror = self.mirror
        content = (mirror.directory / file).read_bytes()
        size = len(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        first = None
        if asked and mirror.serves_ranges:
            first, last = int(asked[1]), min(int(asked[2]), size - 1)
            content = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{sha1(file.encode()).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "HEAD":
            return first, 0
        if self.host == "storage" and mirror.drops_after is not None and len(content) > mirror.drops_after:
            content, mirror.drops_after = content[: mirror.drops_after], None
            self.close_connection = True
        try:
            self.wfile.write(content)
        except ConnectionError:  # a client that hangs up on a body it did not ask for
            return first, 0
        return first, len(content)


@contextmanager
def hub_mirror(directory: Path) -> Iterator[Mirror]:
    """Serve `directory` as the repository REPO at COMMIT."""
    mirror = Mirror(directory)
    servers = []
    for host in ("hub", "storage"):
        handler = type("Handler", (_Handler,), {"mirror": mirror, "host": host})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
    mirror.url, mirror.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield mirror
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
