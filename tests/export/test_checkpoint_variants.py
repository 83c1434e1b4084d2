"""Checkpoints as tools leave them: what transformers or vLLM loads has the clean one's fingerprint, and the rest is named.

Everything is asked of both readers, export's and prefill's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.checkpoint import open_checkpoint
from export.pipeline import fingerprint_of
from export.synthetic import Layout, make_checkpoint
from sidecar.integrations.checkpoint import checkpoint_fingerprint, pixel_spec, tower_spec
from sidecar.vision.checkpoint_files import CheckpointError
from sidecar.vision.spec import PixelSpec, TowerSpec
from sidecar.vision.tower import Tower
from sidecar.vision.vision_tensors import INDEX_FILE, SINGLE_FILE, tensor_shapes

QKV = "visual.blocks.0.attn.qkv.weight"
Tensors = dict[str, Tensor]


def by_export(directory: Path) -> str:
    opened = open_checkpoint(str(directory))
    try:
        return fingerprint_of(opened)
    finally:
        opened.close()


def by_prefill(directory: Path) -> str:
    return checkpoint_fingerprint(directory, pixel_spec(directory, tower_spec(directory)))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("toy", tmp_path_factory.mktemp("clean") / "toy")


@pytest.fixture(scope="module")
def clean_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("toy", tmp_path_factory.mktemp("clean") / "sharded", layout=Layout(files="sharded"))


def change(directory: Path, how: Callable[[Tensors], Tensors], name: str = SINGLE_FILE) -> None:
    path = directory / name
    changed = how(load_file(path))
    save_file({key: tensor.clone() for key, tensor in changed.items()}, path)


def renamed(directory: Path, name: str) -> None:
    (directory / SINGLE_FILE).rename(directory / name)


def reindex(directory: Path, how: Callable[[dict[str, str]], dict[str, str]]) -> None:
    path = directory / INDEX_FILE
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "weight_map": how(index["weight_map"])}))


TAKEN: dict[str, Callable[[Path], object]] = {
    "float64": lambda d: change(d, lambda t: {name: tensor.double() for name, tensor in t.items()}),
    "a saved inv_freq": lambda d: change(d, lambda t: {**t, "visual.rotary_pos_emb.inv_freq": torch.ones(4)}),
    "inv_freq in blocks": lambda d: change(
        d, lambda t: {**t, "visual.blocks.0.attn.rotary_pos_emb.inv_freq": torch.ones(4)}
    ),
    "another name": lambda d: renamed(d, "pytorch_model.safetensors"),
    "consolidated": lambda d: renamed(d, "consolidated.safetensors"),
    "an adapter of the language model beside": lambda d: add_adapter(d, "language_model.layers.0.mlp"),
}


def add_adapter(directory: Path, module: str) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct"}
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    weights = {f"base_model.model.model.{module}.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    save_file(weights, directory / "adapter_model.safetensors")


@pytest.mark.parametrize("make", TAKEN.values(), ids=TAKEN)
def test_what_transformers_or_vllm_loads_has_the_clean_fingerprint(
    clean: Path, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    directory = shutil.copytree(clean, tmp_path / "toy")
    make(directory)
    assert by_export(directory) == by_prefill(directory) == by_export(clean)


TAKEN_SHARDS: dict[str, Callable[[Path], object]] = {
    "no index": lambda d: (d / INDEX_FILE).unlink(),
    "an index that misplaces a tensor": lambda d: reindex(d, lambda m: {**m, QKV: sorted(set(m.values()))[-1]}),
    "an index that lacks a tensor": lambda d: reindex(d, lambda m: {k: v for k, v in m.items() if k != QKV}),
    "an index that places no vision tensor in their shard": lambda d: reindex(
        d, lambda m: {k if v != m[QKV] or k == QKV else f"x.{k}": v for k, v in m.items()}
    ),
    "an index of shards that are gone, beside a single file": lambda d: merge(d),
}


def merge(directory: Path) -> None:
    tensors: Tensors = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    save_file(tensors, directory / SINGLE_FILE)


@pytest.mark.parametrize("make", TAKEN_SHARDS.values(), ids=TAKEN_SHARDS)
def test_a_stale_index_is_taken_where_transformers_or_vllm_takes_it(
    clean_shards: Path, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    directory = shutil.copytree(clean_shards, tmp_path / "toy")
    make(directory)
    assert by_export(directory) == by_prefill(directory) == by_export(clean_shards)


def prefixed(prefix: str) -> Callable[[Path], object]:
    return lambda d: change(d, lambda t: {prefix + name: tensor for name, tensor in t.items()})


def with_lora(tensors: Tensors) -> Tensors:
    weight = tensors.pop(QKV)
    base = QKV.removesuffix("weight")
    adapter = {f"{base}lora_{side}.default.weight": torch.zeros(2, 2) for side in "AB"}
    return {**tensors, **adapter, f"{base}base_layer.weight": weight}


def only_an_adapter(directory: Path) -> None:
    (directory / SINGLE_FILE).unlink()
    add_adapter(directory, "visual.blocks.0.attn.qkv")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "DDP": (prefixed("module."), r"names its vision tensors module\.visual\.\*.* DistributedDataParallel .*save its"),
    "torch.compile": (prefixed("_orig_mod."), r"_orig_mod\.visual\.\*.* torch\.compile"),
    "PEFT": (prefixed("base_model.model."), r"base_model\.model\.visual\.\*.* merge_and_unload"),
    "both": (prefixed("module._orig_mod."), r"module\._orig_mod\.visual\.\*.* DistributedDataParallel"),
    "unmerged LoRA": (lambda d: change(d, with_lora), r"adapter on its vision tower that is not merged .*lora_A"),
    "an adapter of the tower beside": (lambda d: add_adapter(d, "visual.blocks.0"), "that is not merged .* merge it"),
    "an adapter alone": (
        only_an_adapter,
        r"is an adapter of PEFT \(LORA\).* load Qwen/Qwen2\.5-VL-3B-Instruct with it",
    ),
    "int8": (lambda d: change(d, lambda t: {**t, QKV: t[QKV].to(torch.int8)}), r"quantised .*qkv\.weight \(I8\)"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_neither_loads_is_named(clean: Path, tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    directory = shutil.copytree(clean, tmp_path / "toy")
    make(directory)
    for reader in (by_export, by_prefill):
        with pytest.raises(CheckpointError, match=message):
            reader(directory)


def test_an_adapter_s_own_directory_is_named_for_what_it_is(tmp_path: Path) -> None:
    add_adapter(tmp_path, "visual.blocks.0.attn.qkv")
    with pytest.raises(CheckpointError, match=r"is an adapter of PEFT \(LORA\), without the model that it adapts"):
        open_checkpoint(str(tmp_path))


def test_the_expected_tensors_are_the_tower_s() -> None:
    spec = TowerSpec(
        depth=3, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=64, fullatt_block_indexes=(1,)
    )
    with torch.device("meta"):
        state = Tower(spec, PixelSpec()).state_dict()
    assert dict(tensor_shapes(spec)) == {name: tuple(tensor.shape) for name, tensor in state.items()}
