"""Whatever bytes are sent: an answer or a refusal in words, never an internal error, a hang or a crash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from load import QUICK, picture_item
from PIL import Image, features
from servers import Server, StartServer

from sidecar.client import Embedding
from sidecar.items import image_item, patches_item, rgb_image_item, rgb_video_item
from sidecar.pb import encoder_pb2 as pb
from sidecar.vision.dtypes import DType
from sidecar.vision.grid import Grid

pytestmark = pytest.mark.soak

# No status of a refusal: ours are INVALID_ARGUMENT, RESOURCE_EXHAUSTED and the like.
DEFECTS = {
    code.value[0]: code.name
    for code in (
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )
}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", *(("AVIF",) if features.check("avif") else ()))
HANG_S = 60.0

Send = Callable[[str, bytes], None]


def fuzzed(examples: int) -> settings:
    """The same examples in every run; one that fails is made smaller."""
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    every = list(HealthCheck)
    return settings(max_examples=examples, deadline=None, derandomize=True, phases=phases, suppress_health_check=every)


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    """With limits that keep small what passes."""
    limits = ("--max-image-pixels", "300000", "--max-item-patches", "2048", "--max-items", "16", "--max-frames", "8")
    return start_server(*QUICK, *limits, "--store-bytes", "4000000")


@pytest.fixture
def ended() -> Counter[str]:
    """What the calls came to."""
    return Counter()


@pytest.fixture
def send(server: Server, ended: Counter[str], request: pytest.FixtureRequest) -> Iterator[Send]:
    """send(method, bytes) fails on a defect. After the test the server has to answer as ever."""
    with server.channel() as channel:
        methods = {
            name: channel.unary_stream(f"/epd.encoder.v1.Encoder/{name}") for name in ("Encode", "Fetch", "Release")
        }

        def call(method: str, message: bytes) -> None:
            try:
                for part in methods[method](message, timeout=HANG_S):
                    ended[_kind(part) if method != "Release" else "released"] += 1
            except grpc.RpcError as error:
                failed: Any = error
                assert failed.code().value[0] not in DEFECTS, f"{failed.code()}: {failed.details()}"
                ended[failed.code().name] += 1

        yield call
    print(f"\nfuzzed {request.node.name}: {dict(ended)}", end="")
    with server.client() as client:
        assert isinstance(client.encode([picture_item(1)], timeout_s=HANG_S)[0], Embedding)
    assert "Traceback" not in (log := server.log.read_text()), log[log.index("Traceback") - 500 :][:3000]


def _kind(part: bytes) -> str:
    response = pb.EncodeResponse.FromString(part)
    if response.WhichOneof("part") != "error":
        return response.WhichOneof("part") or "nothing"
    code = response.error.code
    assert code not in DEFECTS, f"{DEFECTS[code]}: {response.error.message}"
    return f"item refused: {_NAMES[code]}"


_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with a few changes: bytes replaced, put in, taken out, repeated, or the end cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(("replace", "insert", "remove", "repeat", "cut")))
        size = draw(st.integers(1, 16))
        if kind == "replace":
            data[at : at + size] = draw(st.binary(min_size=size, max_size=size))
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=size))
        elif kind == "remove":
            del data[at : at + size]
        elif kind == "repeat":
            data[at:at] = data[at : at + 4 * size]
        else:
            del data[at:]
    return bytes(data)


def noise(height: int = 56, width: int = 56) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(image_format: str) -> bytes:
    buffer = BytesIO()
    Image.fromarray(noise()).save(buffer, image_format)
    return buffer.getvalue()


def patches(dtype: DType) -> pb.Item:
    rows = np.zeros((16, 1176), dtype.storage)
    return patches_item(rows, Grid(1, 4, 4), dtype)


ITEMS = (
    rgb_image_item(noise(), key="a photo"),
    rgb_video_item(np.stack([noise(), noise()])),
    image_item(picture("PNG"), key="../../etc/passwd", min_pixels=1, max_pixels=10_000),
    *(patches(dtype) for dtype in (DType.UINT8, DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)),
)
SEEDS = [
    *[("Encode", pb.EncodeRequest(items=[item], delivery=pb.STORED).SerializeToString()) for item in ITEMS],
    ("Encode", pb.EncodeRequest(items=[pb.Item(key="a"), pb.Item(url="https://127.0.0.1/")] * 3).SerializeToString()),
    ("Fetch", pb.FetchRequest(keys=["a photo", "..", "", "x" * 200], delivery=pb.STORED).SerializeToString()),
    ("Release", pb.ReleaseRequest(leases=["x", "", "y" * 30]).SerializeToString()),
]


@fuzzed(1500)
@given(method=st.sampled_from(("Encode", "Fetch", "Release")), message=st.binary(max_size=300))
def test_random_bytes_for_messages(send: Send, method: str, message: bytes) -> None:
    send(method, message)


@fuzzed(3000)
@given(data=st.data())
def test_damaged_messages(send: Send, data: st.DataObject) -> None:
    method, message = data.draw(st.sampled_from(SEEDS))
    # Most of a message is pixels; what may confuse a parser lies around them.
    head = data.draw(damaged(message[:120]))
    send(method, head + message[120:])


NUMBER = st.one_of(st.integers(0, 8), st.integers(0, 2**32 - 1))
BOUND = st.one_of(st.just(0), st.integers(0, 100_000), st.integers(0, 2**64 - 1))
KEY = st.one_of(st.just(""), st.text(max_size=40))
GRIDS = st.builds(pb.Grid, t=NUMBER, h=NUMBER, w=NUMBER)
DATA = st.binary(max_size=200)
STRANGE_ITEMS = st.one_of(
    st.builds(pb.Item, key=KEY, min_pixels=BOUND, max_pixels=BOUND, image=DATA),
    st.builds(
        pb.Item, key=KEY, min_pixels=BOUND, max_pixels=BOUND, image=st.sampled_from([picture("PNG"), picture("JPEG")])
    ),
    st.builds(pb.Item, key=KEY, url=st.text(max_size=60)),
    st.builds(
        pb.Item,
        min_pixels=BOUND,
        rgb_image=st.builds(pb.RgbImage, height=NUMBER, width=NUMBER, data=DATA),
    ),
    st.builds(
        pb.Item,
        max_pixels=BOUND,
        rgb_video=st.builds(pb.RgbVideo, frames=NUMBER, height=NUMBER, width=NUMBER, data=DATA),
    ),
    st.builds(
        pb.Item,
        patches=st.builds(
            pb.Patches,
            grid=GRIDS,
            dtype=st.integers(0, 9),
            scale=st.integers(0, 4),
            single_slice=st.booleans(),
            data=DATA,
        ),
    ),
    # Of the right size, with values from anywhere: infinities and what is no number among them.
    st.builds(
        lambda values, scale, dtype: pb.Item(
            patches=pb.Patches(grid=pb.Grid(t=1, h=2, w=2), dtype=dtype, scale=scale, data=(values * 4704)[: 4 * 4704])
        ),
        st.binary(min_size=4, max_size=4),
        st.integers(1, 2),
        st.just(pb.FLOAT32),
    ),
)


@fuzzed(2500)
@given(items=st.lists(STRANGE_ITEMS, max_size=4), delivery=st.sampled_from((pb.INLINE, pb.STORED)))
def test_strange_items(send: Send, items: list[pb.Item], delivery: Any) -> None:
    send("Encode", pb.EncodeRequest(items=items, delivery=delivery).SerializeToString())


@pytest.mark.parametrize("image_format", FORMATS)
def test_damaged_pictures(send: Send, image_format: str) -> None:
    whole = picture(image_format)

    @fuzzed(700)
    @given(data=damaged(whole))
    def one(data: bytes) -> None:
        send("Encode", pb.EncodeRequest(items=[pb.Item(image=data)]).SerializeToString())

    one()
