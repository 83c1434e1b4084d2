"""What proves who is calling: TLS certificates and bearer tokens, on the caller's side. Imports nothing of the project.

    credentials = client_credentials(ca=Path("ca.pem"), cert=None, key=None, token=None)
    EncoderClient("encoder:50051", credentials=credentials, token=read_token(Path("token")))

A client's `token` goes out as metadata of each call, over TLS and without. gRPC has call credentials for that too, but takes
them over TLS only, and a unix socket or a mesh that encrypts by itself needs tokens as well.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc

LEAST_TOKEN_CHARS = 16

# RFC 6750's b64token, which has no colon.
_TOKEN = re.compile(rf"(?=.{{{LEAST_TOKEN_CHARS},}})[A-Za-z0-9._~+/-]+=*")
_NAME = re.compile(r"[A-Za-z0-9._-]+")


class CredentialsError(ValueError):
    """A certificate, key or token that cannot be used. The message names the flag or the line, and never a secret."""


def client_credentials(
    ca: Path | None, cert: Path | None, key: Path | None, token: str | None = None
) -> grpc.ChannelCredentials:
    """TLS, for a channel to a sidecar that has --tls-cert.

    Args:
        ca: PEM file of the authorities that the server's certificate may come from; None means gRPC's own list.
        cert, key: this client's PEM files, for a server that has --tls-client-ca.
        token: sent with each call of the channel. A client that has a `token` of its own must not have it here too.

    Raises:
        CredentialsError: if a file cannot be read, or one of `cert` and `key` is missing.
    """
    if (cert is None) != (key is None):
        raise CredentialsError("--tls-cert and --tls-key go together; one of them is missing")
    authorities, certificate, secret = _read(ca, "--tls-ca"), _read(cert, "--tls-cert"), _read(key, "--tls-key")
    _check_pem(authorities, certificate, secret)
    credentials = grpc.ssl_channel_credentials(authorities, private_key=secret, certificate_chain=certificate)
    if token is None:
        return credentials
    check_token(token)
    return grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials(token))


def bearer_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """A call's metadata that carry the token, if there is one.

    Raises:
        CredentialsError: if it cannot be a token.
    """
    if token is None:
        return ()
    check_token(token)
    return (("authorization", f"Bearer {token}"),)


def read_token(path: Path) -> str:
    """The first token of a token file, which may be the server's own.

    Raises:
        CredentialsError: if the file cannot be read or holds none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CredentialsError(f"--token-file: {path} cannot be read: {_reason(error)}") from error
    for _, token in named_tokens(text):
        return token
    raise CredentialsError(f"--token-file: {path} holds no token")


def named_tokens(text: str) -> Iterator[tuple[str, str]]:
    """Names and tokens of a token file: lines of `name:token` or `token`, blank lines, and comments after `#`.

    A token without a name is called by its line, as "line 3".

    Raises:
        CredentialsError: if a line is none of these.
    """
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        name, colon, token = entry.rpartition(":")
        name, token = name.strip(), token.strip()
        if colon and not _NAME.fullmatch(name):
            raise CredentialsError(f"line {number}: a name has letters, digits, dots, hyphens and underscores only")
        try:
            check_token(token)
        except CredentialsError as error:
            raise CredentialsError(f"line {number}: {error}") from error
        yield name or f"line {number}", token


def check_token(token: str) -> None:
    """Raises:
    CredentialsError: if it is no token, or too short for one.
    """
    if not _TOKEN.fullmatch(token):
        raise CredentialsError(
            f"a token has at least {LEAST_TOKEN_CHARS} letters, digits and -._~+/ and may end in =; "
            "`openssl rand -hex 32` makes one"
        )


def _read(path: Path | None, flag: str) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise CredentialsError(f"{flag}: {path} cannot be read: {_reason(error)}") from error


def _check_pem(authorities: bytes | None, certificate: bytes | None, key: bytes | None) -> None:
    """gRPC would try again for ever with what is no PEM, and say so in its own log alone."""
    for content, flag, what in (
        (authorities, "--tls-ca", b"CERTIFICATE"),
        (certificate, "--tls-cert", b"CERTIFICATE"),
        (key, "--tls-key", b"PRIVATE KEY"),
    ):
        if content is not None and not re.search(rb"-----BEGIN [A-Z ]*" + what + rb"-----", content):
            raise CredentialsError(f"{flag}: the file holds no {what.decode().lower()} in PEM")
    if authorities is not None:
        try:
            ssl.create_default_context(cadata=authorities.decode("ascii", "replace"))
        except ssl.SSLError as error:
            raise CredentialsError("--tls-ca: the file holds a certificate that cannot be read") from error


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
