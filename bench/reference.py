"""transformers' own vision tower with a checkpoint's weights: what every figure of ours is compared with."""

from __future__ import annotations

import numpy as np
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from export.checkpoint import Checkpoint
from sidecar.vision.pixels import Patches


class TransformersTower:
    """Qwen2_5_VisionTransformerPretrainedModel, fed with patches in pixel units as its own processor normalises them."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        spec = checkpoint.tower
        config = Qwen2_5_VLVisionConfig(
            depth=spec.depth,
            hidden_size=spec.hidden_size,
            num_heads=spec.num_heads,
            intermediate_size=spec.intermediate_size,
            out_hidden_size=spec.out_hidden_size,
            fullatt_block_indexes=list(spec.fullatt_block_indexes),
            window_size=spec.window_size,
            patch_size=spec.patch_size,
            spatial_merge_size=spec.spatial_merge_size,
            temporal_patch_size=spec.temporal_patch_size,
        )
        with torch.device("meta"):
            model = Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa")
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in checkpoint}, assign=True, strict=True)
        # The only state that no checkpoint holds.
        inverse, model.rotary_pos_emb.attention_scaling = model.rotary_pos_emb.compute_axial_rope_parameters(config)
        model.rotary_pos_emb.inv_freq = inverse
        model.rotary_pos_emb.original_inv_freq = inverse.clone()
        self._model = model.to(device).eval()
        self._device = device
        self._dtype = dtype
        repeat = spec.patch_width // spec.in_channels
        self._mean = torch.tensor(checkpoint.pixels.image_mean).repeat_interleave(repeat)
        self._std = torch.tensor(checkpoint.pixels.image_std).repeat_interleave(repeat)

    @torch.inference_mode()
    def rows(self, *items: Patches) -> np.ndarray:
        """Embeddings (tokens, out_hidden_size) in float32, the items one after another."""
        return self.encode(*self.inputs(*items)).float().cpu().numpy()

    def inputs(self, *items: Patches) -> tuple[torch.Tensor, torch.Tensor]:
        """The items as the model takes them, on its device."""
        values = torch.from_numpy(np.concatenate([item.values for item in items]))
        normalised = ((values.float() / 255 - self._mean) / self._std).to(self._dtype)
        grids = torch.tensor([tuple(item.grid) for item in items])
        return normalised.to(self._device), grids.to(self._device)

    @torch.inference_mode()
    def encode(self, pixel_values: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """(tokens, out_hidden_size) on its device."""
        return self._model(pixel_values, grids).pooler_output
