"""What Dynamo's prefill worker asks of an encode worker, and what it is answered.

Format: vLLMMultimodalRequest, MultiModalGroup and TransferRequest of Dynamo 1.6 (dynamo/vllm/multimodal_utils/protocol.py,
dynamo/common/multimodal/embedding_transfer.py). A request is one JSON text; the answer is the same object with each group's media
taken out and what leads to its embedding put in. Fields that are not named here go back as they came.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from sidecar.items import Item, image_item
from sidecar.vision.grid import Grid


class RequestError(ValueError):
    """The request cannot be served, whoever is asked: it says what was wrong with it."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Pixels of an image after resizing, as prefill's --mm-processor-kwargs has them; None leaves the model's own."""

    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True, slots=True)
class Transfer:
    """How prefill gets one embedding. `request`: a path in `local` mode, an object of NIXL's in the others."""

    shape: tuple[int, int, int]
    dtype: str
    request: Any


class EncodeRequest:
    """One request, whose images are asked for in the order of `images`."""

    def __init__(self, raw: str | bytes | dict[str, Any], bounds: Bounds) -> None:
        """Raises:
        RequestError: if it is no such request, or an image is none.
        """
        self._request = _parsed(raw)
        groups = self._request.get("multimodal_inputs")
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise RequestError("multimodal_inputs must be a list of objects, one for each image")
        self._groups: list[dict[str, Any]] = groups
        self.id = str(self._request.get("request_id") or "")
        self.images = [_image(number, group, bounds) for number, group in enumerate(groups, 1)]

    def answer(self, embeddings: list[tuple[Grid, Transfer]]) -> str:
        """`embeddings`: one for each image."""
        for group, (grid, transfer) in zip(self._groups, embeddings, strict=True):
            group["multimodal_input"] |= {"image_url": None, "image_decoded": None}
            group["image_grid_thw"] = [list(grid)]
            group["embeddings_shape"] = list(transfer.shape)
            group["serialized_request"] = {
                "embeddings_shape": list(transfer.shape),
                "embedding_dtype_str": transfer.dtype,
                "serialized_request": transfer.request,
            }
        return json.dumps(self._request)


def _parsed(raw: str | bytes | dict[str, Any]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the request is no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise RequestError(f"the request must be an object, not {type(raw).__name__}")
    return raw


def _image(number: int, group: dict[str, Any], bounds: Bounds) -> Item:
    media = group.get("multimodal_input")
    if not isinstance(media, dict):
        raise RequestError(f"image {number}: multimodal_input is missing")
    if media.get("video_url") is not None:
        raise RequestError(f"image {number} is a video; Dynamo's encode workers take images")
    if media.get("image_decoded") is not None:
        raise RequestError(
            f"image {number} was decoded by the frontend, and its pixels lie in the frontend's memory; start the workers without "
            "--frontend-decoding"
        )
    url = media.get("image_url")
    if not isinstance(url, str) or not url:
        raise RequestError(f"image {number}: image_url must be a data: or https: URL")
    if url[:5].lower() == "data:":
        try:
            return image_item(_decoded(url), min_pixels=bounds.min_pixels, max_pixels=bounds.max_pixels)
        except ValueError as error:
            raise RequestError(f"image {number}: {error}") from error
    # The sidecar fetches it, by the rules of its --url-input.
    return Item(url=url, min_pixels=bounds.min_pixels, max_pixels=bounds.max_pixels)


def _decoded(url: str) -> bytes:
    """The bytes of a data URL (RFC 2397)."""
    kind, comma, content = url[5:].partition(",")
    if not comma:
        raise ValueError("its data URL has no comma between type and content")
    if not kind.lower().endswith(";base64"):
        return unquote_to_bytes(content)
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError(f"its data URL is no base64: {error}") from error
