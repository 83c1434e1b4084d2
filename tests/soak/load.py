"""What the soak tests share: pictures by number, many calls at once and what became of each, and a look into a server."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from PIL import Image
from servers import Server

from sidecar.client import AsyncEncoderClient, Embedding, EncodeError, Item, ItemError
from sidecar.items import image_item, rgb_image_item

# No time for a lane to measure itself beyond its first runs, and a page that tells what the server holds. A caller that goes away
# in the moment of its answer cannot give back a lease that it has not seen: it expires, and a drain waits for that.
QUICK = ("--warm-up-seconds", "0", "--metrics-listen", "127.0.0.1:0", "--lease-seconds", "10")
# Embeddings as any reader of safetensors knows them.
EXACT = ("--precision", "f32", "--embedding-dtype", "float32")
REFUSALS = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
# gRPC shares connections between a process's channels unless told not to.
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
# Longer than anything takes on the busiest of machines; whoever reaches it hangs.
PATIENCE_S = 120.0

Outcome = Embedding | ItemError | EncodeError


def picture_item(number: int, side: int = 56, key: str = "") -> Item:
    """Noise of side × side pixels, different for every number; 56 is about as small as the toy takes."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return rgb_image_item(pixels, key=key)


def slow_item(number: int, side: int = 896, key: str = "") -> Item:
    """Few bytes that take a lane long: 4096 patches at 896 pixels."""
    return image_item(png(number), key=key, min_pixels=side * side)


def png(number: int, side: int = 28) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@asynccontextmanager
async def open_clients(
    server: Server, count: int = 4, *, stored: bool = False
) -> AsyncIterator[list[AsyncEncoderClient]]:
    """Clients with a connection each, and to the server's fair queue each somebody else."""
    store = store_of(server) if stored else None
    async with AsyncExitStack() as stack:
        clients = [AsyncEncoderClient(server.address, store=store, options=OWN_CONNECTION) for _ in range(count)]
        yield [await stack.enter_async_context(client) for client in clients]


async def outcome_of(client: AsyncEncoderClient, item: Item, timeout_s: float | None = PATIENCE_S) -> Outcome:
    """What one call with one item came to."""
    try:
        (result,) = await client.encode([item], timeout_s)
        return result
    except EncodeError as error:
        return error


async def all_at_once(clients: Sequence[AsyncEncoderClient], items: Iterable[Item]) -> list[Outcome]:
    """A call for each item, all of them under way at a time, dealt out among the clients."""
    calls = (outcome_of(clients[number % len(clients)], item) for number, item in enumerate(items))
    return list(await asyncio.gather(*calls))


async def closed_loop(
    clients: Sequence[AsyncEncoderClient], items: Iterable[Item], width: int, timeout_s: float | None = PATIENCE_S
) -> Counter[str]:
    """As many calls as there are items, `width` of them at a time."""
    waiting = iter(items)

    ended: Counter[str] = Counter()

    async def worker(client: AsyncEncoderClient) -> None:
        for item in waiting:  # and nothing of it is kept, which might be a file of the store
            ended.update(tally([await outcome_of(client, item, timeout_s)]))

    await asyncio.gather(*(worker(clients[number % len(clients)]) for number in range(width)))
    return ended


def tally(outcomes: Iterable[Outcome]) -> Counter[str]:
    """How many of each: `embedding`, or a status code's name."""
    return Counter("embedding" if isinstance(outcome, Embedding) else outcome.code for outcome in outcomes)


def status(server: Server) -> dict[str, Any]:
    """Its status page's figures."""
    found = re.search(r"status page on (http://\S+)", server.log.read_text())
    assert found, "the server was started without --metrics-listen"
    with urlopen(f"{found[1]}/status.json", timeout=30) as answer:
        document: dict[str, Any] = json.load(answer)
    return document


def engine(server: Server) -> dict[str, Any]:
    """Its engine at this moment."""
    values: dict[str, Any] = status(server)["engine"]
    return values


def items_run(server: Server) -> int:
    return sum(lane["items"] for lane in engine(server)["lanes"])


def is_idle(server: Server) -> bool:
    """Whether nothing waits, nothing runs and no lease is held."""
    now = engine(server)
    busy = now["waiting_items"] + now["waiting_patches"] + now["preprocessing"] + now["store"]["leases"]
    return not busy and not any(lane["waiting_items"] + lane["running_items"] for lane in now["lanes"])


def wait_until(what: str, condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    """Fail if it does not become true in time. For what another process does, which nothing tells."""
    ends = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends, f"not after {timeout_s:g} s: {what}"
        time.sleep(0.02)


def store_of(server: Server) -> Path:
    """The directory that its log names."""
    found = re.search(r" store (\S+) of ", server.log.read_text())
    assert found, server.log.read_text()
    return Path(found[1])


def threads(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))


def open_files(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def memory_bytes(server: Server) -> tuple[int, int]:
    """Resident memory: its own, and what it shares through mapped store files."""
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    sizes = {name: int(kb) * 1024 for name, kb in re.findall(r"(VmRSS|RssShmem):\s+(\d+) kB", text)}
    return sizes["VmRSS"] - sizes["RssShmem"], sizes["RssShmem"]


def percentile(values: Sequence[float], part: float) -> float:
    return float(np.percentile(values, 100 * part))


async def until_cancelled(address: str, items: Sequence[Item], width: int) -> None:
    """Keep `width` calls under way, over the items again and again, whatever becomes of them."""
    async with AsyncEncoderClient(address) as client:
        await asyncio.gather(*(_repeat(client, items[number::width]) for number in range(width)))


async def _repeat(client: AsyncEncoderClient, items: Sequence[Item]) -> None:
    while True:
        for item in items:
            await outcome_of(client, item)


@contextmanager
def flooded(server: Server, items: Sequence[Item], width: int) -> Iterator[None]:
    """A client in a process of its own, so that what this one measures is not its own load, until the block ends."""
    messages = [item.SerializeToString() for item in items]
    process = get_context("spawn").Process(target=_flood, args=(server.address, messages, width), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _flood(address: str, messages: Sequence[bytes], width: int) -> None:
    asyncio.run(until_cancelled(address, [Item.FromString(message) for message in messages], width))
