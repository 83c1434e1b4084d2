"""Items handed over one by one to several sidecars: real ones, and real ones behind a server that spoils their answers."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from faulty_sidecar import Fault, FaultySidecar
from servers import Server, StartServer
from slow_sidecar import SlowSidecar, start

from sidecar import fleet as fleet_module
from sidecar.client import AsyncEncoderClient, ClientError, Embedding, EncodeError, ProtocolError
from sidecar.credentials import client_credentials
from sidecar.errors import Overloaded, fault_of
from sidecar.fleet import AddressError, Fleet
from sidecar.items import Item, image_item, rgb_image_item
from sidecar.pb import encoder_pb2 as pb

pytestmark = pytest.mark.soak

# Long enough for any machine: a test that waits this long has failed.
LONG_S = 60.0
FLAGS = ("--threads", "1", "--precision", "f32", "--embedding-dtype", "float32", "--warm-up-seconds", "0")

_numbers = itertools.count()


class NamedSidecar(FaultySidecar):
    """Says who it is, as real ones do. While it is `full`, it takes nothing and wants to be asked again after `rest_s`."""

    def __init__(self, upstream: str, name: str) -> None:
        self._who = (("epd-server", name),)
        self.full = False
        self.rest_s = LONG_S
        super().__init__(upstream)

    def Info(self, request: pb.InfoRequest, context: grpc.ServicerContext) -> pb.InfoResponse:
        context.set_trailing_metadata(self._who)
        return super().Info(request, context)

    def Encode(self, request: pb.EncodeRequest, context: grpc.ServicerContext) -> Iterator[pb.EncodeResponse]:
        context.set_trailing_metadata(self._who)
        if self.full:
            self.calls.append("Encode")
            return iter([pb.EncodeResponse(error=fault_of(Overloaded("full", self.rest_s)).status())])
        return super().Encode(request, context)

    @property
    def asked(self) -> int:
        return self.calls.count("Encode")


@pytest.fixture
def three(server: Server) -> Iterator[list[NamedSidecar]]:
    with ExitStack() as stack:
        yield [stack.enter_context(NamedSidecar(server.address, name)) for name in "abc"]


def item(key: str = "") -> Item:
    """One that no sidecar has seen."""
    pixels = np.random.default_rng(next(_numbers)).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    return rgb_image_item(pixels, key=key)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, LONG_S))


def addresses(sidecars: list[NamedSidecar]) -> list[str]:
    return [sidecar.address for sidecar in sidecars]


@contextmanager
def names(monkeypatch: pytest.MonkeyPatch, **hosts: Any) -> Iterator[dict[str, Any]]:
    """A resolver that knows NAME.test by what the keyword NAME holds at the moment."""
    resolve = socket.getaddrinfo

    def resolved(host: str, port: int, *rest: Any, **options: Any) -> list[Any]:
        known = hosts.get(host.removesuffix(".test")) if host.endswith(".test") else [host]
        if isinstance(known, OSError) or not known:
            raise known or socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [entry for each in known for entry in resolve(each, port, *rest, **options)]

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", resolved)
        patched.setattr(fleet_module, "_LOOK_AGAIN_S", 0.05)
        yield hosts


def test_an_embedding_is_what_the_sidecar_itself_gives(server: Server) -> None:
    async def go() -> None:
        wanted = item()
        async with Fleet([server.address]) as fleet, AsyncEncoderClient(server.address) as client:
            embedding = await fleet.encode(wanted, LONG_S)
            (direct,) = await client.encode([wanted], LONG_S)
        assert isinstance(direct, Embedding)
        assert np.array_equal(embedding.data, direct.data) and embedding.grid == direct.grid
        assert embedding.fingerprint == direct.fingerprint and embedding.path is None and not embedding.lease

    run(go())


def test_a_unix_socket_is_an_address_too(server: Server) -> None:
    async def go() -> None:
        async with Fleet([f"unix:{server.socket}"]) as fleet:
            assert (await fleet.encode(item(), LONG_S)).tokens == 6
            assert list(await fleet.infos(LONG_S)) == [f"unix:{server.socket}"]

    run(go())


def test_many_at_a_time_are_spread(three: list[NamedSidecar]) -> None:
    async def go() -> None:
        async with Fleet(addresses(three)) as fleet:
            await asyncio.gather(*(fleet.infos(LONG_S) for _ in range(3)))
            await asyncio.gather(*(fleet.encode(item(), LONG_S) for _ in range(60)))
        assert sum(sidecar.asked for sidecar in three) == 60

    run(go())


def test_who_has_refused_an_item_is_not_asked_again_while_another_may_take_it(three: list[NamedSidecar]) -> None:
    busy, broken, good = three
    busy.always, broken.always = Fault.BUSY, Fault.INTERNAL
    refused: Counter[str] = Counter()

    async def go() -> None:
        async with Fleet(addresses(three), refused=lambda code: refused.update([code])) as fleet:
            while not (busy.asked and broken.asked):
                await fleet.encode(item(), LONG_S)
                assert busy.asked <= good.asked and broken.asked <= good.asked

    run(go())
    assert refused == {"RESOURCE_EXHAUSTED": busy.asked, "INTERNAL": broken.asked}


def test_who_told_one_item_when_to_come_back_is_not_handed_the_next(three: list[NamedSidecar]) -> None:
    """One ask in each call is gRPC's own choice."""
    for sidecar in three:
        sidecar.full = True

    async def go() -> None:
        async with Fleet(addresses(three)) as fleet:
            for asked in (3, 4, 5):
                with pytest.raises(EncodeError, match="RESOURCE_EXHAUSTED"):
                    await fleet.encode(item(), LONG_S / 2)
                assert sum(sidecar.asked for sidecar in three) == asked

    run(go())


def test_when_all_are_busy_it_waits_until_one_is_not(three: list[NamedSidecar]) -> None:
    for sidecar in three:
        sidecar.answer(Fault.BUSY, Fault.BUSY)

    async def go() -> None:
        async with Fleet(addresses(three)) as fleet:
            assert (await fleet.encode(item(), LONG_S)).tokens == 6

    run(go())


@pytest.mark.parametrize("count", [1, 3], ids=["alone", "several"])
def test_sidecars_that_stay_busy_are_given_up_in_time(three: list[NamedSidecar], count: int) -> None:
    for sidecar in three:
        sidecar.always = Fault.BUSY

    async def go() -> None:
        async with Fleet(addresses(three[:count])) as fleet:
            with pytest.raises(EncodeError, match="RESOURCE_EXHAUSTED: too much is under way") as caught:
                await fleet.encode(item(), 0.5)
            assert caught.value.retry_delay_s == pytest.approx(0.1)

    run(go())


def test_an_item_at_fault_is_asked_for_once(three: list[NamedSidecar]) -> None:
    async def go() -> None:
        async with Fleet(addresses(three)) as fleet:
            with pytest.raises(EncodeError, match="INVALID_ARGUMENT"):
                await fleet.encode(image_item(b"no picture"), LONG_S)

    run(go())
    assert sum(sidecar.asked for sidecar in three) == 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_item_that_breaks_each_sidecar_does_not_go_round_for_ever(three: list[NamedSidecar], count: int) -> None:
    for sidecar in three:
        sidecar.always = Fault.INTERNAL

    async def go() -> None:
        async with Fleet(addresses(three[:count])) as fleet:
            with pytest.raises(EncodeError, match="INTERNAL: something broke"):
                await fleet.encode(item(), LONG_S)

    run(go())
    assert sum(sidecar.asked for sidecar in three) == 3


def test_an_answer_that_breaks_the_contract_is_had_elsewhere(three: list[NamedSidecar]) -> None:
    three[0].always = three[1].always = Fault.FILE_CUT_SHORT

    async def go() -> None:
        async with Fleet(addresses(three)) as fleet:
            while not (three[0].asked and three[1].asked):
                await fleet.encode(item(), LONG_S)
        async with Fleet(addresses(three[:1])) as fleet:
            with pytest.raises(ProtocolError, match="the reply ended before"):
                await fleet.encode(item(), LONG_S)

    run(go())


def test_one_that_will_not_do_is_not_asked_again_while_another_may_take_it(three: list[NamedSidecar]) -> None:
    """One of them serves another model; gRPC's own choice may fall on it in each round, however busy the right one is."""
    wrong, right = three[:2]
    wrong.always = Fault.OTHER_FINGERPRINT

    class OtherModelError(ClientError):
        pass

    async def go() -> None:
        async with Fleet(addresses([wrong, right])) as fleet:
            ours = (await fleet.infos(LONG_S))[right.address.replace("localhost", "127.0.0.1")].fingerprint

            def check(embedding: Embedding) -> None:
                if embedding.fingerprint != ours:
                    raise OtherModelError

            right.full, right.rest_s = True, 0.01
            asking = [asyncio.create_task(fleet.encode(item(), LONG_S, check=check)) for _ in range(20)]
            while right.asked < 40:
                await asyncio.sleep(0.01)
            right.full = False
            assert {embedding.fingerprint for embedding in await asyncio.gather(*asking)} == {ours}
            assert wrong.asked >= 20
        async with Fleet(addresses([wrong])) as fleet:
            wrong.calls.clear()
            with pytest.raises(OtherModelError):
                await fleet.encode(item(), LONG_S, check=check)
            assert wrong.asked == 3

    run(go())


def test_who_wants_to_be_asked_again_at_once_is_not_asked_a_thousand_times(three: list[NamedSidecar]) -> None:
    for sidecar in three:
        sidecar.full, sidecar.rest_s = True, 0.0

    async def go() -> None:
        async with Fleet(addresses(three)) as fleet:
            with pytest.raises(EncodeError, match="RESOURCE_EXHAUSTED"):
                await fleet.encode(item(), 2.0)

    run(go())
    assert sum(sidecar.asked for sidecar in three) <= 3 * 7  # after 0.05, 0.1, 0.2, 0.4, 0.8 s, and one more


def test_one_that_is_taken_from_the_name_while_it_is_met_costs_no_item(
    three: list[NamedSidecar], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It accepts and never speaks, as a frozen process does."""
    busy = three[0]
    busy.full, busy.rest_s = True, 0.1
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        both = tuple(sorted([busy.address, f"127.0.0.1:{frozen.getsockname()[1]}"]))
        found = [both]

        async def go() -> None:
            async with Fleet(["encoders.test:1"]) as fleet:
                monkeypatch.setattr(fleet_module, "_LOOK_AGAIN_S", 0.05)
                monkeypatch.setattr(fleet._addresses, "look_up", look_up)
                asking = [asyncio.create_task(fleet.encode(item(), LONG_S)) for _ in range(8)]
                while busy.asked < 8:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.2)
                found[0] = (busy.address,)
                await asyncio.sleep(0.2)
                busy.full = False
                assert [embedding.tokens for embedding in await asyncio.gather(*asking)] == [6] * 8

        async def look_up() -> tuple[str, ...]:
            return found[0]

        run(go())


def test_one_that_hangs_leaves_time_for_another(three: list[NamedSidecar]) -> None:
    three[0].always = Fault.HANG

    async def go() -> None:
        async with Fleet(addresses(three)) as fleet:
            while not three[0].asked:
                await asyncio.gather(*(fleet.encode(item(), 4.0) for _ in range(6)))

    run(go())
    assert three[0].left.wait(LONG_S)


def test_alone_it_has_all_the_time_there_is(three: list[NamedSidecar]) -> None:
    three[0].always = Fault.HANG

    async def go() -> None:
        async with Fleet(addresses(three[:1])) as fleet:
            with pytest.raises(EncodeError, match="DEADLINE_EXCEEDED"):
                await fleet.encode(item(), 0.5)

    run(go())
    assert three[0].asked == 1


def test_one_that_dies_under_way_loses_nothing(three: list[NamedSidecar]) -> None:
    three[0].answer(Fault.DIE)

    async def go() -> None:
        async with Fleet(addresses(three)) as fleet:
            await asyncio.gather(*(fleet.encode(item(), LONG_S) for _ in range(30)))

    run(go())


def test_while_nobody_is_there_it_waits_as_long_as_it_is_told(three: list[NamedSidecar]) -> None:
    for sidecar in three:
        sidecar.die().wait()

    async def go() -> None:
        async with Fleet(addresses(three)) as fleet:
            with pytest.raises(EncodeError, match="UNAVAILABLE"):
                await fleet.encode(item(), LONG_S, unreachable_s=0.3)
            waiting = asyncio.create_task(fleet.encode(item(), LONG_S))
            await asyncio.sleep(0.1)
            three[2].revive()
            assert (await waiting).tokens == 6

    run(go())


def test_one_that_drains_gets_no_more_calls(server: Server, start_server: StartServer) -> None:
    draining = start_server(*FLAGS)
    refused: Counter[str] = Counter()

    async def go() -> None:
        store = None
        async with AsyncEncoderClient(draining.address) as client:
            store = (await client.info(LONG_S)).store.directory
        async with (
            Fleet([server.address, draining.address], refused=lambda code: refused.update([code])) as fleet,
            AsyncEncoderClient(draining.address, store=store) as holder,
        ):
            (held,) = await holder.encode([item("held")], LONG_S, hold=True)
            assert isinstance(held, Embedding)
            draining.process.terminate()  # it lives on until the lease goes back
            told = -1
            while told != refused.total():
                told = refused.total()
                for _ in range(20):
                    await fleet.encode(item(), LONG_S)
            assert draining.process.poll() is None
            await holder.release([held.lease], LONG_S)

    run(go())
    assert draining.process.wait(LONG_S) == 0


def test_what_is_added_under_a_name_gets_work_and_what_is_taken_away_gets_none(
    toy_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(toy_artifact, tmp_path / "first", 1, 0)
    port = first.address.rpartition(":")[2]
    second = start(toy_artifact, tmp_path / "second", 2, 0, listen=f"127.0.0.2:{port}")
    second.wait_ready()

    async def go(hosts: dict[str, Any]) -> None:
        async def until_by(sidecar: SlowSidecar) -> None:
            while (await fleet.encode(item(), LONG_S)).lane.device != sidecar.device:
                pass

        async with Fleet([f"dns:///encoders.test:{port}"]) as fleet:
            await until_by(first)
            hosts["encoders"] = ["127.0.0.1", "127.0.0.2"]
            await until_by(second)
            assert list(await fleet.infos(LONG_S)) == [f"127.0.0.1:{port}", f"127.0.0.2:{port}"]
            first.end()
            await asyncio.gather(*(fleet.encode(item(), LONG_S) for _ in range(20)))
            hosts["encoders"] = ["127.0.0.2"]
            while len(await fleet.infos(LONG_S)) > 1:
                await asyncio.sleep(0.01)
            hosts["encoders"] = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            await asyncio.sleep(0.2)  # it is looked up again a few times
            await fleet.encode(item(), LONG_S)

    try:
        with names(monkeypatch, encoders=["127.0.0.1"]) as hosts:
            run(go(hosts))
    finally:
        first.end()
        second.end()


def test_a_name_that_is_not_known_yet_is_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    port = server.address.rpartition(":")[2]

    async def go(hosts: dict[str, Any]) -> None:
        async with Fleet([f"encoders.test:{port}"]) as fleet:
            with pytest.raises(EncodeError, match="UNAVAILABLE: encoders.test cannot be looked up"):
                await fleet.encode(item(), LONG_S, unreachable_s=0.2)
            waiting = asyncio.create_task(fleet.encode(item(), LONG_S))
            await asyncio.sleep(0.1)
            hosts["encoders"] = ["127.0.0.1"]
            assert (await waiting).tokens == 6

    with names(monkeypatch, encoders=[]) as hosts:
        run(go(hosts))


def test_each_sidecar_tells_of_itself_and_a_dead_one_why_not(three: list[NamedSidecar]) -> None:
    three[1].die().wait()

    async def go() -> None:
        async with Fleet(addresses(three)) as fleet:
            infos = await fleet.infos(LONG_S)
        assert list(infos) == sorted(addresses(three))
        for number, sidecar in enumerate(three):
            info = infos[sidecar.address]
            if number == 1:
                assert isinstance(info, EncodeError) and info.code == "UNAVAILABLE"
            else:
                assert isinstance(info, pb.InfoResponse) and info.fingerprint

    run(go())


def test_closing_ends_what_is_under_way(three: list[NamedSidecar]) -> None:
    three[0].always = Fault.HANG

    async def go() -> None:
        fleet = Fleet(addresses(three[:1]))
        asking = asyncio.create_task(fleet.encode(item(), LONG_S))
        assert await asyncio.to_thread(three[0].hanging.wait, LONG_S)
        await fleet.close()
        with pytest.raises(EncodeError, match="CANCELLED: the fleet was closed"):
            await asking
        with pytest.raises(EncodeError, match="CANCELLED: the fleet is closed"):
            await fleet.encode(item(), LONG_S)

    run(go())


def test_who_goes_away_is_gone_at_the_sidecar_too(three: list[NamedSidecar]) -> None:
    three[0].always = Fault.HANG

    async def go() -> None:
        async with Fleet(addresses(three[:1])) as fleet:
            asking = asyncio.create_task(fleet.encode(item(), LONG_S))
            assert await asyncio.to_thread(three[0].hanging.wait, LONG_S)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            assert await asyncio.to_thread(three[0].left.wait, LONG_S)

    run(go())


def test_what_is_no_address_is_refused_at_once() -> None:
    with pytest.raises(AddressError, match="'encoder' is not host:port"):
        Fleet(["encoder"])


def test_over_tls_the_name_is_checked_and_the_token_goes_along(start_server: StartServer, tmp_path: Path) -> None:
    """The certificate is for the name, and gRPC is given the number that it stands for."""
    authority, token = trustme.CA(), "a-token-of-many-characters"
    issued = authority.issue_cert("localhost")
    ca, cert, key, tokens = (tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem", "tokens"))
    authority.cert_pem.write_to_path(ca)
    cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    tokens.write_text(token)
    tokens.chmod(0o600)
    flags = ("--tls-cert", str(cert), "--tls-key", str(key), "--token-file", str(tokens))
    ports = [start_server(*FLAGS, *flags).address.rpartition(":")[2] for _ in range(2)]
    credentials = client_credentials(ca, None, None)

    async def go() -> None:
        named = [f"localhost:{port}" for port in ports]
        async with Fleet(named, credentials=credentials, token=token) as fleet:
            assert (await fleet.encode(item(), LONG_S)).tokens == 6
            infos = await fleet.infos(LONG_S)
            assert len(infos) == 2 and all(isinstance(info, pb.InfoResponse) for info in infos.values())
        async with Fleet(named, credentials=credentials) as fleet:
            with pytest.raises(EncodeError, match="UNAUTHENTICATED"):
                await fleet.encode(item(), LONG_S)
        async with Fleet([f"127.0.0.1:{port}" for port in ports], credentials=credentials, token=token) as fleet:
            with pytest.raises(EncodeError, match="UNAVAILABLE"):
                await fleet.encode(item(), LONG_S, unreachable_s=0.5)

    run(go())
