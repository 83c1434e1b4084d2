"""What may be an image of a request, and between which sizes it is resized before it is encoded.

The sidecar gets the picture as it was sent, and decodes it as vLLM does: EXIF's orientation first, then transparency over white.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sidecar.items import Item, image_item


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of an image's area after resizing, in pixels; None leaves the model's own."""

    min_pixels: int | None = None
    max_pixels: int | None = None

    def __str__(self) -> str:
        return json.dumps(
            {name: value for name, value in (("min", self.min_pixels), ("max", self.max_pixels)) if value}
        )

    def changed_by(self, kwargs: Mapping[str, Any]) -> Bounds:
        """With what `mm_processor_kwargs` says: the size arguments of transformers' Qwen2VLImageProcessor.

        Raises:
            ValueError: if it says anything else. Left out, that would give another embedding than the one asked for.
        """
        given = {name: value for name, value in kwargs.items() if value is not None}
        size = given.pop("size", {})
        if not isinstance(size, Mapping):
            raise ValueError(f"mm_processor_kwargs: size must be an object, got {size!r}")
        edges = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
        given = {edges.get(name, f"size.{name}"): value for name, value in size.items()} | given
        if unknown := sorted(given.keys() - set(edges.values())):
            raise ValueError(
                f"mm_processor_kwargs: {', '.join(unknown)} cannot be honoured, only min_pixels and max_pixels"
            )
        for name, pixels in given.items():
            if not isinstance(pixels, int) or isinstance(pixels, bool) or not 0 < pixels < 1 << 31:
                raise ValueError(f"mm_processor_kwargs: {name} must be a whole number above 0, got {pixels!r}")
        return replace(self, **given)


def bounds(text: str) -> Bounds:
    """As a flag has them.

    Raises:
        ValueError: if it is no JSON object, or one that cannot be honoured.
    """
    try:
        kwargs = json.loads(text)
    except (ValueError, RecursionError):
        kwargs = None
    if not isinstance(kwargs, dict):
        raise ValueError('must be a JSON object such as {"max_pixels": 1003520}')
    return Bounds().changed_by(kwargs)


def item_of(media: Mapping[str, Any], bounds: Bounds) -> Item:
    """One MultiModalInput of Dynamo's.

    Raises:
        ValueError: if it is no image that a sidecar can be sent.
    """
    if media.get("video_url") is not None:
        raise ValueError("it is a video, and Dynamo's encode workers take images")
    if media.get("image_decoded") is not None:
        raise ValueError("its pixels are in the frontend's memory: start Dynamo's workers without --frontend-decoding")
    url = media.get("image_url")
    if not isinstance(url, str) or not url:
        raise ValueError("image_url is missing")
    scheme, colon, _ = url[:32].partition(":")
    if scheme.lower() == "data":
        return image_item(_decoded(url), min_pixels=bounds.min_pixels, max_pixels=bounds.max_pixels)
    if scheme.lower() == "https":
        # The sidecar fetches it, by its --url-… settings.
        return Item(url=url, min_pixels=bounds.min_pixels, max_pixels=bounds.max_pixels)
    raise ValueError(f"its URL must be https: or data:{f', not {scheme}:' if colon else ''}")


def _decoded(url: str) -> bytes:
    """The bytes of a data URL (RFC 2397) in base64; a picture as %41%42… would take eighty times its size to read."""
    kind, comma, content = url[5:].partition(",")
    if not comma:
        raise ValueError("its data URL has no comma between type and content")
    if not kind.lower().endswith(";base64"):
        raise ValueError("its data URL must say ;base64")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:  # a ValueError where it is not ASCII
        raise ValueError(f"its data URL is no base64: {error}") from error
