"""NIXL's progress threads rest between two looks instead of keeping a core each busy.

With this directory on PYTHONPATH and NIXL_PTHR_DELAY_US set, in microseconds. NIXL's Python agent sets the delay to 0 and has no
option for it (nixl 1.5, `_api.py`), which costs nothing beside a GPU and half the machine on two cores.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from importlib.abc import MetaPathFinder
from typing import Any

_AGENT = re.compile(r"(nixl_\w+)\._api")


class _BeforeAgent(MetaPathFinder):
    """Finds nothing. It is asked before the agent's module is loaded, and changes what that module will use."""

    def __init__(self, delay_us: int) -> None:
        self._delay_us = delay_us

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if (found := _AGENT.fullmatch(fullname)) is not None:
            bindings = importlib.import_module(found[1] + "._bindings")
            bindings.nixlAgentConfig = _resting(bindings.nixlAgentConfig, self._delay_us)


def _resting(config: type[Any], delay_us: int) -> type[Any]:
    class RestingConfig(config):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value or delay_us if name == "pthrDelay" else value)

    return RestingConfig


if (_delay_us := os.environ.get("NIXL_PTHR_DELAY_US", "")).isdecimal() and int(_delay_us) > 0:
    sys.meta_path.insert(0, _BeforeAgent(int(_delay_us)))
