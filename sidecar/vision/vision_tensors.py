"""Which tensors of a checkpoint are the vision tower's, and in which of its files they lie. Needs no torch.

Export and the prefill side both find them here, so that both compute one fingerprint. What transformers or vLLM loads is
taken; what both would leave out or fail on is refused with its name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from sidecar.vision.checkpoint_files import AbsentError, CheckpointError, HeaderFiles, StoredTensor
from sidecar.vision.spec import VISION_PREFIXES, TowerSpec

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLED_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"

# safetensors' codes of the dtypes that a tower may be stored in, and torch's names of what they are used as. float64 is
# rounded to float32, since no language model computes in more.
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}

# Buffers that older versions of transformers saved; they follow from config.json, and both transformers and vLLM skip them.
_SKIPPED = "rotary_pos_emb.inv_freq"
# Parts of names that PEFT gives to a layer with an adapter that was not merged into it.
_ADAPTED = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)\.")
# What wraps a model and leaves its name in front of every tensor's.
_WRAPPERS = {
    "base_model.model.": "a PEFT model; save what its merge_and_unload() returns",
    "module.": "DistributedDataParallel or DeepSpeed; save its .module",
    "_orig_mod.": "torch.compile; save its ._orig_mod",
    "_fsdp_wrapped_module.": "FSDP; save the full state dict of the module inside",
}


class Found(NamedTuple):
    """A vision tensor and the file that holds it."""

    shard: str
    stored: StoredTensor


def find_tensors(files: HeaderFiles, tower: TowerSpec, config: Mapping[str, Any]) -> dict[str, Found]:
    """Find the tower's tensors, complete, of the right shapes and in floating point, by their names in `Tower.state_dict()`.

    Args:
        files: the checkpoint's.
        tower: the sizes that its config.json states.
        config: its parsed config.json, for the name of a quantisation.

    Raises:
        CheckpointError: if they are not all there, or are of another form.
    """
    expected = dict(tensor_shapes(tower))
    found: dict[str, Found] = {}
    others: list[str] = []
    for shard, header in _headers(files, expected, found):
        for stored in header:
            name = canonical(stored.name)
            if name is None:
                others.append(stored.name)
            elif not name.endswith(_SKIPPED):
                if name in found:
                    raise CheckpointError(f"{files.source} holds {name} twice: in {found[name].shard} and in {shard}")
                found[name] = Found(shard, stored)
    _refuse_adapter(files, [each.stored.name for each in found.values()])
    if not found:
        raise CheckpointError(_nothing(files, others))
    _verify(files, found, expected, config)
    if any(each.stored.dtype == "F64" for each in found.values()):
        logger.warning("%s stores vision tensors in float64; they are rounded to float32", files.source)
    return found


def canonical(name: str) -> str | None:
    """The tensor's name in `Tower.state_dict()`, None if it is none of the vision tower's."""
    return next((name.removeprefix(prefix) for prefix in VISION_PREFIXES if name.startswith(prefix)), None)


def tensor_shapes(tower: TowerSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a tower's tensors, as Qwen2.5-VL checkpoints have them (without `visual.`)."""
    hidden, mlp, merged = tower.hidden_size, tower.intermediate_size, tower.hidden_size * tower.merge_unit
    patch = (tower.in_channels, tower.temporal_patch_size, tower.patch_size, tower.patch_size)
    yield "patch_embed.proj.weight", (hidden, *patch)
    for index in range(tower.depth):
        block = f"blocks.{index}."
        yield f"{block}norm1.weight", (hidden,)
        yield f"{block}norm2.weight", (hidden,)
        for layer, outputs, inputs in (
            ("attn.qkv", 3 * hidden, hidden),
            ("attn.proj", hidden, hidden),
            ("mlp.gate_proj", mlp, hidden),
            ("mlp.up_proj", mlp, hidden),
            ("mlp.down_proj", hidden, mlp),
        ):
            yield f"{block}{layer}.weight", (outputs, inputs)
            yield f"{block}{layer}.bias", (outputs,)
    yield "merger.ln_q.weight", (hidden,)
    for layer, outputs in (("merger.mlp.0", merged), ("merger.mlp.2", tower.out_hidden_size)):
        yield f"{layer}.weight", (outputs, merged)
        yield f"{layer}.bias", (outputs,)


def no_checkpoint(files: HeaderFiles) -> str:
    """What to tell about files without a config.json."""
    if (adapter := files.json(_ADAPTER_CONFIG)) is not None:
        return _adapter(files, adapter)
    return f"{files.source} has no config.json: give the directory that holds a whole checkpoint"


def _headers(
    files: HeaderFiles, expected: Mapping[str, object], found: Mapping[str, Found]
) -> Iterator[tuple[str, list[StoredTensor]]]:
    """Safetensors files in which to look for vision tensors, and what they hold, as long as any tensor is not yet found.

    The index decides, as in vLLM, and where no file that it lists for the tower is there, the single file, as in
    transformers. Both read every file that the index lists, whatever tensors it places there. Without either, all
    safetensors files count, as in vLLM.
    """
    index = files.json(INDEX_FILE)
    if index is None:
        for shard in [SINGLE_FILE] if files.exists(SINGLE_FILE) else _unlisted(files):
            yield shard, files.header(shard)
        return
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{INDEX_FILE} of {files.source} has no weight_map: download it again")
    claimed = {str(shard) for name, shard in weight_map.items() if canonical(name) is not None}
    listed = list(dict.fromkeys([*sorted(claimed), *sorted(map(str, weight_map.values()))]))
    for shard in listed:
        if expected.keys() <= found.keys() and shard not in claimed:
            return
        if not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(f"{INDEX_FILE} of {files.source} names {shard!r}, which is no file name of a shard")
        try:
            header = files.header(shard)
        except AbsentError:
            if found or SINGLE_FILE in listed or not files.exists(SINGLE_FILE):
                raise
            logger.warning("%s lists %s, which is not there: %s is read instead", INDEX_FILE, shard, SINGLE_FILE)
            yield SINGLE_FILE, files.header(SINGLE_FILE)
            return
        yield shard, header


def _unlisted(files: HeaderFiles) -> list[str]:
    """All safetensors files, for want of an index and of the usual name."""
    if shards := [shard for shard in files.shards() if shard != _ADAPTER_WEIGHTS]:
        return shards
    if (adapter := files.json(_ADAPTER_CONFIG)) is not None:
        raise CheckpointError(_adapter(files, adapter))
    if any(files.exists(name) for name in _PICKLED_FILES):
        raise CheckpointError(
            f"{files.source} holds its weights as pytorch_model.bin (pickle), which can neither be read in part "
            "nor be trusted: give a checkpoint in safetensors, such as transformers' save_pretrained writes"
        )
    raise CheckpointError(f"{files.source} has no weights: expected {SINGLE_FILE} or {INDEX_FILE} with its shards")


def _adapter(files: HeaderFiles, adapter: Mapping[str, Any]) -> str:
    base = adapter.get("base_model_name_or_path") or "its base model"
    return (
        f"{files.source} is an adapter of PEFT ({adapter.get('peft_type', 'LORA')}), without the model that it adapts: load "
        f"{base} with it, save what merge_and_unload() returns, and give that checkpoint"
    )


def _refuse_adapter(files: HeaderFiles, names: Iterable[str]) -> None:
    """Refuse weights of an adapter that changes the tower and is not merged into it."""
    inside = [name for name in names if _ADAPTED.search(name)]
    # Beside a whole checkpoint transformers applies an adapter and vLLM does not; one of the language model is no concern.
    if not inside and files.json(_ADAPTER_CONFIG) is not None and _ADAPTER_WEIGHTS in files.shards():
        inside = [stored.name for stored in files.header(_ADAPTER_WEIGHTS) if ".visual." in f".{stored.name}"]
    if inside:
        raise CheckpointError(
            f"{files.source} has an adapter on its vision tower that is not merged ({_some(inside)}): merge it with "
            "PEFT's merge_and_unload(), save the model, and give that checkpoint"
        )


def _nothing(files: HeaderFiles, others: Iterable[str]) -> str:
    for name in others:
        rest, inside = name, []
        while wrapper := next((wrapper for wrapper in _WRAPPERS if rest.startswith(wrapper)), None):
            rest = rest.removeprefix(wrapper)
            inside.append(wrapper)
        if inside and canonical(rest) is not None:
            return (
                f"{files.source} names its vision tensors {''.join(inside)}visual.*, which neither transformers nor vLLM "
                f"loads: it was saved from within {_WRAPPERS[inside[0]]}"
            )
    return (
        f"{files.source} holds no vision tensors (none is named visual.* or model.visual.*): give a whole "
        "Qwen2.5-VL checkpoint, not a text model or an adapter"
    )


def _verify(
    files: HeaderFiles,
    found: Mapping[str, Found],
    expected: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
) -> None:
    source = files.source
    narrow = [f"{each.stored.name} ({each.stored.dtype})" for each in found.values() if each.stored.dtype not in DTYPES]
    if narrow:
        method = (config.get("quantization_config") or {}).get("quant_method", "")
        raise CheckpointError(
            f"{source} has a quantised vision tower{f' ({method})' if method else ''}: {_some(narrow)}. Give the "
            f"checkpoint that it was made from, or one whose vision tensors stayed in {', '.join(DTYPES)}"
        )
    if extra := sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            f"{source} has vision tensors that no Qwen2.5-VL tower of its config.json has: {_some(extra)}"
        )
    if missing := sorted(expected.keys() - found.keys()):
        raise CheckpointError(
            f"{source} lacks vision tensors that its config.json calls for: {_some(missing)}{_stale(files)}"
        )
    wrong = [
        f"{name} is {found[name].stored.shape} instead of {shape}"
        for name, shape in expected.items()
        if found[name].stored.shape != shape
    ]
    if wrong:
        raise CheckpointError(f"{source} has vision tensors of other shapes than its config.json says: {_some(wrong)}")


def _stale(files: HeaderFiles) -> str:
    """More about missing tensors, where files lie there that the index does not list."""
    index = files.json(INDEX_FILE)
    if index is None or not (unlisted := sorted(set(files.shards()) - set(index["weight_map"].values()))):
        return ""
    return f". {INDEX_FILE} does not list {_some(unlisted)}: if they are there, remove that file, or save the checkpoint again"


def _some(entries: list[str]) -> str:
    return ", ".join(entries[:3]) + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")
