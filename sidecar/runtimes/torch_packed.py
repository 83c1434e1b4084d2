"""The tower as a GPU likes it: attention over packed sequences, widths that suit tensor cores, blocks compiled once.

A block is compiled and not the tower: 32 blocks share one compilation for each kind of attention, which takes seconds where the
whole takes half a minute. Lengths are symbolic, so that no size of image is compiled again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sidecar.runtimes.torch_staging import Plan
from sidecar.vision.grid import Grid
from sidecar.vision.packing import PackedPlan, pack
from sidecar.vision.spec import TowerSpec
from sidecar.vision.tower import MLP, Attention, Block, Groups, Tower, rotary_tables, rotate
from sidecar.vision.windows import Index

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn  # since torch 2.10
except ImportError:
    varlen_attn = None


# Rows are padded to this: kernels for a multiple of 16 rows serve every run.
ROW_MULTIPLE = 64
# 128 bytes of bfloat16. The 3B's MLP is 3420 wide, whose rows are not even 16-byte aligned; its GEMMs ran at half the rate.
_WIDTH_MULTIPLE = 64
_LEAST_CAPABILITY = (8, 0)  # what torch's flash attention takes


def can_pack(device: torch.device, dtype: torch.dtype, spec: TowerSpec) -> bool:
    """Whether torch has attention over packed sequences for this."""
    return (
        varlen_attn is not None
        and device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and spec.head_dim % 8 == 0
        and spec.head_dim <= 256
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    )


@dataclass(frozen=True, slots=True)
class Sequences:
    """Groups of any lengths that lie one after another: `ends` (G + 1,) int32 from 0, none longer than `longest`."""

    ends: Tensor
    longest: int

    def attend(self, attention: Attention, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        spec = attention.spec
        heads = qkv.reshape(-1, 3, spec.num_heads, spec.head_dim)
        query, key = (rotate(heads[:, part], cos[:, None], sin[:, None]) for part in (0, 1))
        assert varlen_attn is not None
        mixed: Tensor = varlen_attn(query, key, heads[:, 2], self.ends, self.ends, self.longest, self.longest)
        return mixed.reshape(-1, spec.hidden_size)


class FusedMLP(nn.Module):
    """`MLP` with gate and up in one product, and its inner width filled up with zeros: silu(0)·0 adds nothing."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        width = mlp.gate_proj.weight.shape[0]
        more = -width % _WIDTH_MULTIPLE
        both = (mlp.gate_proj, mlp.up_proj)
        self.gate_up = nn.Parameter(
            torch.cat([functional.pad(layer.weight, (0, 0, 0, more)) for layer in both]), requires_grad=False
        )
        biases = [functional.pad(layer.bias, (0, more)) for layer in both if layer.bias is not None]
        self.gate_up_bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        self.down = nn.Parameter(functional.pad(mlp.down_proj.weight, (0, more)).contiguous(), requires_grad=False)
        self.down_bias = mlp.down_proj.bias
        self.gated: Callable[[Tensor], Tensor] = gated

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(
            self.gated(functional.linear(x, self.gate_up, self.gate_up_bias)), self.down, self.down_bias
        )


def gated(both: Tensor) -> Tensor:
    """gate and up side by side, (N, 2·width) → silu(gate) · up, (N, width)."""
    gate, up = both.chunk(2, dim=-1)
    return functional.silu(gate) * up


@dataclass(frozen=True, slots=True)
class PackedInputs:
    """A `PackedPlan` on the device, and the patches (N, patch_width) that it orders."""

    patches: Tensor
    patch_order: Tensor
    positions: Tensor
    window_ends: Tensor
    frame_ends: Tensor
    token_order: Tensor


@dataclass(frozen=True, slots=True)
class Room:
    """So many rows, windows and frames; a plan that needs fewer is filled up, and lies in one int32 vector for one copy."""

    rows: int
    windows: int
    frames: int
    merge_unit: int

    @property
    def _lengths(self) -> list[int]:
        return [self.rows, 2 * self.rows, self.windows + 1, self.frames + 1, self.rows // self.merge_unit]

    def holds(self, plan: PackedPlan) -> bool:
        return (
            plan.patches <= self.rows
            and len(plan.window_ends) <= self.windows + 1
            and len(plan.frame_ends) <= self.frames + 1
        )

    def vector(self, plan: PackedPlan) -> Index:
        """Rows in excess read the first patch and belong to no sequence; sequences in excess are empty."""
        parts = (plan.patch_order, plan.positions.reshape(-1), plan.window_ends, plan.frame_ends, plan.token_order)
        fillings = (0, 0, plan.patches, plan.patches, 0)
        vector = np.empty(sum(self._lengths), np.int32)
        start = 0
        for part, length, filling in zip(parts, self._lengths, fillings, strict=True):
            vector[start : start + len(part)] = part
            vector[start + len(part) : start + length] = filling
            start += length
        return vector

    def inputs(self, patches: Tensor, vector: Tensor) -> PackedInputs:
        """Views of what `vector` made."""
        order, positions, window_ends, frame_ends, token_order = torch.split(vector, self._lengths)
        return PackedInputs(patches, order, positions.reshape(-1, 2), window_ends, frame_ends, token_order)


class PackedTower:
    """Takes the tower's weights over: its MLPs are fused in place."""

    def __init__(self, tower: Tower) -> None:
        for block in tower.blocks:
            block.mlp = FusedMLP(cast(MLP, block.mlp))
        self.spec = tower.spec
        self._tower = tower
        self._windows: Callable[[Tensor], Groups]
        self._enter: Callable[..., tuple[Tensor, ...]]
        self._see_frames: Callable[..., tuple[Tensor, Tensor]]
        self._see_windows: Callable[..., tuple[Tensor, Tensor]]
        self._leave: Callable[..., Tensor]
        self.stay_eager()

    @torch.inference_mode()
    def __call__(self, inputs: PackedInputs, longest_frame: int) -> Tensor:
        """Embeddings (T, out_hidden_size) in the caller's order."""
        x, update, cos, sin = self._enter(inputs.patches, inputs.patch_order, inputs.positions)
        for block in self._tower.blocks:
            if block.full_attention:
                x, update = self._see_frames(block, x, update, cos, sin, inputs.frame_ends, longest_frame)
            else:
                x, update = self._see_windows(block, x, update, cos, sin, inputs.window_ends)
        return self._leave(x, update, inputs.token_order)

    def compile(self) -> None:
        """Each part is compiled at its first call from now on.

        Raises:
            ImportError: where there is no Triton.
        """
        from sidecar.runtimes import torch_kernels

        if torch_kernels.can_fuse_windows(self.spec):
            self._windows = torch_kernels.FusedWindows
        self._set_gate(torch_kernels.gated)
        self._enter = torch.compile(self._embed, dynamic=True)
        self._see_frames = torch.compile(self._through_frames, dynamic=True)
        self._see_windows = torch.compile(self._through_windows, dynamic=True)
        self._leave = torch.compile(self._merge, dynamic=True)
        self.compiled = True

    def stay_eager(self) -> None:
        """Compile nothing, as after a compilation that failed."""
        self._windows = lambda ends: Sequences(ends, self.spec.window_patches)
        self._set_gate(gated)
        self._enter, self._leave = self._embed, self._merge
        self._see_frames, self._see_windows = self._through_frames, self._through_windows
        self.compiled = False

    def _set_gate(self, gate: Callable[[Tensor], Tensor]) -> None:
        for block in self._tower.blocks:
            cast(FusedMLP, block.mlp).gated = gate

    def _embed(self, patches: Tensor, order: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        x = self._tower.patch_embed(patches[order.long()], self._tower.compute_dtype)
        return (x, torch.zeros_like(x), *rotary_tables(positions, self.spec))

    def _through_frames(
        self, block: Block, x: Tensor, update: Tensor, cos: Tensor, sin: Tensor, ends: Tensor, longest: int
    ) -> tuple[Tensor, Tensor]:
        return block.terms(x + update, cos, sin, Sequences(ends, longest))

    def _through_windows(
        self, block: Block, x: Tensor, update: Tensor, cos: Tensor, sin: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        return block.terms(x + update, cos, sin, self._windows(ends))

    def _merge(self, x: Tensor, update: Tensor, token_order: Tensor) -> Tensor:
        return self._tower.merger(x + update)[token_order.long()]


@dataclass(frozen=True, slots=True)
class PackedRun(Plan):
    room: Room
    longest_frame: int


class PackedEncoder:
    """Runs of any size, with the lengths that they have."""

    def __init__(self, tower: PackedTower) -> None:
        self.tower = tower

    def plan(self, grids: Sequence[Grid]) -> PackedRun:
        plan = pack(grids, self.tower.spec)
        return self.place(plan, self.exact_room(plan))

    def exact_room(self, plan: PackedPlan) -> Room:
        rows = -(-plan.patches // ROW_MULTIPLE) * ROW_MULTIPLE
        return Room(rows, len(plan.window_ends) - 1, len(plan.frame_ends) - 1, self.tower.spec.merge_unit)

    def place(self, plan: PackedPlan, room: Room) -> PackedRun:
        return PackedRun(
            arrays={"plan": room.vector(plan)},
            rows=room.rows,
            tokens=len(plan.token_order),
            room=room,
            longest_frame=plan.longest_frame,
        )

    def encode(self, run: PackedRun, patches: Tensor, plan: Mapping[str, Tensor]) -> Tensor:
        return self.tower(run.room.inputs(patches, plan["plan"]), run.longest_frame)
