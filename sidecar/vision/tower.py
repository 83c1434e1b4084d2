"""The Qwen2.5-VL vision tower in torch: the only definition of the network in this project.

Export traces it into OpenVINO and ONNX graphs, the torch runtime runs it. It takes patches in the order of a `WindowPlan`
and knows nothing of pictures, grids or files. Parameter names are those of the checkpoint (`patch_embed.proj.weight`,
`blocks.0.attn.qkv.weight`, …), so that a checkpoint loads without a table of names.

The network is Qwen2_5_VisionTransformerPretrainedModel of transformers; what differs is only the shape of the work: windows
are a batch axis, whole frames a padded batch axis, and normalisation of the pixels happens inside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from sidecar.vision.spec import PixelSpec, TowerSpec

# Weights are kept in the checkpoint's precision and widened where they are used; a graph traced so stores them narrow and
# its runtime decides what to compute in.


class Linear(nn.Module):
    """y = x·Wᵀ + b, the weight widened to the activations' dtype at use."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) · weight, the mean of squares taken in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight.to(x.dtype)


class PatchEmbed(nn.Module):
    """Patches (N, C·T·P·P) in pixel units 0…255, uint8 or float, to hidden states (N, hidden)."""

    scale: Tensor
    shift: Tensor

    def __init__(self, spec: TowerSpec, pixels: PixelSpec) -> None:
        super().__init__()
        self.spec = spec
        shape = (spec.hidden_size, spec.in_channels, spec.temporal_patch_size, spec.patch_size, spec.patch_size)
        # A module of its own only for the parameter's name in checkpoints, proj.weight.
        self.proj = nn.ParameterDict({"weight": nn.Parameter(torch.empty(shape), requires_grad=False)})
        self.set_normalisation(pixels)

    def set_normalisation(self, pixels: PixelSpec) -> None:
        """Hold (x·rescale − mean) / deviation as x·scale + shift, one value for each of a patch's values."""
        repeat = self.spec.patch_width // self.spec.in_channels
        scale = [pixels.rescale_factor / deviation for deviation in pixels.image_std]
        shift = [-mean / deviation for mean, deviation in zip(pixels.image_mean, pixels.image_std, strict=True)]
        self.register_buffer("scale", torch.tensor(scale).repeat_interleave(repeat), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).repeat_interleave(repeat), persistent=False)

    def forward(self, patches: Tensor, dtype: torch.dtype) -> Tensor:
        normalised = patches.to(torch.float32) * self.scale + self.shift
        weight = self.proj["weight"].to(dtype).reshape(self.spec.hidden_size, self.spec.patch_width)
        return functional.linear(normalised.to(dtype), weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position encoding of x (B, heads, L, head_dim) in rotate-half form; cos and sin are (B, 1, L, head_dim).

    Written over four axes with slices of the last one: so OpenVINO recognises it and runs it as one RoPE operation.
    """
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)


def rotary_tables(positions: Tensor, spec: TowerSpec) -> tuple[Tensor, Tensor]:
    """positions (N, 2), a patch's row and column → cos and sin (N, head_dim) in float32, as `WindowPlan` has them."""
    exponents = (
        torch.arange(spec.head_dim // 4, dtype=torch.float32, device=positions.device) * 2 / (spec.head_dim // 2)
    )
    angles = (positions.float()[:, :, None] / spec.rope_theta**exponents).reshape(-1, spec.head_dim // 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rows(table: Tensor, index: Tensor) -> Tensor:
    """table[index] for a matrix; as an embedding look-up, which every runtime has as one plain gather over int32."""
    return functional.embedding(index, table)


class Groups(Protocol):
    """Which patches attend to one another, and how they are brought together for it."""

    def attend(self, attention: Attention, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """qkv (N, 3·hidden), cos and sin (N, head_dim) in the run's order → (N, hidden) in the same order."""


class Attention(nn.Module):
    """Multi-head attention inside groups of patches; a group is a window or a frame."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.qkv = Linear(spec.hidden_size, 3 * spec.hidden_size)
        self.proj = Linear(spec.hidden_size, spec.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, groups: Groups) -> Tensor:
        return self.proj(groups.attend(self, self.qkv(x), cos, sin))

    def mix(self, tables: Iterable[Tensor], length: int, mask: Tensor | None = None) -> Tensor:
        """tables: qkv (G·L, 3·hidden), cos and sin (G·L, head_dim); length L; mask (G, L) or None → (G·L, hidden).

        L is handed over rather than read off a shape: where a traced graph has no groups at all, it must not divide by
        their number to find it.
        """
        spec = self.spec
        qkv, *angles = tables
        heads = qkv.reshape(-1, length, 3, spec.num_heads, spec.head_dim)
        query, key, value = (heads[:, :, part].transpose(1, 2) for part in range(3))
        cos, sin = (angle.reshape(-1, 1, length, spec.head_dim) for angle in angles)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        bias = None if mask is None else mask.to(query.dtype).reshape(-1, 1, 1, length)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return mixed.transpose(1, 2).reshape(-1, spec.hidden_size)


@dataclass(frozen=True, slots=True)
class EqualGroups:
    """Groups of one length, each where it lies: a reshape."""

    length: int

    def attend(self, attention: Attention, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return attention.mix((qkv, cos, sin), self.length)


@dataclass(frozen=True, slots=True)
class Windows:
    """Full windows where they lie, ragged ones by gather and mask; the arrays are a `WindowPlan`'s."""

    index: Tensor
    mask: Tensor
    ragged_return: Tensor

    def attend(self, attention: Attention, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        length = attention.spec.window_patches
        tables = (qkv, cos, sin)
        split = qkv.shape[0] - self.ragged_return.shape[0]
        whole = attention.mix((table[:split] for table in tables), length)
        ragged = attention.mix((rows(table, self.index.reshape(-1)) for table in tables), length, self.mask)
        return torch.cat((whole, rows(ragged, self.ragged_return)))


@dataclass(frozen=True, slots=True)
class Gathered:
    """Groups of any lengths, by gather and mask: frames, or windows that are all ragged; the arrays are a `WindowPlan`'s."""

    index: Tensor
    mask: Tensor
    back: Tensor

    def attend(self, attention: Attention, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        gathered = (rows(table, self.index.reshape(-1)) for table in (qkv, cos, sin))
        return rows(attention.mix(gathered, self.index.shape[1], self.mask), self.back)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.gate_proj = Linear(spec.hidden_size, spec.intermediate_size)
        self.up_proj = Linear(spec.hidden_size, spec.intermediate_size)
        self.down_proj = Linear(spec.intermediate_size, spec.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, spec: TowerSpec, *, full_attention: bool) -> None:
        super().__init__()
        self.full_attention = full_attention
        self.norm1 = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.norm2 = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.attn = Attention(spec)
        self.mlp = MLP(spec)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, groups: Groups) -> Tensor:
        x, update = self.terms(x, cos, sin, groups)
        return x + update

    def terms(self, x: Tensor, cos: Tensor, sin: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        """What the block gives, as the two terms of its sum: where blocks are compiled one by one, the next one's norm can add
        them as it reads them."""
        x = x + self.attn(self.norm1(x), cos, sin, groups)
        return x, self.mlp(self.norm2(x))


class Merger(nn.Module):
    """2×2 patches, which lie next to each other in the tower's order, to one row of the language model's width."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.merged_width = spec.hidden_size * spec.merge_unit
        self.ln_q = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = nn.ModuleList(
            [Linear(self.merged_width, self.merged_width), nn.GELU(), Linear(self.merged_width, spec.out_hidden_size)]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_q(x).reshape(-1, self.merged_width)
        for layer in self.mlp:
            x = layer(x)
        return x


class Tower(nn.Module):
    """Patches of a run to embeddings.

    Args:
        spec: the network's sizes.
        pixels: the normalisation that the patches still need.
        compute_dtype: dtype of the activations.
    """

    def __init__(self, spec: TowerSpec, pixels: PixelSpec, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec = spec
        self.compute_dtype = compute_dtype
        self.patch_embed = PatchEmbed(spec, pixels)
        self.blocks = nn.ModuleList(
            Block(spec, full_attention=index in spec.fullatt_block_indexes) for index in range(spec.depth)
        )
        self.merger = Merger(spec)

    def forward(
        self,
        patches: Tensor,
        rotary_cos: Tensor,
        rotary_sin: Tensor,
        ragged_index: Tensor,
        ragged_mask: Tensor,
        ragged_return: Tensor,
        frame_index: Tensor,
        frame_mask: Tensor,
        frame_return: Tensor,
        token_order: Tensor,
    ) -> Tensor:
        """patches (N, patch_width), uint8 or float in pixel units 0…255, in the plan's order; the other arguments are the
        plan's arrays (see `WindowPlan`). Returns embeddings (T, out_hidden_size) in the caller's order."""
        windows = Windows(ragged_index, ragged_mask, ragged_return)
        frames = Gathered(frame_index, frame_mask, frame_return)
        return rows(self.encode(patches, rotary_cos, rotary_sin, windows, frames), token_order)

    def encode(self, patches: Tensor, cos: Tensor, sin: Tensor, windows: Groups, frames: Groups) -> Tensor:
        """patches (N, patch_width) in an order that suits the groups, the 2×2 of a token next to each other; cos and sin
        (N, head_dim) → embeddings (T, out_hidden_size) in the same order."""
        x = self.patch_embed(patches, self.compute_dtype)
        for block in self.blocks:
            x = block(x, cos, sin, frames if block.full_attention else windows)
        return self.merger(x)
