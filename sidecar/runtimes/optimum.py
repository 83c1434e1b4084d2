"""The pair of graphs that optimum-intel exports of a Qwen2.5-VL's vision parts, on OpenVINO.

It is the reference that our own graph is compared with, and serves the files of those who already have them. It costs more:
optimum's graph knows windows only as masks, so for an item of N patches two dense (1, N, N) float32 masks are made and every
block, not only the few full-attention ones, computes N×N scores. 1080p (N = 10764) takes 463 MB for each mask.

What goes in follows `_OVQwen2_5_VLForCausalLM.get_vision_embeddings` of optimum-intel 2.2 (modeling_visual_language.py), and
is on purpose computed apart from `vision/windows.py`: a reference that shared its plan would share its mistakes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import openvino as ov

from sidecar.runtimes.base import Load, Runtime, RuntimeFault
from sidecar.runtimes.held import RELEASE_WAIT_S, Held, release
from sidecar.runtimes.openvino import OUTPUT_TYPE, compile_options, describe_device, openvino_device, shared_output
from sidecar.runtimes.optimum_pair import EMBEDDINGS, MERGER
from sidecar.vision.dtypes import Array
from sidecar.vision.grid import Grid
from sidecar.vision.spec import PixelSpec, TowerSpec

# The merger's inputs. Qwen2-VL's has no windows, so it is refused by these names.
_HIDDEN = "hidden_states"
_MERGER_INPUTS = {_HIDDEN, "attention_mask", "window_attention_mask", "window_index", "rotary_pos_emb"}


class OptimumRuntime(Runtime):
    """Two compiled models, one after the other. `load.graph` is the merger's .xml; the other lies beside it."""

    name = "optimum"
    version = ov.__version__.partition("-")[0]

    def __init__(self, load: Load) -> None:
        """Compile both graphs.

        Raises:
            RuntimeFault: if OpenVINO cannot read or compile them, or they are not of the tower that `load` describes.
        """
        self.precision = load.precision
        self.output_dtype = load.output_dtype
        self._tower = load.tower
        self._held = Held()
        self._running = threading.Lock()
        self._releases = openvino_device(load.device) == "CPU"
        self._scale, self._shift = normalisation(load.pixels, load.tower)
        core = ov.Core()
        if load.cache_dir is not None:
            core.set_property({"CACHE_DIR": str(load.cache_dir)})
        device, options = openvino_device(load.device), compile_options(load)
        try:
            embeddings, merger = core.read_model(load.graph.with_name(EMBEDDINGS)), core.read_model(load.graph)
            _check(embeddings, merger, load.tower)
            steps = ov.preprocess.PrePostProcessor(merger)
            steps.output().tensor().set_element_type(OUTPUT_TYPE[load.output_dtype])
            compiled = core.compile_model(steps.build(), device, options)
            self._compiled = (core.compile_model(embeddings, device, options), compiled)
            self._embed, self._merge = (model.create_infer_request() for model in self._compiled)
        except (RuntimeError, KeyError) as error:
            if isinstance(error, RuntimeFault):
                raise
            raise RuntimeFault(f"OpenVINO could not load {load.graph.name} on {load.device}: {error}") from error
        self.device = describe_device(core, compiled, load.precision)

    def run(self, patches: Array, grids: Sequence[Grid], out: Array) -> None:
        # One item at a time: one mask over all of them would grow with the square of the run.
        start = row = 0
        for grid in grids:
            end, last_row = start + grid.check(self._tower).patches, row + grid.tokens(self._tower)
            try:
                with self._running:
                    self._run_item(patches[start:end], grid, out[row:last_row])
            except (RuntimeError, MemoryError) as error:
                raise RuntimeFault(f"OpenVINO failed on an item of {end - start} patches: {error}") from error
            self._held.ran(end - start)
            start, row = end, last_row

    def release_memory(self) -> bool:
        if not (self._releases and self._held.due and self._running.acquire(timeout=RELEASE_WAIT_S)):
            return False
        try:
            release(self._compiled, self._tower, self._small_run)
            self._held.released()
        except RuntimeError as error:
            raise RuntimeFault(f"OpenVINO failed to give memory back: {error}") from error
        finally:
            self._running.release()
        return True

    def _small_run(self, grid: Grid) -> None:
        out = np.empty((grid.tokens(self._tower), self._tower.out_hidden_size), self.output_dtype.storage)
        self._run_item(np.zeros((grid.patches, self._tower.patch_width), np.uint8), grid, out)

    def _run_item(self, patches: Array, grid: Grid, out: Array) -> None:
        pixel_values = patches.astype(np.float32) * self._scale + self._shift
        self._embed.set_input_tensor(ov.Tensor(pixel_values, shared_memory=True))
        self._embed.infer()
        self._merge.set_tensor(_HIDDEN, self._embed.get_output_tensor())
        # Named, because the request reads this memory without holding on to it.
        arrays = merger_inputs(grid, self._tower)
        for name, array in arrays.items():
            self._merge.set_tensor(name, ov.Tensor(array, shared_memory=True))
        self._merge.set_output_tensor(shared_output(out, self.output_dtype))
        self._merge.infer()


def normalisation(pixels: PixelSpec, tower: TowerSpec) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(x·rescale − mean) / deviation as x·scale + shift: two arrays (patch_width,), a channel's values side by side."""
    mean, deviation = np.asarray(pixels.image_mean), np.asarray(pixels.image_std)
    repeat = tower.patch_width // tower.in_channels
    scale, shift = pixels.rescale_factor / deviation, -mean / deviation
    return np.repeat(scale, repeat).astype(np.float32), np.repeat(shift, repeat).astype(np.float32)


def merger_inputs(grid: Grid, tower: TowerSpec) -> dict[str, Array]:
    """What the merger takes beside the hidden states, for one item of N patches in merge order:

    - `window_index` (N / merge_unit,) int64: the item's tokens, window by window. The graph reorders by it, and back.
    - `attention_mask` (1, N, N) float32, in that order: 0 between patches of one frame, else −inf
    - `window_attention_mask`: the same for windows
    - `rotary_pos_emb` (N, head_dim / 2) float32, in merge order: the angles of a patch's row, then of its column
    """
    window_index, window_patches = window_order(grid, tower)
    return {
        "window_index": window_index,
        "attention_mask": _mask([grid.h * grid.w] * grid.t),
        "window_attention_mask": _mask(window_patches),
        "rotary_pos_emb": _rotary_angles(grid, tower),
    }


def window_order(grid: Grid, tower: TowerSpec) -> tuple[npt.NDArray[np.int64], list[int]]:
    """The item's tokens ordered by frame, then window (row by row), then place in the window; and the patches of each window."""
    token_h, token_w = grid.h // tower.spatial_merge_size, grid.w // tower.spatial_merge_size
    side = tower.window_side
    tokens = np.arange(token_h * token_w, dtype=np.int64).reshape(token_h, token_w)
    windows = [
        tokens[top : top + side, left : left + side].reshape(-1)
        for top in range(0, token_h, side)
        for left in range(0, token_w, side)
    ]
    frame = np.concatenate(windows)
    index = np.concatenate([frame + tokens.size * number for number in range(grid.t)])
    return index, [len(window) * tower.merge_unit for window in windows] * grid.t


def _mask(lengths: Sequence[int]) -> npt.NDArray[np.float32]:
    """(1, N, N) with a square of zeros on the diagonal for each group of patches, −inf elsewhere."""
    size = sum(lengths)
    mask = np.full((1, size, size), -np.inf, np.float32)
    start = 0
    for length in lengths:
        mask[0, start : start + length, start : start + length] = 0
        start += length
    return mask


def _rotary_angles(grid: Grid, tower: TowerSpec) -> npt.NDArray[np.float32]:
    merge, axis_width = tower.spatial_merge_size, tower.head_dim // 2
    exponents = np.arange(0, axis_width, 2, dtype=np.float32) / np.float32(axis_width)
    frequencies = (1.0 / np.power(np.float32(tower.rope_theta), exponents)).astype(np.float32)
    positions = np.indices((grid.h, grid.w), np.float32)  # (row and column, h, w)
    blocks = positions.reshape(2, grid.h // merge, merge, grid.w // merge, merge).transpose(1, 3, 2, 4, 0)
    angles = (blocks.reshape(-1, 2, 1) * frequencies).reshape(grid.h * grid.w, axis_width)
    return np.tile(angles, (grid.t, 1))


def _check(embeddings: ov.Model, merger: ov.Model, tower: TowerSpec) -> None:
    """Raises RuntimeFault if the graphs are not a Qwen2.5-VL's pair, or of other widths than the tower."""
    inputs = {port.any_name for port in merger.inputs}
    if inputs != _MERGER_INPUTS:
        raise RuntimeFault(
            f"{MERGER} takes {', '.join(sorted(inputs))} instead of {', '.join(sorted(_MERGER_INPUTS))}: it was not exported "
            "from a Qwen2.5-VL, or by an optimum-intel that this sidecar does not know"
        )
    for what, port, width in (
        (f"{EMBEDDINGS} gives hidden states", embeddings.output(0), tower.hidden_size),
        (f"{MERGER} takes rotary angles", merger.input("rotary_pos_emb"), tower.head_dim // 2),
        (f"{MERGER} gives embeddings", merger.output(0), tower.out_hidden_size),
    ):
        if not port.partial_shape.compatible(ov.PartialShape([-1, width])):
            raise RuntimeFault(
                f"{what} of shape {port.partial_shape}, its configuration calls for a width of {width}: graphs and config.json "
                "are not of one model"
            )
