"""OpenAI chat-completions requests whose images a sidecar has encoded, for a vLLM that needs no connector of ours.

    with EncoderClient("encoder:50051") as client:
        request = inline_embeds(client, request)  # POST it to any vLLM that has --enable-mm-embeds

    with EncoderClient("encoder:50051", store="/dev/shm/epd-encoder") as client:
        held = metadata_only(client, request)  # for a vLLM whose connector reads the store, or fetches by key
        ...  # POST held.request; when the answer has begun:
        client.release(held.leases)

A request is a dict, as its JSON is parsed; it is never changed. All its images go in one call, equal ones once. Everything but
the image parts, `ec_transfer_params` and applied bounds is handed on as it was. docs/chat.md has the formats.

The two `…_async` functions are the same for an `AsyncEncoderClient`. All four raise:
    ChatRequestError: a ValueError that says which part of the request is wrong, before anything is sent.
    ChatImageError: an EncodeError, if one image could not be encoded; the message says which.
    EncodeError, ProtocolError: as the client's `encode`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sidecar.client import AsyncEncoderClient, EncoderClient
from sidecar.integrations.chat_images import (
    MAX_IMAGE_BYTES,
    ChatImage,
    ChatImages,
    ChatRequestError,
    without_bounds,
)
from sidecar.integrations.tensor_file import tensor_file
from sidecar.replies import Embedding, EncodeError, ItemError, Result

__all__ = [
    "ChatImageError",
    "ChatRequestError",
    "HeldRequest",
    "inline_embeds",
    "inline_embeds_async",
    "metadata_only",
    "metadata_only_async",
]


class ChatImageError(EncodeError):
    """One image could not be encoded; `place` is its part of the request, such as `messages[0].content[1]`."""

    def __init__(self, place: str, error: ItemError) -> None:
        super().__init__(error.code, f"{place}: {error.message}", error.details)
        self.place = place


@dataclass(frozen=True, slots=True)
class HeldRequest:
    """A request whose embeddings lie in the sidecar's store until `leases` are given back, or expire."""

    request: dict[str, Any]
    leases: list[str]


def inline_embeds(
    client: EncoderClient,
    request: Mapping[str, Any],
    timeout_s: float | None = None,
    *,
    max_image_bytes: int = MAX_IMAGE_BYTES,
) -> dict[str, Any]:
    """The request with each image as an `image_embeds` part that holds the embedding itself.

    Without a `uuid` vLLM hashes the embedding and its grid, so that only equal ones share. So none is made up, and a caller's is
    kept only where the request has no bounds of its own: it names an image, whatever its size.
    """
    found = ChatImages.of(request, max_image_bytes)
    results = client.encode(found.items, timeout_s) if found.items else []
    return _inline(request, found, results)


async def inline_embeds_async(
    client: AsyncEncoderClient,
    request: Mapping[str, Any],
    timeout_s: float | None = None,
    *,
    max_image_bytes: int = MAX_IMAGE_BYTES,
) -> dict[str, Any]:
    """As `inline_embeds`."""
    found = ChatImages.of(request, max_image_bytes)
    results = await client.encode(found.items, timeout_s) if found.items else []
    return _inline(request, found, results)


def metadata_only(
    client: EncoderClient,
    request: Mapping[str, Any],
    timeout_s: float | None = None,
    *,
    max_image_bytes: int = MAX_IMAGE_BYTES,
) -> HeldRequest:
    """The request with each image as an `image_embeds` part that holds its grid and, as `uuid`, its name in the sidecar's store.

    The name is a hash of what shapes the embedding and of the caller's `uuid`: under it lies this embedding or none, whatever
    else the `uuid` is used for. The client needs `store`, and each embedding has to be in it, or this is a `ChatImageError`.
    """
    found = ChatImages.of(request, max_image_bytes)
    results = client.encode(found.items, timeout_s, hold=True) if found.items else []
    try:
        return _metadata_only(request, found, results)
    except EncodeError:
        with suppress(EncodeError):  # they expire
            client.release(_leases(results), timeout_s)
        raise


async def metadata_only_async(
    client: AsyncEncoderClient,
    request: Mapping[str, Any],
    timeout_s: float | None = None,
    *,
    max_image_bytes: int = MAX_IMAGE_BYTES,
) -> HeldRequest:
    """As `metadata_only`."""
    found = ChatImages.of(request, max_image_bytes)
    results = await client.encode(found.items, timeout_s, hold=True) if found.items else []
    try:
        return _metadata_only(request, found, results)
    except EncodeError:
        with suppress(EncodeError):
            await client.release(_leases(results), timeout_s)
        raise


def _inline(request: Mapping[str, Any], found: ChatImages, results: list[Result]) -> dict[str, Any]:
    embeddings = _embeddings(found, results)
    payloads = [
        {"image_embeds": base64.b64encode(tensor_file(each.data, each.dtype)).decode(), **_grid(each)}
        for each in embeddings
    ]
    parts = [_part(None if found.bounded else image.uuid, payloads[image.item]) for image in found.images]
    return _rewritten(request, found.images, parts)


def _metadata_only(request: Mapping[str, Any], found: ChatImages, results: list[Result]) -> HeldRequest:
    if not found.images:
        return HeldRequest(dict(request), [])
    embeddings = _embeddings(found, results)
    parts = []
    announced: dict[str, dict[str, Any]] = {}
    for image in found.images:
        embedding = embeddings[image.item]
        if embedding.path is None:
            raise ChatImageError(image.place, _NOT_STORED)
        name = embedding.path.parent.name
        parts.append(_part(name, _grid(embedding)))
        entry = announced.setdefault(name, {"item_indices": [], "metadata": _grid(embedding)})
        entry["item_indices"].append(image.medium)
    rewritten = _rewritten(request, found.images, parts)
    rewritten["ec_transfer_params"] = {**(rewritten.get("ec_transfer_params") or {}), **announced}
    return HeldRequest(rewritten, _leases(results))


_UNKNOWN = ItemError(
    "NOT_FOUND", "there is no image, and the sidecar has none stored under this uuid; send the image too"
)
_NOT_STORED = ItemError(
    "FAILED_PRECONDITION",
    "the embedding is in no store that this client reads; give the client the sidecar's --store, enlarge one that is full, "
    "or send embeddings inline",
)


def _embeddings(found: ChatImages, results: list[Result]) -> list[Embedding]:
    """Raises:
    ChatImageError: for the first image that has none.
    """
    for image in found.images:
        if isinstance(result := results[image.item], ItemError):
            unsent = found.items[image.item].WhichOneof("content") is None and result.code == "INVALID_ARGUMENT"
            raise ChatImageError(image.place, _UNKNOWN if unsent else result)
    return [result for result in results if isinstance(result, Embedding)]


def _leases(results: list[Result]) -> list[str]:
    return [result.lease for result in results if isinstance(result, Embedding) and result.lease]


def _grid(embedding: Embedding) -> dict[str, list[int]]:
    return {"image_grid_thw": list(embedding.grid)}


def _part(uuid: str | None, payload: dict[str, Any]) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "image_embeds", "image_embeds": payload}
    return part if uuid is None else part | {"uuid": uuid}


def _rewritten(request: Mapping[str, Any], images: list[ChatImage], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The request with `parts` in place of `images`; it shares with the old one whatever is not changed."""
    if not images:
        return dict(request)
    messages = list(request["messages"])
    for number in {image.message for image in images}:
        messages[number] = {**messages[number], "content": list(messages[number]["content"])}
    for image, part in zip(images, parts, strict=True):
        messages[image.message]["content"][image.part] = part
    return {**without_bounds(request), "messages": messages}
