"""How a part is asked whether it can serve. An answer that does not come at once counts as no."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable

_ANSWER_S = 2.0


def answers(url: str) -> Callable[[], bool]:
    """Whether a GET of the URL is answered with 200."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy between us and loopback

    def ask() -> bool:
        try:
            with direct.open(url, timeout=_ANSWER_S) as response:
                return bool(response.status == 200)
        except OSError:  # refused, timed out, or any other status
            return False

    return ask


def lists_a_model(url: str) -> Callable[[], bool]:
    """Whether the OpenAI server at the URL has a model to serve: some answer before they have."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask() -> bool:
        try:
            with direct.open(f"{url}/v1/models", timeout=_ANSWER_S) as response:
                return bool(json.load(response).get("data"))
        except (OSError, ValueError):
            return False

    return ask
