"""Chat requests with small pictures of noise."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

TEXT = {"type": "text", "text": "What is it?"}
VIDEO = {"type": "video_url", "video_url": {"url": "https://example.com/film.mp4"}}
Content = list[dict[str, Any]]


def png(seed: int, width: int = 84, height: int = 56) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def image(seed: int, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(png(seed))}, **more}


def chat(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "toy", "messages": [{"role": "user", "content": list(parts)}], **more}


def content(request: dict[str, Any], message: int = 0) -> Content:
    parts: Content = request["messages"][message]["content"]
    return parts
