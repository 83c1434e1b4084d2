"""Two steps of the tower as Triton kernels, where what torch has or compiles by itself moves the data several times.

Attention inside windows: rotary encoding, scores, softmax and mix of values in one reading of qkv. A window has 64 patches;
general attention kernels work on blocks of 128 queries, and need the rotated queries and keys written out before.

The gate of an MLP: silu(gate) · up, whose two halves lie side by side in each row.

Both are operators of torch, so that a compiler takes them as they are: compiled into its own code they lost what Triton knows of
their arguments, and took three times as long.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidecar.vision.spec import TowerSpec
from sidecar.vision.tower import Attention

_GATE_BLOCK = 1024
# Three windows at a time on each of a Hopper's multiprocessors.
_WINDOW_REGISTERS = 168


def can_fuse_windows(spec: TowerSpec) -> bool:
    """Whether a window is a block that tensor cores take: a power of two, from 16 on."""
    return spec.window_patches >= 16 and spec.window_patches & (spec.window_patches - 1) == 0 and spec.head_dim >= 32


@dataclass(frozen=True, slots=True)
class FusedWindows:
    """Windows that lie one after another, none longer than `spec.window_patches`: `ends` (W + 1,) int32 from 0."""

    ends: Tensor

    def attend(self, attention: Attention, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        spec = attention.spec
        mixed: Tensor = attend_in_windows(qkv, cos, sin, self.ends, spec.num_heads, spec.window_patches)
        return mixed


@torch.library.custom_op("epd::attend_in_windows", mutates_args=())
def attend_in_windows(qkv: Tensor, cos: Tensor, sin: Tensor, ends: Tensor, heads: int, longest: int) -> Tensor:
    """qkv (N, 3·hidden), cos and sin (N, head_dim) float32 → (N, hidden); rows of no window are left as they come."""
    hidden = qkv.shape[1] // 3
    half = hidden // heads // 2
    out = torch.empty(qkv.shape[0], hidden, dtype=qkv.dtype, device=qkv.device)
    _attend_in_window[(ends.shape[0] - 1, heads)](
        qkv,
        cos,
        sin,
        ends,
        out,
        (2 * half) ** -0.5,
        HEADS=heads,
        HALF=half,
        HALF_BLOCK=triton.next_power_of_2(half),
        LENGTH=longest,
        maxnreg=_WINDOW_REGISTERS,
    )
    return out


@attend_in_windows.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, ends: Tensor, heads: int, longest: int) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)


@torch.library.custom_op("epd::gated", mutates_args=())
def gated(both: Tensor) -> Tensor:
    """gate and up side by side, (N, 2·width) → silu(gate) · up, (N, width)."""
    count, width = both.shape[0], both.shape[1] // 2
    out = torch.empty(count, width, dtype=both.dtype, device=both.device)
    _gate[(count, triton.cdiv(width, _GATE_BLOCK))](both, out, WIDTH=width, BLOCK=_GATE_BLOCK)
    return out


@gated.register_fake
def _(both: Tensor) -> Tensor:
    return both.new_empty(both.shape[0], both.shape[1] // 2)


@triton.jit
def _gate(both, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate = tl.load(both + row * (2 * WIDTH) + column, mask=mask).to(tl.float32)
    up = tl.load(both + row * (2 * WIDTH) + WIDTH + column, mask=mask).to(tl.float32)
    tl.store(out + row * WIDTH + column, (gate * tl.sigmoid(gate) * up).to(both.dtype.element_ty), mask=mask)


@triton.jit
def _attend_in_window(
    qkv,  # (N, 3, HEADS, 2·HALF)
    cos,  # (N, 2·HALF) float32; both halves of a row are equal
    sin,
    ends,
    out,  # (N, HEADS, 2·HALF)
    scale,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    LENGTH: tl.constexpr,
):
    window, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(ends + window)
    length = tl.load(ends + window + 1) - start
    if length > 0:
        row, column = tl.arange(0, LENGTH), tl.arange(0, HALF_BLOCK)
        present = row < length
        mask = present[:, None] & (column < HALF)[None, :]
        patch = (start + row)[:, None]

        # A head's vector is worked on as its two halves, which rotate against each other. Keys come first and what was read
        # stays narrow: with everything wide at once the registers run over, and it takes three times as long.
        query = patch * (3 * HEADS * 2 * HALF) + head * (2 * HALF) + column[None, :]
        key = query + HEADS * 2 * HALF
        value = key + HEADS * 2 * HALF
        turn = patch * (2 * HALF) + column[None, :]
        c = tl.load(cos + turn, mask=mask, other=0.0)
        s = tl.load(sin + turn, mask=mask, other=0.0)
        narrow = qkv.dtype.element_ty
        k1 = tl.load(qkv + key, mask=mask, other=0.0)
        k2 = tl.load(qkv + key + HALF, mask=mask, other=0.0)
        turned_k1, turned_k2 = (k1 * c - k2 * s).to(narrow), (k2 * c + k1 * s).to(narrow)
        q1 = tl.load(qkv + query, mask=mask, other=0.0)
        q2 = tl.load(qkv + query + HALF, mask=mask, other=0.0)
        scores = tl.dot((q1 * c - q2 * s).to(narrow), tl.trans(turned_k1))
        scores += tl.dot((q2 * c + q1 * s).to(narrow), tl.trans(turned_k2))

        scores = tl.where(present[None, :], scores * scale, -float("inf"))
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        total = tl.sum(weights, 1)[:, None]
        weights = weights.to(narrow)
        to = out + patch * (HEADS * 2 * HALF) + head * (2 * HALF) + column[None, :]
        v1 = tl.load(qkv + value, mask=mask, other=0.0)
        tl.store(to, (tl.dot(weights, v1) / total).to(narrow), mask=mask)
        v2 = tl.load(qkv + value + HALF, mask=mask, other=0.0)
        tl.store(to + HALF, (tl.dot(weights, v2) / total).to(narrow), mask=mask)
