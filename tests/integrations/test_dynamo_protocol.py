"""Dynamo's requests: what is read of them, what goes back, and what is said of those that will not do."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from sidecar.integrations.dynamo.images import Bounds
from sidecar.integrations.dynamo.protocol import EncodeRequest, RequestError, Transfer
from sidecar.vision.grid import Grid


def request(*media: Any, **more: Any) -> str:
    groups = [{"multimodal_input": one, "image_grid_thw": None, "serialized_request": None} for one in media]
    return json.dumps({"request_id": "r", "multimodal_inputs": groups, "image_cache_scope": None, **more})


def data_url(content: bytes) -> dict[str, Any]:
    return {"image_url": "data:image/png;base64," + base64.b64encode(content).decode(), "image_decoded": None}


def test_the_answer_is_the_request_with_embeddings_for_images() -> None:
    asked = EncodeRequest(request(data_url(b"one"), data_url(b"two"), engine_prompt={"kept": [1]}), Bounds())
    assert [item.image for item in asked.images] == [b"one", b"two"]
    transfers = [Transfer((1, 4, 8), "bfloat16", "/dev/shm/a"), Transfer((1, 6, 8), "bfloat16", "/dev/shm/b")]
    answer = json.loads(asked.answer([(Grid(1, 4, 4), transfers[0]), (Grid(1, 4, 6), transfers[1])]))
    assert answer["engine_prompt"] == {"kept": [1]} and answer["request_id"] == "r"
    first, second = answer["multimodal_inputs"]
    assert first == {
        "multimodal_input": {"image_url": None, "image_decoded": None},
        "image_grid_thw": [[1, 4, 4]],
        "embeddings_shape": [1, 4, 8],
        "serialized_request": {
            "embeddings_shape": [1, 4, 8],
            "embedding_dtype_str": "bfloat16",
            "serialized_request": "/dev/shm/a",
        },
    }
    assert second["serialized_request"]["serialized_request"] == "/dev/shm/b"


def test_a_url_goes_on_to_the_sidecar_and_bounds_go_with_each_image() -> None:
    media = [{"image_url": "https://example.org/a.png"}, data_url(b"x")]
    images = EncodeRequest(json.loads(request(*media)), Bounds(100, 2000)).images
    assert images[0].url == "https://example.org/a.png" and not images[0].image
    assert [(item.min_pixels, item.max_pixels) for item in images] == [(100, 2000)] * 2


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "must be an object"),
        ("{}", "multimodal_inputs must be a list"),
        ('{"multimodal_inputs": [1]}', "multimodal_inputs must be a list of objects"),
        ('{"multimodal_inputs": [{}]}', "image 1: multimodal_input is missing"),
        (request(data_url(b"x"), {}), "image 2: image_url is missing"),
        (request({"image_url": ["x"]}), "image 1: image_url is missing"),
        (request({"image_url": "http://example.org/a.png"}), "image 1: its URL must be https: or data:, not http:"),
        (request({"image_url": "file:///etc/passwd"}), "image 1: its URL must be https: or data:, not file:"),
        (request({"image_url": "/etc/passwd"}), "image 1: its URL must be https: or data:$"),
        (request({"image_url": "data:nonsense"}), "image 1: its data URL has no comma"),
        (request({"image_url": "data:image/gif,GIF%38%00"}), "image 1: its data URL must say ;base64"),
        (request({"image_url": "data:image/png;base64,%%"}), "image 1: its data URL is no base64"),
        (request({"image_url": "data:image/png;base64,é"}), "image 1: its data URL is no base64"),
        (request({"image_url": "data:image/png;base64,"}), "image 1: .*at least one byte"),
        (request({"video_url": "data:,x"}), "image 1: it is a video"),
        (request({"image_decoded": {"shape": []}}), "without --frontend-decoding"),
    ],
)
def test_what_cannot_be_served_is_named(raw: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        EncodeRequest(raw, Bounds())


@pytest.mark.parametrize(
    ("kwargs", "bounds"),
    [
        ({}, (100, 2000)),
        ({"max_pixels": 500, "min_pixels": None}, (100, 500)),
        ({"size": {"shortest_edge": 300, "longest_edge": 400}}, (300, 400)),
        ({"size": {"longest_edge": 400}, "max_pixels": 500}, (100, 500)),
    ],
)
def test_sizes_that_a_request_asks_for_hold_for_it(kwargs: dict[str, Any], bounds: tuple[int, int]) -> None:
    for more in ({"mm_processor_kwargs": kwargs}, {"engine_prompt": {"mm_processor_kwargs": kwargs}}):
        (image,) = EncodeRequest(request(data_url(b"x"), **more), Bounds(100, 2000)).images
        assert (image.min_pixels, image.max_pixels) == bounds


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"do_resize": False, "fps": 2}, "do_resize, fps cannot be honoured, only min_pixels and max_pixels"),
        ({"size": {"height": 28, "width": 28}}, "size.height, size.width cannot be honoured"),
        ({"size": 28}, "size must be an object"),
        ({"max_pixels": 0}, "max_pixels must be a whole number above 0, got 0"),
        ({"max_pixels": True}, "max_pixels must be a whole number"),
        ({"min_pixels": "28"}, "min_pixels must be a whole number"),
        ([1], "must be an object"),
    ],
)
def test_what_else_a_request_asks_of_the_processor_is_refused_and_not_ignored(kwargs: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        EncodeRequest(request(data_url(b"x"), engine_prompt={"mm_processor_kwargs": kwargs}), Bounds())
