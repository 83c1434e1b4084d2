"""One or many sidecars, for whoever hands items over one by one: each is encoded, or has an error that says why not, in time.

    async with Fleet(["dns:///encoders.default.svc:50051"]) as fleet:
        embedding = await fleet.encode(image_item(jpeg), timeout_s=20)

gRPC picks the sidecar: among those that say SERVING, by the rate that each reports. One that refuses an item, or is lost with it,
costs the item that ask alone: it goes at once to one that has not refused it. Only when all have does it wait, until the first of
them wants to be asked again. An item that is at fault itself is asked for once.

A sidecar that says nothing has half of the time that is left, where there is another. No item is at two sidecars at a time on
purpose: asks that take long are those of a busy fleet, and doubling them would make it busier still.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

import grpc

from sidecar.addresses import AddressError, Addresses, UnknownNameError
from sidecar.credentials import bearer_metadata
from sidecar.fleet_errand import Errand
from sidecar.fleet_ways import Access, Way
from sidecar.items import Item
from sidecar.pb import encoder_pb2
from sidecar.replies import DEFAULT_MAX_EMBEDDING_BYTES, ClientError, Embedding, EncodeError

__all__ = ["AddressError", "Fleet"]

logger = logging.getLogger(__name__)

# What is added under a name gets work so soon.
_LOOK_AGAIN_S = 5.0
# Who does not even say who it is by then gets no item that another has refused.
_KNOCK_S = 1.0


class Fleet:
    """To be used on one event loop; any number of items at a time.

    Args:
        addresses: `host:port` or `dns:///name:port`, one or several, each standing for all addresses that the name has now and
            later; or one `unix:/path`.
        credentials: for TLS; None is plaintext. Every sidecar must have a certificate for the first address' host.
        token: goes out with each call, for servers that have --token-file.
        max_embedding_bytes: a reply that announces more is not taken.
        refused: told the code of each ask that gave no embedding, or `PROTOCOL`, whatever became of the item.

    Raises:
        AddressError: if an address is none. A ValueError.
        CredentialsError: if `token` cannot be one.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        max_embedding_bytes: int = DEFAULT_MAX_EMBEDDING_BYTES,
        refused: Callable[[str], None] = lambda code: None,
    ) -> None:
        self._addresses = Addresses([addresses] if isinstance(addresses, str) else addresses)
        metadata = (*bearer_metadata(token), ("epd-client", f"{os.getpid()}-{id(self):x}"))
        self._access = Access(credentials, metadata, self._addresses.host, max_embedding_bytes)
        self._refused = refused
        self._any: Way | None = None  # over all of `_single`
        self._single: dict[str, Way] = {}
        self._resting: dict[str, float] = {}  # server → when it wants to be asked again, by time.monotonic
        self._looking = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None
        self._closed = False

    async def encode(
        self,
        item: Item,
        timeout_s: float,
        *,
        unreachable_s: float | None = None,
        check: Callable[[Embedding], None] = lambda embedding: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Embedding:
        """One item's embedding, inline, from whichever sidecar takes it.

        Args:
            timeout_s: for all of it, waiting and asking again included.
            unreachable_s: how long that may go on while all are UNAVAILABLE; None: all of it.
            check: raises a ClientError for an embedding that will not do. Its sidecar has refused the item then, as far as this
                round goes, and another is asked.

        Raises:
            EncodeError: the item is at fault; or it could not be had in time, with what was said last.
            ClientError: sidecars answered, and none of the answers is to be trusted.
        """
        errand = Errand(timeout_s, unreachable_s, clock, check)
        while True:
            if (embedding := await self._go_round(item, errand)) is not None:
                return embedding
            await errand.wait()

    async def infos(self, timeout_s: float) -> dict[str, encoder_pb2.InfoResponse | ClientError]:
        """What each sidecar that there is now says of itself, or why it says nothing, by numeric address.

        Raises:
            EncodeError: UNAVAILABLE, if no address is known.
        """
        ends = time.monotonic() + timeout_s
        single = await self._ways(timeout_s)

        async def ask(way: Way) -> encoder_pb2.InfoResponse | ClientError:
            try:
                return await way.info(max(0.001, ends - time.monotonic()))
            except ClientError as error:
                return error

        return dict(zip(single, await asyncio.gather(*map(ask, single.values())), strict=True))

    async def addresses(self, timeout_s: float) -> list[str]:
        """Of each sidecar that there is now, numeric.

        Raises:
            EncodeError: UNAVAILABLE, if none is known.
        """
        return list(await self._ways(timeout_s))

    @property
    def host(self) -> str | None:
        """What the sidecars' certificates are for; None for a unix socket."""
        return self._access.host

    async def close(self) -> None:
        """End what is under way, with CANCELLED, and close every connection."""
        self._closed = True
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        ways = [*self._single.values(), *([self._any] if self._any else [])]
        await asyncio.gather(*(way.close() for way in ways))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _go_round(self, item: Item, errand: Errand) -> Embedding | None:
        """Ask until one has answered, or all have refused.

        Raises:
            ClientError: if no further ask can end better.
        """
        errand.begin_round()
        try:
            single = dict(await self._ways(errand.left_s()))
        except EncodeError as error:
            errand.note(error)
            return None
        assert self._any is not None
        way, several = self._any, len(single) > 1
        for _ in range(len(single)):
            if (embedding := await self._ask(way, item, errand, alone=not several)) is not None:
                return embedding
            # If the item was lost with its sidecar, gRPC knows by now, and picks another.
            if not errand.lost:
                break
        else:
            return None
        while several and (address := await self._next(single, errand)) is not None:
            way = single.pop(address)
            if (embedding := await self._ask(way, item, errand, alone=not single)) is not None:
                return embedding
        return None

    async def _ask(self, way: Way, item: Item, errand: Errand, *, alone: bool) -> Embedding | None:
        """`alone`: there is no other sidecar that the item could still go to."""
        left_s = errand.left_s()
        patience_s = left_s if alone else left_s / 2
        try:
            # The sidecar is told of all the time that is left: given less, it might refuse what it can do.
            async with asyncio.timeout(None if alone else patience_s):
                outcome, server = await way.ask(item, left_s)
        except TimeoutError:
            outcome, server = EncodeError("DEADLINE_EXCEEDED", f"no answer within {patience_s:.1f} s"), ""
            for each in self._single.values():  # which of them it was is not known
                each.server = None
        if isinstance(outcome, Embedding):
            try:
                errand.check(outcome)
            except ClientError as error:
                outcome = error
            else:
                self._resting.pop(server, None)
                return outcome
        self._refused(outcome.code if isinstance(outcome, EncodeError) else "PROTOCOL")
        if server and isinstance(outcome, EncodeError) and outcome.retry_delay_s is not None:
            self._resting[server] = time.monotonic() + outcome.retry_delay_s
        errand.note(outcome, server)
        return None

    async def _next(self, single: dict[str, Way], errand: Errand) -> str | None:
        """The address of one that may still take the item; those that will not are dropped from `single`."""
        limit_s = min(_KNOCK_S, errand.left_s() / 4)
        await asyncio.gather(*(way.meet(limit_s) for way in single.values() if way.server is None))
        for address, way in list(single.items()):
            rest_s = self._resting.get(way.server or "", 0.0) - time.monotonic()
            if rest_s > 0:
                errand.may_come_back_in(rest_s)
            if rest_s > 0 or way.server is None or errand.was_refused_by(way.server):
                del single[address]
        return random.choice(list(single)) if single else None

    async def _ways(self, timeout_s: float) -> dict[str, Way]:
        """One to each sidecar that there is now.

        Raises:
            EncodeError: if the addresses cannot be looked up.
        """
        if self._closed:
            raise EncodeError("CANCELLED", "the fleet is closed")
        if self._any is None:
            try:
                async with asyncio.timeout(timeout_s), self._looking:
                    if self._any is None:
                        await self._look()
            except UnknownNameError as error:  # it may be known soon
                raise EncodeError("UNAVAILABLE", str(error)) from error
            except AddressError as error:
                raise EncodeError("FAILED_PRECONDITION", str(error)) from error
            except TimeoutError as error:
                raise EncodeError("UNAVAILABLE", f"the addresses were not looked up in {timeout_s:.1f} s") from error
        if self._addresses.may_change and self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        return self._single

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_AGAIN_S)
            try:
                await self._look()
            except AddressError as error:
                logger.debug("the sidecars stay as they were: %s", error)

    async def _look(self) -> None:
        found = await self._addresses.look_up()
        if self._closed or found == tuple(self._single):
            return
        before = self._any, self._single
        self._single = {
            address: before[1].get(address) or Way(self._access, [address], balanced=False) for address in found
        }
        self._any = Way(self._access, found, balanced=True)
        if before[0] is not None:
            before[0].retire()
            logger.info("the sidecars are now %s", ", ".join(found))
        for address in before[1].keys() - self._single.keys():
            before[1][address].retire()
