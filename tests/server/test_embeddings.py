"""One picture gives one embedding, however it was sent, in whatever company."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import ASTRONAUT, CAT, COFFEE, encoded, normalised, normalised_item, one_slice, patches_of, picture
from servers import Server

from sidecar.client import Embedding, EncoderClient
from sidecar.items import Item, image_item, patches_item, rgb_image_item, rgb_video_item
from sidecar.pb import encoder_pb2 as pb
from sidecar.vision.dtypes import DType
from sidecar.vision.grid import Grid

RGB = picture(84, 112)
VALUES, GRID = patches_of(RGB)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[EncoderClient]:
    with server.client() as connected:
        yield connected


def encode(client: EncoderClient, *items: Item) -> list[Embedding]:
    results = client.encode(items, timeout_s=60)
    assert all(isinstance(result, Embedding) for result in results), results
    return [result for result in results if isinstance(result, Embedding)]


def cosine(left: Embedding, right: Embedding) -> float:
    """The least of all rows."""
    a, b = (embedding.float32().astype(np.float64) for embedding in (left, right))
    return float(((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())


def test_one_picture_in_every_form_gives_one_embedding(client: EncoderClient) -> None:
    floats = normalised(VALUES)
    reference, *others = encode(
        client,
        rgb_image_item(RGB),
        image_item(encoded(RGB, "PNG")),
        image_item(encoded(RGB, "BMP")),
        patches_item(VALUES, GRID, DType.UINT8),
        patches_item(one_slice(VALUES), GRID, DType.UINT8, single_slice=True),
        normalised_item(floats, GRID, DType.FLOAT32),
        normalised_item(one_slice(floats), GRID, DType.FLOAT32, single_slice=True),
        normalised_item(floats, GRID, DType.FLOAT16),
    )
    assert (reference.grid, reference.tokens, reference.width, reference.dtype) == (GRID, 12, 128, DType.FLOAT32)
    for other in others:
        assert np.array_equal(other.data, reference.data)
        assert other.grid == reference.grid


def test_patches_normalised_in_bfloat16_lose_no_more_than_bfloat16_does(client: EncoderClient) -> None:
    """Above 2, where neighbours are 1/64 apart, one pixel in two is taken for the next: a level of 255."""
    floats = normalised(VALUES)
    reference, whole, single = encode(
        client,
        rgb_image_item(RGB),
        normalised_item(floats, GRID, DType.BFLOAT16),
        normalised_item(one_slice(floats), GRID, DType.BFLOAT16, single_slice=True),
    )
    assert np.array_equal(whole.data, single.data)
    assert cosine(reference, whole) > 0.9999


def test_what_the_server_sends_is_what_the_tower_computes(client: EncoderClient, toy_checkpoint: object) -> None:
    """Against the checkpoint's own weights in float32 torch, for photos that had to be resized."""
    from export.accuracy import reference_embeddings
    from export.checkpoint import open_checkpoint
    from export.samples import Sample
    from sidecar.vision.images import decode_image
    from sidecar.vision.pixels import image_patches

    photos = [path.read_bytes() for path in (ASTRONAUT, CAT, COFFEE)]
    area = 40_000
    checkpoint = open_checkpoint(str(toy_checkpoint))
    samples = [
        Sample("", image_patches(decode_image(data), checkpoint.tower, checkpoint.pixels, max_pixels=area))
        for data in photos
    ]
    references = reference_embeddings(checkpoint, samples, lambda: None)
    served = encode(client, *(image_item(data, max_pixels=area) for data in photos))
    for embedding, reference, sample in zip(served, references, samples, strict=True):
        assert embedding.grid == sample.grid
        assert np.allclose(embedding.data, reference, rtol=0, atol=1e-3 * float(np.abs(reference).max()))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(5)))
def test_the_company_and_the_order_change_nothing(client: EncoderClient, order: list[int]) -> None:
    sizes = [(28, 28), (56, 84), (112, 112), (28, 280), (140, 56)]
    items = [rgb_image_item(picture(*size, seed=index)) for index, size in enumerate(sizes)]
    # min_pixels would enlarge the smaller ones.
    for item in items:
        item.min_pixels = 28 * 28
    alone = [encode(client, item)[0] for item in items]
    together = encode(client, *(items[index] for index in order))
    for index, embedding in zip(order, together, strict=True):
        height, width = sizes[index]
        assert embedding.tokens == height * width // 28**2
        assert np.array_equal(embedding.data, alone[index].data)


def test_a_video_is_one_item_as_frames_and_as_patches(client: EncoderClient) -> None:
    frames = np.stack([picture(84, 112, seed) for seed in range(4)])
    # Patches of a video: each patch holds both frames of its pair.
    pairs = []
    for first, second in ((0, 1), (2, 3)):
        one, two = (one_slice(patches_of(frames[index])[0]).reshape(-1, 3, 1, 196) for index in (first, second))
        pairs.append(np.concatenate([one, two], axis=2).reshape(len(one), -1))
    values, grid = np.concatenate(pairs), Grid(2, GRID.h, GRID.w)
    whole, cut, odd, repeated, still = encode(
        client,
        rgb_video_item(frames, min_pixels=1),
        patches_item(values, grid, DType.UINT8),
        rgb_video_item(frames[:3], min_pixels=1),
        rgb_video_item(frames[[0, 1, 2, 2]], min_pixels=1),
        rgb_video_item(np.stack([RGB, RGB]), min_pixels=1),
    )
    assert (whole.grid, whole.tokens) == (grid, 24)
    assert np.array_equal(whole.data, cut.data)
    assert np.array_equal(odd.data, repeated.data)  # an odd number of frames repeats the last
    assert not np.array_equal(whole.data, odd.data)
    assert np.array_equal(still.data, encode(client, rgb_image_item(RGB))[0].data)


def test_bounds_set_the_size_and_the_model_sets_it_without_them(client: EncoderClient) -> None:
    photo = ASTRONAUT.read_bytes()
    plain, small, large = encode(
        client,
        image_item(photo),
        image_item(photo, max_pixels=28 * 28 * 16),
        image_item(photo, min_pixels=28 * 28 * 400),
    )
    assert plain.tokens == 18 * 18  # 512 is 18.3 tokens of 28
    assert small.tokens == 16
    assert large.tokens >= 400


def test_a_large_embedding_comes_in_parts_that_any_client_can_take(server: Server) -> None:
    """2304 tokens of 128 float32: 1.1 MiB, from a video so that it is quickly encoded."""
    frames = pb.RgbVideo(frames=72, height=224, width=224, data=bytes(72 * 224 * 224 * 3))
    small = rgb_image_item(picture(56, 56))
    with server.stub() as stub:
        parts = list(stub.Encode(pb.EncodeRequest(items=[pb.Item(rgb_video=frames), small])))
    assert max(part.ByteSize() for part in parts) < 4 << 20
    first, *chunks = [part for part in parts if part.index == 0]
    assert (first.embedding.tokens, first.embedding.width) == (2304, 128)
    assert first.embedding.size_bytes == 2304 * 128 * 4
    assert [chunk.chunk.offset for chunk in chunks] == [0, 1 << 20]
    assert sum(len(chunk.chunk.data) for chunk in chunks) == first.embedding.size_bytes
    assert len([part for part in parts if part.index == 1]) == 2


def test_a_unix_socket_answers_as_tcp_does(server: Server, client: EncoderClient) -> None:
    with EncoderClient(f"unix:{server.socket}") as near:
        assert np.array_equal(encode(near, rgb_image_item(RGB))[0].data, encode(client, rgb_image_item(RGB))[0].data)
        assert near.info() == client.info()


def test_times_say_where_the_time_went(client: EncoderClient) -> None:
    embedding, again = (encode(client, image_item(ASTRONAUT.read_bytes(), key="times"))[0] for _ in range(2))
    times = embedding.times
    assert min(times.decode_ms, times.preprocess_ms, times.run_ms) > 0.1
    assert 0 <= times.queue_ms < 10_000
    assert again.cached and (again.times.decode_ms, again.times.run_ms) == (0, 0)
    assert np.array_equal(again.data, embedding.data)


def test_a_result_is_sent_as_soon_as_it_is_there(server: Server) -> None:
    items = [rgb_image_item(picture(28 * 20, 28 * 20, seed)) for seed in range(5)]
    with server.stub() as stub:
        started = time.perf_counter()
        stream = stub.Encode(pb.EncodeRequest(items=items))
        arrived = [(part.index, time.perf_counter() - started) for part in stream if part.HasField("embedding")]
    assert sorted(index for index, _ in arrived) == [0, 1, 2, 3, 4]
    assert arrived[0][1] < 0.6 * arrived[-1][1]
