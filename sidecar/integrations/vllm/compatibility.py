"""The versions of vLLM whose connector interface this was tested with."""

from __future__ import annotations

import logging
import re

logger = logging.getLogger("vllm." + __name__)

TESTED = ("0.31", "0.32")


def is_tested(version: str) -> bool:
    found = re.match(r"\d+\.\d+", version)
    return found is not None and found[0] in TESTED


def check_version(version: str) -> bool:
    """Warn of a vLLM that this was not tested with; returns whether it was."""
    if is_tested(version):
        return True
    logger.warning(
        "vLLM %s is not among the versions that this connector was tested with (%s): its interface for encoder caches may have "
        "changed. Compare some answers with and without the connector before you rely on it.",
        version,
        ", ".join(TESTED),
    )
    return False
