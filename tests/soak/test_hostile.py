"""64 callers that each send the worst message, picture, URL and half-message known, beside an honest one, in 2 GB."""

from __future__ import annotations

import os
import re
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from load import EXACT, percentile, png
from memory_group import memory_group
from PIL import Image
from raw_http2 import send_half, send_whole
from servers import Server, StartServer

from sidecar.client import Embedding, EncoderClient
from sidecar.items import image_item
from sidecar.pb import encoder_pb2 as pb

pytestmark = pytest.mark.soak

MB = 1 << 20
GROUP_BYTES = 2048 * MB
HELD_BYTES, MESSAGE_BYTES = 256 * MB, 64 * MB
FLAGS = (
    *("--max-held-bytes", str(HELD_BYTES), "--max-message-bytes", str(MESSAGE_BYTES), "--message-seconds", "5"),
    *("--max-item-patches", "4096", "--url-input", "--store", "none", "--warm-up-seconds", "0"),
)
# docs/operations.md, "Memory": idle, twice the held bytes, one decoded picture of 64 megapixels at 18 bytes each.
BOUND_BYTES = 2 * HELD_BYTES + 18 * 64_000_000
CALLERS, ATTACK_S, ALONE_S = 64, 20.0, 6.0
ENCODE, HEALTH = "/epd.encoder.v1.Encoder/Encode", "/grpc.health.v1.Health/Check"
SIDE = 7900  # 62 megapixels
FEW = 200_704  # to be decoded in full and encoded as few patches


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def request(**content: Any) -> bytes:
    return pb.EncodeRequest(items=[pb.Item(**content)]).SerializeToString()


def worst_messages() -> list[bytes]:
    alternating = request(rgb_image=pb.RgbImage())[2:] + request(rgb_video=pb.RgbVideo())[2:]
    body = alternating * (60 * MB // len(alternating))
    length = len(body)
    varint = b""
    while length > 127:
        varint, length = varint + bytes([length & 127 | 128]), length >> 7
    return [
        b"\x0a" + varint + bytes([length]) + body,
        pb.EncodeRequest(items=[pb.Item()]).SerializeToString() * (30 * MB),
    ]


def worst_pictures() -> list[bytes]:
    """The first takes the most memory for its bytes, the second the most time."""
    clear = Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 128))
    turned = Image.Exif()
    turned[0x112] = 6
    return [encoded(clear, "WEBP", lossless=True, method=0), encoded(clear, "PNG", exif=turned), random_bytes()]


def random_bytes() -> bytes:
    """A picture that is large in bytes too, and damaged."""
    return encoded(Image.new("RGB", (64, 64)), "JPEG")[:-2] + os.urandom(60 * MB)


def worst_urls(picture: bytes) -> list[bytes]:
    url = "data:image/png;base64," + b64encode(picture).decode()
    large = "data:image/png;base64," + b64encode(picture + bytes(44 * MB)).decode()
    return [request(url=url, max_pixels=FEW), request(url=large, max_pixels=FEW)]


def attack(address: str, core: int | None, done: Any) -> None:
    """A process of 64 callers, each of which sends all of them in turn."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    host, _, port = address.rpartition(":")
    pictures = worst_pictures()
    messages, urls, names = worst_messages(), worst_urls(pictures[1]), count()

    def picture(which: int) -> bytes:
        # By another key each time, so that none joins another's.
        return request(image=pictures[which], max_pixels=FEW, key=f"picture {next(names)}")

    whole: list[Callable[[], bytes]] = [
        *(partial(messages.__getitem__, which) for which in range(len(messages))),
        *(partial(picture, which) for which in range(len(pictures))),
        *(partial(urls.__getitem__, which) for which in range(len(urls))),
    ]
    done.put("ready")
    until = time.time() + ATTACK_S + 1
    sent: Counter[str] = Counter()

    def caller(number: int) -> None:
        for turn in count(number):
            if (left := until - time.time()) <= 0:
                return
            which = turn % (len(whole) + 2)
            try:
                if which < len(whole):
                    sent["whole" if send_whole(host, int(port), ENCODE, whole[which](), seconds=left) else "cut"] += 1
                else:
                    method = (HEALTH, ENCODE)[which - len(whole)]
                    _, ended = send_half(
                        host, int(port), method, declared=60 * MB, sent=60 * MB - 9, seconds=min(left, 4)
                    )
                    sent["half, refused" if ended else "half"] += 1
            except OSError:
                sent["no connection"] += 1

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.put(dict(sent))


@contextmanager
def apart(server: Server) -> Iterator[int | None]:
    """The server on the first core, and the number of another for the callers, where there are as few as two."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) != 2:
        yield None
        return
    for task in Path(f"/proc/{server.process.pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {cores[0]})
    os.sched_setaffinity(0, {cores[1]})
    try:
        yield cores[1]
    finally:
        os.sched_setaffinity(0, cores)


def honest(client: EncoderClient, seconds: float, numbers: Iterator[int]) -> list[float]:
    """Milliseconds of small pictures, one after another, each a new one."""
    took = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        item = image_item(png(next(numbers), 56))
        begun = time.perf_counter()
        (result,) = client.encode([item], timeout_s=30)
        took.append((time.perf_counter() - begun) * 1e3)
        assert isinstance(result, Embedding), result
        time.sleep(0.02)
    return took


def resident(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def test_hostile_callers_take_neither_the_memory_nor_the_time_of_honest_ones(start_server: StartServer) -> None:
    with memory_group(GROUP_BYTES) as group:
        with group.entered():
            server = start_server(*EXACT, *FLAGS)
        with server.client() as client, apart(server) as core:
            measure(server, client, core)
        most = group.most_used()
        print(f"\nmost memory in the group: {most >> 20} of {GROUP_BYTES >> 20} MB", end="")
        assert server.process.poll() is None
        # 1: a picture whose caller has gone was still being decoded, which nothing can stop.
        assert server.terminate() in (0, 1)
        assert " ERROR sidecar" not in server.log.read_text()


def measure(server: Server, client: EncoderClient, core: int | None) -> None:
    numbers = count()
    honest(client, 2.0, numbers)  # the connection, and everything's first time
    idle = resident(server)
    alone = honest(client, ALONE_S, numbers)
    begun = time.perf_counter()
    assert isinstance(client.encode([image_item(worst_pictures()[1], max_pixels=FEW)], timeout_s=60)[0], Embedding)
    service_ms = (time.perf_counter() - begun) * 1e3

    spawn = get_context("spawn")
    done = spawn.Queue()
    with server.growing_less_than(BOUND_BYTES):
        attackers = spawn.Process(target=attack, args=(server.address, core, done))
        attackers.start()
        assert done.get(timeout=60) == "ready"
        beside = honest(client, ATTACK_S, numbers)
        peak = server._bytes("VmHWM")
        sent = done.get(timeout=60)
        attackers.join(30)
    bar_ms = 3 * percentile(alone, 0.99) + service_ms
    print(
        f"\n{sent}; resident: idle {idle >> 20} MB, peak {peak >> 20} MB, bound {idle + BOUND_BYTES >> 20} MB", end=""
    )
    print(f"\nhonest p99 alone {percentile(alone, 0.99):.1f} ms, beside {percentile(beside, 0.99):.1f} ms ", end="")
    print(
        f"(median {percentile(beside, 0.5):.1f} ms, {len(beside)} calls); worst picture {service_ms:.0f} ms; ", end=""
    )
    print(f"bar {bar_ms:.0f} ms; {'a core each' if core is not None else 'no cores of their own'}", end="")
    assert sum(sent.values()) > CALLERS
    assert percentile(beside, 0.99) <= bar_ms
