"""A vLLM that takes raw images and leaves the vision tower's weights on the disk.

vLLM leaves a tower out where no image may come at all (`--language-model-only`, or a limit of 0). Here images may come, their
embeddings from a sidecar. That takes a private method of vLLM's, so it is for the versions named below, and off by default.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import vllm
from vllm.model_executor.models.interfaces import SupportsMultiModal

from sidecar.integrations.vllm.compatibility import TESTED, is_tested

logger = logging.getLogger("vllm." + __name__)

_MARK = "_mark_tower_model"


class TowerlessError(RuntimeError):
    """This vLLM cannot be without its tower."""


def check_profiling(model_config: Any) -> None:
    """Raises:
    TowerlessError: if vLLM would run the tower at its start.
    """
    if not model_config.multimodal_config.skip_mm_profiling:
        raise TowerlessError("without the tower's weights vLLM needs --skip-mm-profiling")


def leave_out_towers() -> None:
    """To be called in each process that loads the model, before it does.

    Raises:
        TowerlessError: if this vLLM is of another version than this was tested with.
    """
    if not is_tested(vllm.__version__) or not hasattr(SupportsMultiModal, _MARK):
        raise TowerlessError(
            f"leaving out the tower works with vLLM {', '.join(TESTED)}, this is {vllm.__version__}: take load_tower: false away"
        )
    original = getattr(SupportsMultiModal, _MARK)
    if getattr(original, "leaves_out", False):
        return

    @contextmanager
    def mark(self: Any, vllm_config: Any, *arguments: Any, **keywords: Any) -> Iterator[None]:
        config = vllm_config.model_config.multimodal_config
        before, config.language_model_only = config.language_model_only, True
        try:
            with original(self, vllm_config, *arguments, **keywords):
                yield
        finally:
            config.language_model_only = before

    mark.leaves_out = True  # type: ignore[attr-defined]
    setattr(SupportsMultiModal, _MARK, mark)
    logger.info("the vision tower's weights are left out")
