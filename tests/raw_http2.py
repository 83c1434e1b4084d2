"""A caller that sends as much of a message as it likes and waits: HTTP/2 written by hand, since no gRPC client would do that."""

from __future__ import annotations

import socket
import struct
import time
from contextlib import suppress

_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GO_AWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_WINDOW_BYTES, _FRAME_BYTES = 65_535, 16_384


def send_half(
    host: str, port: int, method: str, *, declared: int, sent: int, seconds: float, token: str = ""
) -> tuple[int, bool]:
    """Announce a message of `declared` bytes and send `sent` of it, as far as the server lets it.

    Returns:
        How many bytes were sent, and whether the server ended the stream within `seconds`.
    """
    return _call(host, port, method, b"\0" + struct.pack(">I", declared), sent, seconds, token)


def send_whole(host: str, port: int, method: str, message: bytes, *, seconds: float) -> bool:
    """Send a message, and go away as soon as there is an answer, whatever it is. Returns whether there was one."""
    return _call(host, port, method, b"\0" + struct.pack(">I", len(message)), len(message) + 5, seconds, "", message)[1]


def _call(
    host: str, port: int, method: str, head: bytes, size: int, seconds: float, token: str, message: bytes = b""
) -> tuple[int, bool]:
    with socket.create_connection((host, port)) as connection:
        caller = _Caller(connection, head, message)
        with suppress(OSError):
            caller.begin(method, token)
            caller.run(size, time.monotonic() + seconds)
        return caller.sent, caller.ended


class _Caller:
    def __init__(self, connection: socket.socket, head: bytes, message: bytes) -> None:
        self._head = head
        self._message = memoryview(message)
        self.sent = 0
        self.ended = False
        self._connection = connection
        self._windows = {0: _WINDOW_BYTES, 1: _WINDOW_BYTES}
        self._initial = _WINDOW_BYTES
        self._buffer = b""

    def begin(self, method: str, token: str) -> None:
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": method,
            ":authority": "sidecar",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        if token:
            headers["authorization"] = f"Bearer {token}"
        block = b"".join(b"\0" + _string(name) + _string(value) for name, value in headers.items())
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0, 0, b"")
        self._connection.sendall(preface + _frame(_HEADERS, _END_HEADERS, 1, block))

    def run(self, most: int, until: float) -> None:
        """Send `most` bytes of the head, the message, and zeros."""
        while time.monotonic() < until and not self.ended:
            size = min(self._windows[0], self._windows[1], _FRAME_BYTES, most - self.sent)
            if size > 0:
                start = len(self._head)
                payload = self._head[self.sent :] + bytes(
                    self._message[max(0, self.sent - start) : max(0, self.sent - start + size)]
                )
                last = bool(self._message) and self.sent + size == most
                self._connection.settimeout(5.0)
                self._connection.sendall(_frame(_DATA, _END_STREAM * last, 1, payload[:size].ljust(size, b"\0")))
                self.sent += size
                self._windows[0] -= size
                self._windows[1] -= size
            self._connection.settimeout(0.0001 if size > 0 else 0.1)
            with suppress(TimeoutError, BlockingIOError):
                received = self._connection.recv(1 << 16)
                self.ended = not received
                self._buffer += received
            self._read_frames()

    def _read_frames(self) -> None:
        while len(self._buffer) >= 9:
            end = 9 + int.from_bytes(self._buffer[:3], "big")
            if len(self._buffer) < end:
                return
            kind, flags = self._buffer[3], self._buffer[4]
            stream = int.from_bytes(self._buffer[5:9], "big")
            payload, self._buffer = self._buffer[9:end], self._buffer[end:]
            self._read(kind, flags, stream, payload)

    def _read(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _WINDOW:
            self._windows[stream] += int.from_bytes(payload, "big")
        elif kind == _PING and not flags & _ACK:
            self._connection.sendall(_frame(_PING, _ACK, 0, payload))
        elif kind == _SETTINGS and not flags & _ACK:
            for at in range(0, len(payload), 6):
                name, value = struct.unpack(">HI", payload[at : at + 6])
                if name == 4:  # the initial window of a stream
                    self._windows[1] += value - self._initial
                    self._initial = value
            self._connection.sendall(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind in (_RESET, _GO_AWAY, _DATA) or (kind == _HEADERS and flags & _END_STREAM):
            self.ended = True


def _string(text: str) -> bytes:
    """HPACK's literal, of fewer than 127 bytes (RFC 7541, section 5.2)."""
    return bytes([len(text)]) + text.encode()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload
