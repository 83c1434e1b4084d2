"""A small Hugging Face hub on 127.0.0.1, serving one model repository out of a directory, and keeping a log.

It speaks what huggingface_hub needs to resolve and download files, and behaves as the real one does: configuration
comes from the hub itself, weights by a redirect to a storage host (a second port, so another origin). It can misbehave
on demand.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

REPO = "acme/toy-vl"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Request(NamedTuple):
    """One request as it was answered. `host` is "hub" or "storage"; `first` is the range's first byte, if any."""

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
    confuses_ranges: bool = False
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
        mirror, path = self.mirror, unquote(self.path)
        if self.host == "storage":
            self._send_file(path.lstrip("/"))
            return
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo, revision, file = found.groups() if found else ("", "", path)
        if path == f"/api/models/{REPO}/revision/{COMMIT}":
            self._send_listing()
        elif mirror.fails_with:
            self._send_head(file, mirror.fails_with)
        elif repo != REPO or (mirror.token and self._token() != mirror.token):
            self._send_head(file, 401, {"X-Error-Code": "RepoNotFound"})
        elif mirror.gated:
            self._send_head(file, 403, {"X-Error-Code": "GatedRepo"})
        elif revision not in ("main", COMMIT):
            self._send_head(file, 404, {"X-Error-Code": "RevisionNotFound"})
        elif not (mirror.directory / file).is_file():
            self._send_head(file, 404, {"X-Error-Code": "EntryNotFound"})
        elif file.endswith(".safetensors"):
            size = (mirror.directory / file).stat().st_size
            linked = {"X-Linked-Etag": etag(file), "X-Linked-Size": str(size)}
            self._send_head(file, 302, {"Location": f"{mirror.storage_url}/{file}", **linked})
        else:
            self._send_file(file)

    def _send_listing(self) -> None:
        names = sorted(path.name for path in self.mirror.directory.iterdir())
        body = json.dumps({"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}).encode()
        self._send_head("", 200, {"Content-Type": "application/json"}, body=len(body))
        self.wfile.write(body)

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _send_head(
        self, file: str, status: int, headers: dict[str, str] | None = None, first: int | None = None, body: int = 0
    ) -> None:
        # Logged before it is sent: a client that has its answer may look at the log.
        sent = 0 if self.command == "HEAD" else body
        if self.host == "storage" and self.mirror.drops_after is not None:
            sent = min(sent, self.mirror.drops_after)
        self.mirror.requests.append(Request(self.host, self.command, file, first, sent, self._token()))
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(body), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_file(self, file: str) -> None:
        """Send a file, or the range of it that is asked for."""
        mirror = self.mirror
        content = (mirror.directory / file).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if asked and mirror.serves_ranges:
            first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
            first += mirror.confuses_ranges
            span = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            content = content[first : last + 1]
            self._send_head(file, 206, {"ETag": etag(file), **span}, first, len(content))
        else:
            self._send_head(file, 200, {"ETag": etag(file)}, body=len(content))
        if self.command == "HEAD":
            return
        if self.host == "storage" and mirror.drops_after is not None and len(content) > mirror.drops_after:
            content, mirror.drops_after = content[: mirror.drops_after], None
            self.close_connection = True
        with suppress(ConnectionError):  # a client that hangs up on a body it did not ask for
            self.wfile.write(content)


def etag(file: str) -> str:
    return f'"{sha1(file.encode()).hexdigest()}"'


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
