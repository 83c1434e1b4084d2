"""Embeddings left in the store: mapped on the same host, fetched from anywhere, held by leases, read by stock vLLM."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from pictures import encoded, picture
from safetensors.torch import load_file
from servers import Server

from sidecar.client import AsyncEncoderClient, Embedding, EncoderClient, ItemError, ProtocolError
from sidecar.items import Item, image_item, rgb_image_item
from sidecar.pb import encoder_pb2 as pb

StartServer = Callable[..., Server]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shm") / "store"


@pytest.fixture(scope="module")
def storing(start_server: StartServer, store: Path) -> Server:
    return start_server("--store", str(store), "--lease-seconds", "30", "--threads", "1")


@pytest.fixture
def mapped(storing: Server, store: Path) -> Iterator[EncoderClient]:
    with EncoderClient(storing.address, store=store) as client:
        yield client


@pytest.fixture
def sent(storing: Server) -> Iterator[EncoderClient]:
    with storing.client() as client:
        yield client


def item(seed: int, key: str = "") -> Item:
    return image_item(encoded(picture(56, 84, seed)), key=key)


def one(results: list[Embedding | ItemError]) -> Embedding:
    (result,) = results
    assert isinstance(result, Embedding), result
    return result


def test_on_the_same_host_an_embedding_is_mapped(mapped: EncoderClient, sent: EncoderClient, store: Path) -> None:
    embedding, wire = one(mapped.encode([item(1)])), one(sent.encode([item(1)]))
    assert embedding.path == store / embedding.key / "encoder_cache.safetensors"
    assert wire.path is None and wire.cached
    assert np.array_equal(embedding.data, wire.data)
    assert not embedding.data.flags.writeable  # what others read, nobody may change


def test_what_is_mapped_stays_readable_when_the_store_drops_it(mapped: EncoderClient) -> None:
    embedding = one(mapped.encode([item(2)]))
    before = embedding.data.copy()
    assert embedding.path is not None
    embedding.path.unlink()
    assert np.array_equal(embedding.data, before)
    again = one(mapped.encode([item(2)]))  # and is encoded anew
    assert not again.cached and np.array_equal(again.data, before)


def test_stock_vllm_finds_it_under_its_own_key(mapped: EncoderClient, store: Path) -> None:
    """As ECExampleConnector looks: <shared_storage_path>/<mm_hash>/encoder_cache.safetensors, tensor ec_cache."""
    embedding = one(mapped.encode([item(3, key="5f2c77aa-mm_hash.1")]))
    tensor = load_file(store / "5f2c77aa-mm_hash.1" / "encoder_cache.safetensors")["ec_cache"]
    assert tensor.dtype == torch.bfloat16
    assert np.array_equal(tensor.view(torch.uint16).numpy(), embedding.data)


def stock_reads(store: Path, key: str) -> np.ndarray | None:
    """As ECExampleConnector: it looks, makes a directory where there is none, and loads."""
    found = store / key / "encoder_cache.safetensors"
    found.parent.mkdir(exist_ok=True)
    return load_file(found)["ec_cache"].view(torch.uint16).numpy() if found.exists() else None


def test_stock_vllm_finds_what_a_key_was_last_used_for(mapped: EncoderClient, store: Path) -> None:
    assert stock_reads(store, "reused") is None
    for seed in (21, 22, 21):
        embedding = one(mapped.encode([item(seed, key="reused")]))
        found = stock_reads(store, "reused")
        assert found is not None and np.array_equal(found, embedding.data)


def test_who_holds_a_lease_is_never_led_to_another_picture_by_the_key(mapped: EncoderClient, store: Path) -> None:
    """While two callers may both send readers there by the key, it leads nowhere; each one's own file stays."""
    first = one(mapped.encode([item(23, key="contested")], hold=True))
    second = one(mapped.encode([item(24, key="contested")], hold=True))
    assert first.path is not None and second.path is not None and first.path != second.path
    assert stock_reads(store, "contested") is None
    assert isinstance(mapped.fetch(["contested"])[0], ItemError)
    for embedding in (first, second):
        (again,) = mapped.fetch([embedding.path.parent.name])  # type: ignore[union-attr]
        assert isinstance(again, Embedding) and np.array_equal(again.data, embedding.data)
    one(mapped.encode([item(23, key="contested")]))
    assert stock_reads(store, "contested") is None  # the second one still holds its lease
    mapped.release([first.lease, second.lease])
    one(mapped.encode([item(24, key="contested")]))
    found = stock_reads(store, "contested")
    assert found is not None and np.array_equal(found, second.data)


@pytest.mark.parametrize(
    "key", ["../../etc/passwd", "/etc/passwd", "a/b", ".hidden", "..", "é", "k" * 200, "with space"]
)
def test_a_key_is_data_and_never_a_path(mapped: EncoderClient, sent: EncoderClient, store: Path, key: str) -> None:
    embedding = one(mapped.encode([item(4, key=key)]))
    assert embedding.key == key
    assert embedding.path is not None and embedding.path.parent.parent == store
    assert re.fullmatch("keyed-[0-9a-f]{64}", embedding.path.parent.name)
    (link,) = (
        each
        for each in store.iterdir()
        if each.is_symlink() and each.readlink() == embedding.path.parent.relative_to(store)
    )
    assert re.fullmatch("key-[0-9a-f]{64}", link.name)
    assert np.array_equal(one(sent.fetch([key])).data, embedding.data)


def test_fetch_gives_what_is_stored_and_says_what_is_not(mapped: EncoderClient, sent: EncoderClient) -> None:
    embedding = one(mapped.encode([item(5, key="known")]))
    found, missing, again = sent.fetch(["known", "never seen", "known"])
    assert isinstance(found, Embedding) and isinstance(again, Embedding) and found.cached
    assert np.array_equal(found.data, embedding.data) and found.fingerprint == embedding.fingerprint
    assert isinstance(missing, ItemError) and missing.code == "NOT_FOUND"
    assert "encode the item" in missing.message


def test_a_held_lease_is_counted_and_given_back_once(mapped: EncoderClient) -> None:
    embedding = one(mapped.encode([item(6)], hold=True))
    assert embedding.lease
    assert mapped.release([embedding.lease, "unknown", ""]) == 1
    assert mapped.release([embedding.lease]) == 0


def test_a_client_of_another_host_is_sent_what_it_cannot_map(
    storing: Server, tmp_path: Path, sent: EncoderClient
) -> None:
    elsewhere = tmp_path / "not-the-servers"
    elsewhere.mkdir()
    with EncoderClient(storing.address, store=elsewhere) as client:
        first, bad, second = client.encode([item(7, key="seven"), image_item(b"rubbish"), item(8)])
    assert isinstance(first, Embedding) and isinstance(second, Embedding) and isinstance(bad, ItemError)
    assert first.path is None and first.key == "seven" and not first.lease
    assert np.array_equal(first.data, one(sent.fetch(["seven"])).data)


def test_the_async_client_maps_and_fetches_too(storing: Server, store: Path, tmp_path: Path) -> None:
    async def ask() -> None:
        async with AsyncEncoderClient(storing.address, store=store) as client:
            embedding = one(await client.encode([item(9, key="nine")], hold=True))
            assert embedding.path is not None
            assert await client.release([embedding.lease]) == 1
            assert np.array_equal(one(await client.fetch(["nine"])).data, embedding.data)
        async with AsyncEncoderClient(storing.address, store=tmp_path) as client:
            assert np.array_equal(one(await client.encode([item(9, key="nine")])).data, embedding.data)

    asyncio.run(asyncio.wait_for(ask(), 60))


def test_a_file_that_is_not_what_was_announced_is_not_believed(mapped: EncoderClient, store: Path) -> None:
    """Somebody wrote over the store's file: the reply and the file contradict each other."""
    embedding = one(mapped.encode([item(10, key="ten")]))
    assert embedding.path is not None
    data = embedding.path.read_bytes()
    embedding.path.unlink()
    embedding.path.write_bytes(data[:-1])
    with pytest.raises(ProtocolError, match="bytes instead of"):
        mapped.fetch(["ten"])
    embedding.path.write_bytes(data.replace(embedding.fingerprint.encode(), b"0" * 64))
    with pytest.raises(ProtocolError, match="not of the grid, size, type or model"):
        mapped.fetch(["ten"])


def test_a_call_that_is_cancelled_gives_up_its_leases(storing: Server, mapped: EncoderClient) -> None:
    known = one(mapped.encode([item(11, key="eleven")]))
    assert known.path is not None
    with storing.stub() as stub:
        # The second item takes a while, so that the call is cancelled between the two.
        slow = rgb_image_item(picture(28 * 40, 28 * 40), key=f"slow-{time.time_ns()}")
        request = pb.EncodeRequest(items=[item(11, key="eleven"), slow], delivery=pb.STORED)
        call = stub.Encode(request, timeout=60)
        part = next(call)
        lease = part.embedding.file.lease
        assert lease
        call.cancel()
        with pytest.raises(grpc.RpcError):
            next(call)
        ends = time.monotonic() + 20
        while "code=CANCELLED" not in storing.log.read_text():
            assert time.monotonic() < ends
            time.sleep(0.02)
        assert stub.Release(pb.ReleaseRequest(leases=[lease])).released == 0


def test_requests_that_make_no_sense_are_refused(storing: Server) -> None:
    with storing.stub() as stub:
        for request in (pb.FetchRequest(), pb.FetchRequest(keys=["k"] * 10_000)):
            with pytest.raises(grpc.RpcError) as refused:
                list(stub.Fetch(request))
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert stub.Release(pb.ReleaseRequest()).released == 0
        assert stub.Release(pb.ReleaseRequest(leases=["no such"] * 1000)).released == 0


def test_without_a_store_everything_is_sent(start_server: StartServer, store: Path) -> None:
    server = start_server("--store", "none", "--threads", "1")
    with EncoderClient(server.address, store=store) as client, server.client() as plain:
        embedding = one(client.encode([item(12, key="twelve")]))
        assert embedding.path is None and not embedding.cached
        assert isinstance(client.fetch(["twelve"])[0], ItemError)
        assert not client.info().HasField("store")
        assert np.array_equal(one(plain.encode([item(12)])).data, embedding.data)
    assert server.terminate() == 0


def test_info_says_where_the_store_is(sent: EncoderClient, store: Path) -> None:
    info = sent.info()
    assert (info.store.directory, info.store.lease_seconds) == (str(store), 30.0)
    assert info.store.capacity_bytes > 0
