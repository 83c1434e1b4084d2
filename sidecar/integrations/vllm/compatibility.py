"""The versions of vLLM whose connector interface this was tested with."""

from __future__ import annotations

import logging
import re

logger = logging.getLogger("vllm." + __name__)

TESTED = ("0.31", "0.32")


def check_version(version: str) -> bool:
    """Warn of a vLLM that this was not tested with; returns whether it was."""
    found = re.match(r"\d+\.\d+", version)
    if found and found[0] in TESTED:
        return True
    logger.warning(
        "vLLM %s is not among the versions that this connector was tested with (%s): its interface for encoder caches may have "
        "changed. Compare some answers with and without the connector before you rely on it.",
        version,
        ", ".join(TESTED),
    )
    return False
