"""The tower on any torch device: ragged windows and unequal frames are gathered into padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sidecar.runtimes.torch_staging import Plan
from sidecar.vision.grid import Grid
from sidecar.vision.tower import EqualGroups, Gathered, Groups, Tower, Windows, rows
from sidecar.vision.windows import TOWER_PLAN_INPUTS, plan_windows


class PaddedEncoder:
    """Gathers and masks only what a run has: many have neither ragged windows nor unequal frames, and torch on CUDA has no
    attention over no groups at all."""

    def __init__(self, tower: Tower) -> None:
        self._tower = tower

    def plan(self, grids: Sequence[Grid]) -> Plan:
        plan = plan_windows(grids, self._tower.spec)
        arrays = {"patch_order": plan.patch_order, **plan.tower_inputs}
        return Plan(arrays=arrays, rows=len(plan.patch_order), tokens=len(plan.token_order))

    @torch.inference_mode()
    def encode(self, plan: Plan, patches: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        cos, sin, index, mask, back, *frame, token_order = (arrays[name] for name in TOWER_PLAN_INPUTS)
        windows = self._windows(index, mask, back, plan.rows)
        frames = self._frames(*frame, ragged=len(back) > 0)
        ordered = patches[arrays["patch_order"].long()]
        return rows(self._tower.encode(ordered, cos, sin, windows, frames), token_order)

    def _windows(self, index: Tensor, mask: Tensor, back: Tensor, patches: int) -> Groups:
        if len(back) == 0:
            return EqualGroups(self._tower.spec.window_patches)
        return Gathered(index, mask, back) if len(back) == patches else Windows(index, mask, back)

    @staticmethod
    def _frames(index: Tensor, mask: Tensor, back: Tensor, *, ragged: bool) -> Groups:
        """Frames lie one after another where nothing is ragged; a frame alone is in the plan's own order."""
        frames, longest = index.shape
        if frames == 1 or (not ragged and frames * longest == len(back)):
            return EqualGroups(longest)
        return Gathered(index, mask, back)
