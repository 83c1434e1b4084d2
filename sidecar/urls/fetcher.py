"""A picture's URL → its bytes. The URL comes from strangers, and so does whatever answers it.

The rules that keep a stranger from reaching into this server's own network:

- The host is a full DNS name: no address in any notation, no user name, no port that was not allowed (`url_forms`).
- A name that has any address outside the public internet is refused, and the connection is made to the very addresses
  that were judged: a name that changes its mind afterwards changes nothing (`addresses`).
- Every redirect is a new URL under the same rules.

Proxies and credentials of the environment are left alone, cookies are dropped. Needs the extra [urls]: without it this
module can be imported, and a `UrlFetcher` cannot be made.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sidecar.errors import TooLarge, UrlRefused, UrlUnreachable
from sidecar.urls.addresses import Lookup, PublicResolver, is_public
from sidecar.urls.forms import (
    HTTPS_PORT,
    LONGEST_SIGNATURE_BYTES,
    TAKEN,
    Target,
    check_signature,
    decode_data_url,
    is_data_url,
    parse_authority,
    parse_https,
)

if TYPE_CHECKING:
    import aiohttp
    from aiohttp.abc import AbstractResolver

# Downloads, and look-ups, at a time; the others wait within their own timeouts.
_MOST_CONNECTIONS = 16
_LOOKUP_THREADS = 8

_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_MAY_PASS_LATER = frozenset((408, 425, 429))
_PICTURE_TYPES = frozenset(
    f"image/{kind}" for kind in ("jpeg", "jpg", "png", "webp", "gif", "avif", "bmp", "x-ms-bmp", "tiff")
)
# What a storage says that was told nothing; the bytes decide then. aiohttp gives the first one where there is no header.
_UNTOLD_TYPES = frozenset(("application/octet-stream", "binary/octet-stream"))
_HEADERS = {
    "Accept": ", ".join(sorted(_PICTURE_TYPES)),
    "Accept-Encoding": "identity",
    "User-Agent": "epd-encoder-sidecar",
}


class UrlsUnavailable(RuntimeError):
    """This installation cannot fetch URLs."""


class UrlFetcher:
    """Fetches pictures. Make it inside the loop that uses it, and `close` it there.

    Args:
        allowed_hosts: the only ones to fetch from, each `name` or `name:port`; none means any public host at port 443. An
            allowed host must have public addresses too.
        max_bytes: of one picture.
        timeout_s: for one picture, from the look-up to the last byte, redirects included.
        max_redirects: that are followed for one picture.
        ca: a PEM file of certificate authorities to trust instead of the system's.
        lookup, may_connect: how names are looked up and addresses judged; tests let loopback stand in for the internet.

    Raises:
        UrlsUnavailable: if the extra [urls] is not installed.
        ValueError: if one of `allowed_hosts` is none.
        OSError: if `ca` cannot be read.
    """

    def __init__(
        self,
        allowed_hosts: Collection[str] = (),
        *,
        max_bytes: int = 64_000_000,
        timeout_s: float = 30.0,
        max_redirects: int = 3,
        ca: Path | None = None,
        lookup: Lookup | None = None,
        may_connect: Callable[[str], bool] = is_public,
    ) -> None:
        try:
            import aiohttp
        except ImportError as error:
            raise UrlsUnavailable("fetching URLs needs aiohttp: pip install 'epd-encoder-sidecar[urls]'") from error
        self._allowed = frozenset(map(_allowed, allowed_hosts))
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._max_redirects = max_redirects
        tls = ssl.create_default_context(cafile=ca)
        # It has the methods; the class to derive from is only there with the extra.
        resolver = cast("AbstractResolver", PublicResolver(lookup or self._system_lookup, may_connect))
        # Threads of their own: names whose servers never answer must not hold up the rest of this process.
        self._threads = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="lookup")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=_MOST_CONNECTIONS,
                resolver=resolver,
                use_dns_cache=False,
                ssl=tls,
            ),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=_HEADERS,
            timeout=aiohttp.ClientTimeout(total=None),  # `fetch` has one for everything
            trust_env=False,
        )

    async def fetch(
        self, url: str, timeout_s: float | None = None, room: Callable[[int], None] = lambda size: None
    ) -> bytes:
        """The picture's bytes as they lie there; no more than their signature was looked at.

        Args:
            timeout_s: the caller's own limit; the lower one holds.
            room: is told of bytes before they are held; what it raises ends the fetch.

        Raises:
            UrlRefused: if the URL, a redirect of it, or what is there breaks a rule.
            TooLarge: if the picture has over `max_bytes`.
            UrlUnreachable: if its server does not give it, or not in time.
        """
        if is_data_url(url):
            room(min(len(url) // 4 * 3, self._max_bytes))
            return await asyncio.to_thread(decode_data_url, url, self._max_bytes)
        limit_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        try:
            async with asyncio.timeout(limit_s):
                return await self._follow(parse_https(url), room)
        except TimeoutError as error:
            raise UrlUnreachable(f"the URL's server did not send the picture within {limit_s:g} s") from error

    async def close(self) -> None:
        """Drop all connections; no fetch may be under way."""
        await self._session.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _follow(self, target: Target, room: Callable[[int], None]) -> bytes:
        import aiohttp

        for _ in range(self._max_redirects + 1):
            self._check_allowed(target)
            try:
                answer = await self._get(target, room)
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise UrlUnreachable(f"the URL's server {_what_failed(error)}") from error
            if isinstance(answer, bytes):
                return answer
            target = target.redirected(answer)
        raise UrlRefused(f"the URL redirects more than {self._max_redirects} times")

    def _check_allowed(self, target: Target) -> None:
        if self._allowed:
            if (target.host, target.port) not in self._allowed:
                raise UrlRefused("the URL's host and port are not among those that this server fetches from")
        elif target.port != HTTPS_PORT:
            raise UrlRefused(f"the URL's port must be {HTTPS_PORT}, got {target.port}")

    async def _get(self, target: Target, room: Callable[[int], None]) -> bytes | str:
        """The picture, or the Location of a redirect."""
        from yarl import URL

        # From checked parts: another reader of the whole URL might find another host in it.
        url = URL.build(
            scheme="https",
            host=target.host,
            port=target.port,
            path=target.path,
            query_string=target.query,
            encoded=True,
        )
        async with self._session.get(url, allow_redirects=False) as response:
            if response.status in _REDIRECTS and "Location" in response.headers:
                return response.headers["Location"]
            _check_head(response)
            return await self._body(response, room)

    async def _body(self, response: aiohttp.ClientResponse, room: Callable[[int], None]) -> bytes:
        body = bytearray()
        judged = False
        async for chunk in response.content.iter_any():
            room(len(chunk))
            body += chunk
            if len(body) > self._max_bytes:  # counted as it comes, whatever Content-Length says
                raise TooLarge(f"the URL's picture has over {self._max_bytes} bytes, the limit")
            if not judged and len(body) >= LONGEST_SIGNATURE_BYTES:
                check_signature(body)
                judged = True
        check_signature(body)
        return bytes(body)

    async def _system_lookup(self, host: str) -> list[str]:
        # The dot makes the name absolute: a cluster's search domains are not tried on it.
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(f"{host}.", None, type=socket.SOCK_STREAM)
        )
        return [str(sockaddr[0]) for *_, sockaddr in found]


def _allowed(entry: str) -> tuple[str, int]:
    try:
        return parse_authority(entry)
    except UrlRefused as error:
        raise ValueError(f"an allowed host must be a full DNS name, or name:port, got {entry!r}") from error


def _check_head(response: aiohttp.ClientResponse) -> None:
    status = response.status
    if status != 200:
        kind = UrlUnreachable if status >= 500 or status in _MAY_PASS_LATER else UrlRefused
        raise kind(f"the URL's server answered with HTTP status {status} instead of the picture")
    if any(coding.strip().lower() != "identity" for coding in response.headers.getall("Content-Encoding", ())):
        raise UrlRefused("the URL's server sent the picture compressed, which was not asked for")
    if response.content_type not in _PICTURE_TYPES | _UNTOLD_TYPES:
        raise UrlRefused(f"the URL does not lead to a {TAKEN}: its server says that it is of another type")


def _what_failed(error: Exception) -> str:
    """In our words: aiohttp's would tell addresses."""
    import aiohttp

    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "has no certificate that can be verified"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "cannot be reached over TLS"
    return "broke off its answer, or it is no HTTP"
