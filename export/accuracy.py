"""Measure what was written against float32 torch.

The reference goes through the tower block by block with one block's weights widened at a time, so that it costs the memory
of the samples and one block instead of a second, wider tower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from export.samples import REFERENCES, Sample
from export.weights import empty_tower
from sidecar.artifact import Accuracy
from sidecar.runtimes.base import Runtime
from sidecar.vision.dtypes import to_float32
from sidecar.vision.reference import Deviation
from sidecar.vision.spec import TowerSpec
from sidecar.vision.tower import Gathered, Windows
from sidecar.vision.windows import plan_windows

Rows = npt.NDArray[np.float32]

# The least row-wise cosine that a variant may have on any sample. Published towers of 32 blocks reached 0.9996 in bf16 and
# 0.998 in int8 with random weights (docs/performance.md); below these bars something other than rounding is at work.
BARS = {"f32": 0.99999, "bf16": 0.998, "int8": 0.98}


@torch.inference_mode()
def reference_embeddings(checkpoint: Checkpoint, samples: Sequence[Sample], advance: Callable[[], None]) -> list[Rows]:
    """Embeddings (tokens, out_hidden_size) of each sample in float32; `advance` is called once after every block."""
    tower = empty_tower(checkpoint)
    plans = [plan_windows([sample.grid], checkpoint.tower) for sample in samples]
    inputs = [{name: torch.from_numpy(array.copy()) for name, array in plan.tower_inputs.items()} for plan in plans]

    embed = _widened(tower.patch_embed, "patch_embed", checkpoint)
    states = [
        embed(torch.from_numpy(sample.patches.values[plan.patch_order]), torch.float32)
        for sample, plan in zip(samples, plans, strict=True)
    ]
    for index, empty in enumerate(tower.blocks):
        block = _widened(empty, f"blocks.{index}", checkpoint)
        kind, groups = ("frame", Gathered) if block.full_attention else ("ragged", Windows)
        for place, given in enumerate(inputs):
            attention = groups(given[f"{kind}_index"], given[f"{kind}_mask"], given[f"{kind}_return"])
            states[place] = block(states[place], given["rotary_cos"], given["rotary_sin"], attention)
        tower.blocks[index] = nn.Identity()
        advance()
    merger = _widened(tower.merger, "merger", checkpoint)
    return [merger(state)[given["token_order"]].numpy() for state, given in zip(states, inputs, strict=True)]


def _widened(module: nn.Module, prefix: str, checkpoint: Checkpoint) -> Any:
    weights: dict[str, Tensor] = {
        name.removeprefix(f"{prefix}."): checkpoint.tensor(name).float()
        for name in checkpoint.names
        if name.startswith(f"{prefix}.")
    }
    module.load_state_dict(weights, assign=True, strict=True)
    return module


def measure(
    runtime: Runtime,
    tower: TowerSpec,
    samples: Sequence[Sample],
    references: Sequence[Rows],
    bar: float,
    advance: Callable[[], None],
) -> tuple[Accuracy, tuple[Deviation, ...]]:
    """Run every sample through a loaded runtime and compare; `advance` is called after each.

    Returns:
        The accuracy over all samples, and the deviation of each that is sealed as a reference.
    """
    measured: list[dict[str, Any]] = []
    deviations: list[Deviation] = []
    cosines = []
    finite = True
    for sample, reference in zip(samples, references, strict=True):
        output = runtime.encode(sample.patches.values, [sample.grid], tower)
        rows = to_float32(output, runtime.output_dtype)
        finite = finite and bool(np.isfinite(rows).all())
        if sample.name in REFERENCES:
            deviations.append(Deviation.between(rows, reference))
        cosine = row_cosine(rows, reference)
        cosines.append(cosine)
        measured.append(
            {
                "name": sample.name,
                "grid": list(sample.grid),
                "cosine_min": float(cosine.min()),
                "cosine_mean": float(cosine.mean()),
                "relative_error": relative_error(rows, reference),
            }
        )
        advance()
    together = np.concatenate(cosines)
    accuracy = Accuracy(
        cosine_min=float(together.min()),
        cosine_mean=float(together.mean()),
        relative_error=max(sample["relative_error"] for sample in measured),
        finite=finite,
        bar=bar,
        samples=tuple(measured),
    )
    return accuracy, tuple(deviations)


def row_cosine(rows: Rows, reference: Rows) -> npt.NDArray[np.float64]:
    """Cosine between corresponding rows, in float64. A row that is not finite counts as −1."""
    left, right = rows.astype(np.float64), reference.astype(np.float64)
    with np.errstate(all="ignore"):
        cosine = (left * right).sum(1) / (np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1))
    return np.nan_to_num(cosine, nan=-1.0, posinf=-1.0, neginf=-1.0)


def relative_error(rows: Rows, reference: Rows) -> float:
    """‖rows − reference‖ / ‖reference‖ (Frobenius)."""
    wide = reference.astype(np.float64)
    return float(np.linalg.norm(rows.astype(np.float64) - wide) / np.linalg.norm(wide))
