"""Chat requests that are wrong are refused in plain words, before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest
from chats import TEXT, chat, data_url, image
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.client import EncoderClient
from sidecar.integrations.chat import ChatRequestError, inline_embeds, metadata_only
from sidecar.integrations.chat_images import ChatImages


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ([], "list of `messages`"),
        ({"messages": "hello"}, "list of `messages`"),
        ({"messages": ["hello"]}, r"messages\[0\]: a message must be an object, got str"),
        (chat({"type": "image_url"}), r"messages\[0\].content\[0\]: image_url must be .*got nothing"),
        (chat(TEXT, {"type": "image_url", "image_url": 7}), r"content\[1\]: image_url must be .*got int"),
        (chat({"type": "input_image", "file_id": "file-1"}), "files by id are not taken"),
        (chat({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), "must be https: .*'file:///etc"),
        (chat({"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}), "must be https:"),
        (chat({"type": "image_url", "image_url": {"url": "https://exämple.com"}}), "plain ASCII"),
        (chat({"type": "image_url", "image_url": {"url": "data:image/png,abc"}}), "begin like data:image/png;base64,"),
        (chat({"type": "image_url", "image_url": {"url": "data:image/png;base64,ab*c"}}), "not whole base64"),
        (chat({"type": "image_url", "image_url": {"url": "data:image/png;base64,äbcd"}}), "not whole base64"),
        (chat({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}), "holds no image"),
        (chat({"type": "image_url", "image_url": {"url": data_url(bytes(4096))}}), "over 1024 bytes"),
        (chat(image(1, uuid=7)), "uuid must be a string"),
        (chat(image(1, uuid="")), "uuid must be a string of at least one character, got an empty string"),
        (chat(image(1, uuid="\ud800")), "uuid must be a string"),
        (chat(_tiny := image(1), mm_processor_kwargs=[1]), "mm_processor_kwargs must be an object, got list"),
        (chat(_tiny, mm_processor_kwargs={"do_resize": False}), "mm_processor_kwargs.do_resize: a sidecar takes"),
        (chat(_tiny, mm_processor_kwargs={"max_pixels": -1}), "max_pixels must be a number of pixels of at least 1"),
        (chat(_tiny, mm_processor_kwargs={"max_pixels": True}), "max_pixels must be a number"),
        (chat(_tiny, mm_processor_kwargs={"size": {"height": 5}}), "size.height: only shortest_edge"),
        (chat(_tiny, media_io_kwargs={"image": {"image_mode": "L"}}), "media_io_kwargs.image"),
        (chat(_tiny, ec_transfer_params="x"), "ec_transfer_params must be an object, got str"),
    ],
)
def test_what_no_sidecar_could_do_is_said_before_anything_is_sent(request_: Any, says: str) -> None:
    with EncoderClient("unix:/nowhere") as client:
        for rewrite in (inline_embeds, metadata_only):
            with pytest.raises(ChatRequestError, match=says) as failure:
                rewrite(client, request_, max_image_bytes=1024 if "1024" in says else 1 << 20)
            assert "\n" not in str(failure.value)
            assert isinstance(failure.value, ValueError)


def test_two_images_cannot_have_one_uuid() -> None:
    with pytest.raises(ChatRequestError, match=r"content\[2\]: uuid 'twin' names another image"):
        ChatImages.of(chat(image(1, uuid="twin"), image(1, uuid="twin"), image(2, uuid="twin")), 1 << 20)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("data:;base64,AAAA"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
_types = st.sampled_from(["image_url", "input_image", "text", "video_url", None]) | _json
_parts = st.fixed_dictionaries(
    {}, optional={"type": _types, "image_url": _json | st.fixed_dictionaries({"url": _json}), "uuid": _json}
)
_messages = st.lists(
    st.fixed_dictionaries({}, optional={"content": st.lists(_parts | _json, max_size=4) | _json}) | _json
)
_names = st.sampled_from(["min_pixels", "max_pixels", "size", "videos_kwargs"])


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {"messages": _messages}, optional={"mm_processor_kwargs": st.dictionaries(_names, _json) | _json}
    )
)
def test_no_request_is_so_odd_that_it_crashes(request: dict[str, Any]) -> None:
    try:
        found = ChatImages.of(request, 1 << 20)
    except ChatRequestError as error:
        assert str(error)
    else:
        assert len(found.items) <= len(found.images)
