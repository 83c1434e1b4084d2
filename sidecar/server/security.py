"""Who may call: TLS with certificates that are renewed while the server runs, and bearer tokens.

Certificates, keys and tokens are read again at each new connection and each call: they are a few kilobytes, and no time
stamp can then hide a change. What came in their place is checked first. Certificates that will not do leave those read before
in use. Tokens fail closed: a token file that is gone, unreadable, broken or empty lets nobody in, after two seconds in which
somebody may still be writing it. It is also looked at once a second, so that those seconds do not begin only with the next call.
The log says why, once.

Tokens are asked of each call as it begins: one that is withdrawn does not end a stream under way. They are worth no more
than the wire is private: without TLS, only for unix sockets, loopback, and networks that encrypt by themselves.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import ssl
import stat
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from sidecar.credentials import CredentialsError, named_tokens
from sidecar.server.certificate_dates import complaint_about

logger = logging.getLogger(__name__)

_Value = TypeVar("_Value")
_Content = tuple[bytes, ...]
_Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]

_MOST_BYTES = 1 << 20
# An editor that writes in place leaves a file empty or cut for a moment.
_GRACE_S = 2.0
_WATCH_S = 1.0
# Kubernetes' probes cannot send tokens, and learn nothing but that the server is there.
_HEALTH = "/grpc.health.v1.Health/"
# What a token file's mode may not have: reading and writing by others, and writing by the group. The group may read it:
# that is how Kubernetes hands a secret (defaultMode: 0440) to a user who is not root (fsGroup). Its default of 0644 is
# refused like any other: whoever gets into the container as anybody would have the tokens.
_LOOSE = stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP


class SecurityError(ValueError):
    """Certificates, keys or tokens that will not do. The message names the flag, and never a secret."""


def server_credentials(cert: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """TLS for `add_secure_port`; several ports may share it.

    Args:
        cert: PEM file of the server's certificate and what leads from it to its authority (--tls-cert).
        key: PEM file of its key, not encrypted (--tls-key).
        client_ca: PEM file of authorities; callers must then have a certificate of one of them (--tls-client-ca).

    Raises:
        SecurityError: if a file cannot be read, is no PEM of its kind, or key and certificate are not a pair.
    """
    paths = {"--tls-cert": cert, "--tls-key": key} | ({"--tls-client-ca": client_ca} if client_ca else {})

    def read() -> _Content:
        return tuple(_read(path, flag) for flag, path in paths.items())

    configuration = _Reloaded("TLS certificates", read, lambda content: _configuration(content, paths))
    # Never None for "as before": each port that shares the credentials would be told of a change only if it came first.
    return grpc.dynamic_ssl_server_credentials(
        configuration.value(), configuration.value, require_client_authentication=client_ca is not None
    )


class BearerTokens:
    """The tokens of a file, one a line as `name:token` or `token`; `#` begins a comment. Two lines may share a name, so
    that a token can be replaced before the old one goes.

    Raises:
        SecurityError: if the file cannot be read, is open to other users, or holds no tokens.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        nobody: list[tuple[str, bytes]] = []
        self._tokens = _Reloaded(
            "tokens",
            lambda: (_read_guarded(path),),
            lambda content: _tokens(path, content),
            revoked=_Revoked(nobody, _GRACE_S, clock),
        )

    def name_of(self, metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
        """Whose token a call's metadata carry; None if there is no token, a wrong one, or more than one."""
        given = [value for key, value in metadata if key.lower() == "authorization"]
        if len(given) != 1 or not isinstance(given[0], str):
            return None
        scheme, _, token = given[0].partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = _digest(token.strip())
        found = None
        for name, known in self._tokens.value():  # all of them: the time taken says nothing of where a match is
            if hmac.compare_digest(digest, known):
                found = name
        return found

    async def watch(self) -> None:
        """Read the file once a second, until cancelled: tokens withdrawn while nobody calls are not let in later."""
        while True:
            await asyncio.sleep(_WATCH_S)
            await asyncio.to_thread(self._tokens.value)


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Answers calls without a token of this server's with UNAUTHENTICATED, unread; grpc.health.v1 needs none."""

    def __init__(self, tokens: BearerTokens, refused: Callable[[str, str], None] = lambda method, peer: None) -> None:
        """`refused` is told of each call that is turned away: its method and the caller's address."""
        self._tokens = tokens
        self._refused = refused

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:  # a handler, or None for a method that is not known
        metadata: Any = handler_call_details.invocation_metadata
        if handler_call_details.method.startswith(_HEALTH) or self._tokens.name_of(metadata) is not None:
            return await continuation(handler_call_details)
        # Of all kinds of handler this one alone waits for no message, and callers of every kind understand its answer.
        method = handler_call_details.method

        async def refuse(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> None:
            self._refused(method, context.peer())
            sent = any(key == "authorization" for key, _ in context.invocation_metadata() or ())
            message = "the token is not one of this server's" if sent else "this server wants a token with each call"
            advice = "send the metadata `authorization: Bearer TOKEN` (commands: --token-file)"
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, f"{message}: {advice}")

        return grpc.stream_stream_rpc_method_handler(refuse)


@dataclass(frozen=True, slots=True)
class _Revoked(Generic[_Value]):
    """What is in use in the place of a value whose files will not do for `grace_s` seconds."""

    value: _Value
    grace_s: float
    clock: Callable[[], float]


class _Reloaded(Generic[_Value]):
    """A value made from files, and made again when they change. Files that will not do leave it as it was, or revoke it.

    `read` and `make` raise `SecurityError`, which reaches the caller the first time only.
    """

    def __init__(
        self,
        what: str,
        read: Callable[[], _Content],
        make: Callable[[_Content], _Value],
        revoked: _Revoked[_Value] | None = None,
    ) -> None:
        self._what, self._read, self._make, self._revoked = what, read, make, revoked
        self._lock = threading.Lock()  # gRPC asks from threads of its own
        self._content = read()
        self._value = make(self._content)
        self._fault: SecurityError | None = None  # of the content
        self._complaint = ""
        self._failing_since: float | None = None
        self._is_revoked = False

    def value(self) -> _Value:
        with self._lock:
            try:
                self._refresh()
            except SecurityError as error:
                return self._failing(error)
            if self._complaint:
                logger.info("the %s can be read again and are in use", self._what)
            self._complaint, self._failing_since, self._is_revoked = "", None, False
            return self._value

    def _refresh(self) -> None:
        content = self._read()
        if content != self._content:
            self._content, self._fault = content, None
            try:
                self._value = self._make(content)
            except SecurityError as error:
                self._fault = error  # what will not do need not be tried again
            else:
                logger.info("new %s taken up", self._what)
        if self._fault is not None:
            raise self._fault

    def _failing(self, error: SecurityError) -> _Value:
        if str(error) != self._complaint:
            self._complaint = str(error)
            until = "stay in use" if self._revoked is None else f"stay in use for at most {self._revoked.grace_s:g} s"
            if not self._is_revoked:
                logger.warning("the %s read before %s: %s", self._what, until, error)
        if self._revoked is None:
            return self._value
        now = self._revoked.clock()
        if self._failing_since is None:
            self._failing_since = now
        if now - self._failing_since < self._revoked.grace_s:
            return self._value
        if not self._is_revoked:
            self._is_revoked = True
            logger.error(
                "the %s read before are revoked and nobody gets in until this is mended: %s", self._what, error
            )
        return self._revoked.value


def _configuration(content: _Content, flags: Iterable[str]) -> grpc.ServerCertificateConfiguration:
    """What gRPC would otherwise find wrong only while it shakes hands, and tell nobody. `flags`: where each content is from."""
    cert, key, *client_ca = content
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if b"-----BEGIN CERTIFICATE-----" not in cert:
        raise SecurityError("--tls-cert: the file holds no certificate in PEM")
    if b"PRIVATE KEY-----" not in key:
        raise SecurityError("--tls-key: the file holds no private key in PEM")
    try:
        with _as_file(cert + b"\n" + key) as path:
            context.load_cert_chain(path, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise SecurityError("--tls-cert and --tls-key: the key is not the certificate's") from error
        raise SecurityError("--tls-cert or --tls-key: the file is damaged, or of a kind that TLS cannot use") from error
    if client_ca:
        try:
            with _as_file(client_ca[0]) as path:
                context.load_verify_locations(path)
        except ssl.SSLError as error:
            raise SecurityError("--tls-client-ca: the file holds no certificates in PEM") from error
    for flag, pem in zip(flags, content, strict=True):
        if (complaint := complaint_about(pem)) is not None:
            logger.warning("%s: %s", flag, complaint)
    return grpc.ssl_server_certificate_configuration([(key, cert)], *client_ca)


def _no_password() -> str:
    raise SecurityError("--tls-key: the key is encrypted; the server cannot ask for its password")


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """Memory under a path: ssl reads certificates from files alone, and those on disk may have changed meanwhile."""
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{descriptor}"


def _tokens(path: Path, content: _Content) -> list[tuple[str, bytes]]:
    """Names and hashes: a token itself is in memory no longer than it takes to read it."""
    try:
        tokens = [(name, _digest(token)) for name, token in named_tokens(content[0].decode())]
    except (CredentialsError, UnicodeDecodeError) as error:
        reason = error if isinstance(error, CredentialsError) else "it is not UTF-8"
        raise SecurityError(f"--token-file: {path}: {reason}") from None  # the cause would show the line
    if not tokens:
        raise SecurityError(f"--token-file: {path} holds no token, so that nobody could call")
    return tokens


def _digest(token: str) -> bytes:
    """Of equal length for all tokens, which a comparison in constant time needs."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _read_guarded(path: Path) -> bytes:
    return _read(path, "--token-file", forbidden=_LOOSE)


def _read(path: Path, flag: str, forbidden: int = 0) -> bytes:
    try:
        # Not blocking: opening a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(found):
                raise SecurityError(f"{flag}: {path} cannot be read: it is not a regular file")
            mode = stat.S_IMODE(found)
            if mode & forbidden:
                raise SecurityError(
                    f"{flag}: {path} is open to other users (mode {mode:04o}): chmod 0600 or 0440; in Kubernetes, "
                    "defaultMode: 0440 of the secret's volume and fsGroup of the pod"
                )
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                content = file.read(_MOST_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SecurityError(f"{flag}: {path} cannot be read: {error.strerror}") from error
    if len(content) > _MOST_BYTES:
        raise SecurityError(f"{flag}: {path} has over {_MOST_BYTES} bytes")
    return content
