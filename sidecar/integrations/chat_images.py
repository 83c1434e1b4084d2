"""The images of an OpenAI chat-completions request as the contract's items. Knows nothing of connections and embeddings.

What counts as an image part is what vLLM counts as one (vllm/renderers/chat_utils.py, `_parse_chat_message_content_mm_part`):
`image_url` and `input_image`, with the URL as a string or as `{"url": …}`, and whatever has both a `uuid` and an `image_url`.
A part with a `uuid` and no URL means an image that was sent before under that name.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sidecar.items import Item, image_item

MAX_IMAGE_BYTES = 64 << 20

_IMAGES = ("image_url", "input_image")
# In the order in which vLLM looks for them in a part that does not say its type.
_MEDIA = (
    *("image_url", "image_pil", "image_embeds", "audio_embeds", "video_embeds"),
    *("audio_url", "input_audio", "video_url", "input_image"),
)
_DATA_URL = re.compile(r"data:[^,]{0,256};base64,", re.I)
# Options of other media, which change no image and, in vLLM, no image's identity.
_NOT_OF_IMAGES = ("videos_kwargs", "audio_kwargs")
_BOUNDS = ("min_pixels", "max_pixels", "size")


class ChatRequestError(ValueError):
    """A request, or one part of it, that no sidecar could do anything with; the message says where and what would be right."""


@dataclass(frozen=True, slots=True)
class ChatImage:
    """One image part.

    Attributes:
        message: its message, from 0.
        part: its place in the message's content, from 0.
        medium: its place among all images, videos and sounds of the request, from 0: vLLM's index of the item.
        uuid: the caller's name for the image.
        item: its index in `ChatImages.items`; equal images have the same.
    """

    message: int
    part: int
    medium: int
    uuid: str | None
    item: int

    @property
    def place(self) -> str:
        return f"messages[{self.message}].content[{self.part}]"


@dataclass(frozen=True, slots=True)
class ChatImages:
    """A request's images, in its order, and what is to be encoded, each once.

    `bounded`: the request has bounds of its own on the images' area, so that a `uuid` alone does not name an embedding.
    """

    images: list[ChatImage]
    items: list[Item]
    bounded: bool

    @classmethod
    def of(cls, request: Mapping[str, Any], max_image_bytes: int) -> ChatImages:
        """Find them; the request stays as it is.

        Raises:
            ChatRequestError: if the request or an image part has not the form that it should have, an image is over
                `max_image_bytes`, two different ones have one uuid, or a processor option has no counterpart here.
        """
        parts = list(_image_parts(request))
        if not parts:
            return cls([], [], False)
        bounds = _bounds(request)
        _mapping(request, "ec_transfer_params")  # entries will be added to it
        found = cls([], [], bool(bounds))
        indices: dict[str | bytes, int] = {}
        for message, part, medium, image in parts:
            where = f"messages[{message}].content[{part}]"
            try:
                item = _item(image, bounds, max_image_bytes)
            except ChatRequestError as error:
                raise ChatRequestError(f"{where}: {error}") from None
            identity = item.key or hashlib.sha256(item.SerializeToString(deterministic=True)).digest()
            index = indices.setdefault(identity, len(found.items))
            if index == len(found.items):
                found.items.append(item)
            elif found.items[index].WhichOneof("content") is None:
                found.items[index] = item
            elif item.WhichOneof("content") is not None and found.items[index] != item:
                raise ChatRequestError(f"{where}: uuid {item.key[:80]!r} names another image earlier in the request")
            found.images.append(ChatImage(message, part, medium, item.key or None, index))
        return found


def _image_parts(request: Mapping[str, Any]) -> Iterator[tuple[int, int, int, Mapping[str, Any]]]:
    """(message, part, medium, the part itself) of each image."""
    if not isinstance(request, Mapping) or not isinstance(request.get("messages"), list):
        raise ChatRequestError("a chat request must be an object with a list of `messages`")
    medium = 0
    for number, message in enumerate(request["messages"]):
        if not isinstance(message, Mapping):
            raise ChatRequestError(f"messages[{number}]: a message must be an object, got {_kind(message)}")
        content = message.get("content")
        if not isinstance(content, list):
            continue  # text, or none
        for place, part in enumerate(content):
            if not isinstance(part, Mapping):
                continue
            kind = _medium(part)
            if kind in _IMAGES:
                yield number, place, medium, part
            medium += kind in _MEDIA


def _medium(part: Mapping[str, Any]) -> Any:
    named = part.get("type")
    if named is not None and part.get("uuid") is None:
        return named
    return next((medium for medium in _MEDIA if medium in part), named)


def _item(part: Mapping[str, Any], bounds: dict[str, Any], max_image_bytes: int) -> Item:
    uuid, url = part.get("uuid"), part.get("image_url")
    if uuid is not None and (not isinstance(uuid, str) or not uuid or not _is_unicode(uuid)):
        raise ChatRequestError(f"uuid must be a string of at least one character, got {_kind(uuid)}")
    if isinstance(url, Mapping):
        url = url.get("url")
    if url is None and uuid is not None:
        return Item(key=uuid, **bounds)
    if not isinstance(url, str):
        raise ChatRequestError(
            f'image_url must be {{"url": "data:… or https://…"}} (files by id are not taken), got {_kind(url)}'
        )
    if url[:5].lower() == "data:":
        return image_item(_decoded(url, max_image_bytes), key=uuid or "", **bounds)
    if url[:8].lower() != "https://" or not url.isascii():
        raise ChatRequestError(
            f"the URL must be https: in plain ASCII, or data: with base64; got {url[:32]!r}. Send others as data: URLs"
        )
    return Item(key=uuid or "", url=url, **bounds)


def _decoded(url: str, max_image_bytes: int) -> bytes:
    head = _DATA_URL.match(url)
    if head is None:
        raise ChatRequestError("a data: URL must begin like data:image/png;base64,")
    if (len(url) - head.end()) // 4 * 3 > max_image_bytes + 2:  # up to two of the last three bytes are padding
        raise ChatRequestError(f"the image has over {max_image_bytes} bytes, the limit; send a smaller one")
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ChatRequestError("the data: URL is not whole base64") from None
    if not data:
        raise ChatRequestError("the data: URL holds no image")
    return data


def _bounds(request: Mapping[str, Any]) -> dict[str, Any]:
    """`mm_processor_kwargs` as an item's bounds: `min_pixels` and `max_pixels`, or `size` with its two edges."""
    options = _mapping(request, "mm_processor_kwargs")
    # What else there is would change the embedding here or its identity in vLLM, and no answer would tell.
    for name in options.keys() - {*_BOUNDS, *_NOT_OF_IMAGES}:
        raise ChatRequestError(
            f"mm_processor_kwargs.{name}: a sidecar takes {', '.join(_BOUNDS)}; set the model's own at export"
        )
    if _mapping(request, "media_io_kwargs").get("image"):
        raise ChatRequestError("media_io_kwargs.image: a sidecar loads images in one way only, as vLLM does by default")
    size = _mapping(options, "size")
    for name in size.keys() - {"shortest_edge", "longest_edge"}:
        raise ChatRequestError(
            f"mm_processor_kwargs.size.{name}: only shortest_edge and longest_edge, in pixels of area"
        )
    bounds = {}
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        bound = options.get(name) if options.get(name) is not None else size.get(edge)
        if bound is None:
            continue
        if type(bound) is not int or not 0 < bound < 1 << 63:
            raise ChatRequestError(f"mm_processor_kwargs: {name} must be a number of pixels of at least 1")
        bounds[name] = bound
    return bounds


def without_bounds(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request once its bounds have been applied. vLLM would refuse them (unless it has --trust-request-mm-kwargs), or
    look for the image under another name."""
    options = {name: value for name, value in _mapping(request, "mm_processor_kwargs").items() if name not in _BOUNDS}
    rest = {name: value for name, value in request.items() if name != "mm_processor_kwargs"}
    return rest | ({"mm_processor_kwargs": options} if options else {})


def _mapping(parent: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = parent.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ChatRequestError(f"{name} must be an object, got {_kind(value)}")
    return value or {}


def _is_unicode(text: str) -> bool:
    """Whether it can be sent: JSON may hold halves of surrogate pairs, which UTF-8 may not."""
    return not re.search("[\ud800-\udfff]", text)


def _kind(value: object) -> str:
    return "nothing" if value is None else "an empty string" if value == "" else type(value).__name__
