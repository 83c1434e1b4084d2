"""What Dynamo's prefill worker asks of an encode worker, and what it is answered.

Format: vLLMMultimodalRequest, MultiModalGroup and TransferRequest of Dynamo 1.6 (dynamo/vllm/multimodal_utils/protocol.py,
dynamo/common/multimodal/embedding_transfer.py). A request is one JSON text; the answer is the same object with each group's media
taken out and what leads to its embedding put in. Fields that are not named here go back as they came.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from sidecar.integrations.dynamo.images import Bounds, item_of
from sidecar.items import Item
from sidecar.replies import Embedding
from sidecar.vision.grid import Grid


class RequestError(ValueError):
    """The request cannot be served, whoever is asked: it says what was wrong with it."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """How prefill gets one embedding.

    Attributes:
        shape: (1, tokens, width).
        dtype: torch's name for it.
        request: a path in `local` mode, what NIXL's senders made in the others.
    """

    shape: tuple[int, int, int]
    dtype: str
    request: Any

    @classmethod
    def of(cls, embedding: Embedding, request: Any) -> Self:
        tokens, width = embedding.data.shape
        return cls((1, tokens, width), str(embedding.dtype), request)


class EncodeRequest:
    """
    Attributes:
        images: what is to be encoded, in order.
    """

    def __init__(self, raw: str | bytes | dict[str, Any], bounds: Bounds) -> None:
        """
        Args:
            bounds: for a request that brings none of its own.

        Raises:
            RequestError: if it is no such request, or an image of it is none that can be encoded.
        """
        self._request = _parsed(raw)
        groups = self._request.get("multimodal_inputs")
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise RequestError("multimodal_inputs must be a list of objects, one for each image")
        self._groups: list[dict[str, Any]] = groups
        try:
            bounds = bounds.changed_by(_processor_kwargs(self._request))
        except ValueError as error:
            raise RequestError(str(error)) from error
        self.images = [_image(number, group, bounds) for number, group in enumerate(groups, 1)]

    def answer(self, embeddings: Sequence[tuple[Grid, Transfer]]) -> str:
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


def _processor_kwargs(request: dict[str, Any]) -> dict[str, Any]:
    """Dynamo 1.6 sends none; vLLM's prompts have a place for them."""
    prompt = request.get("engine_prompt")
    kwargs = request.get("mm_processor_kwargs") or (
        prompt.get("mm_processor_kwargs") if isinstance(prompt, dict) else None
    )
    if kwargs and not isinstance(kwargs, dict):
        raise RequestError(f"mm_processor_kwargs must be an object, got {kwargs!r}")
    return kwargs or {}


def _image(number: int, group: dict[str, Any], bounds: Bounds) -> Item:
    media = group.get("multimodal_input")
    if not isinstance(media, dict):
        raise RequestError(f"image {number}: multimodal_input is missing")
    try:
        return item_of(media, bounds)
    except ValueError as error:
        raise RequestError(f"image {number}: {error}") from error
