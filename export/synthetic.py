"""Checkpoints with random weights in the true Hugging Face layout, for machines that reach no hub.

`toy` is a whole small Qwen2.5-VL, language model and tokenizer included, that transformers and vLLM load and answer
with. `3b` and `7b` have the real vision tower's size and the published configuration; their language tensors are all
there too, but as holes: zeros that take no disk (copy such a directory with `cp --sparse=always`), so they load but
answer nothing.

Weights are scaled so that activations stay in the range of a trained network's through every block, attention picks
keys rather than averaging them, and different patches get different embeddings: what an export mixes up, shows.
The same seed gives the same weights whatever the layout; a narrower dtype rounds them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from export.files import pack_header
from export.synthetic_config import DType, Kind, model_config, write_configs, write_json, write_tokenizer
from sidecar.vision.spec import PixelSpec, TowerSpec
from sidecar.vision.tower import Tower
from sidecar.vision.vision_tensors import INDEX_FILE, SINGLE_FILE

__all__ = ["DType", "Kind", "Layout", "make_checkpoint", "synthetic_kind"]

# safetensors' code and the bytes of one number.
_STORED = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
_PUBLISHED_SHARD_BYTES = 5_000_000_000
_TOY_SHARD_BYTES = 800_000

# Queries and keys are drawn larger by this, which gives attention scores a standard deviation of 2.
_QUERY_KEY_GAIN = math.sqrt(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a checkpoint is saved.

    Attributes:
        prefix: what names of vision tensors begin with: as published, or as newer transformers save them.
        files: one safetensors file, or shards with an index; None is "single" for the toy and "sharded" for real sizes.
        config: flat config.json and preprocessor_config.json as published, or the nested files of transformers 5.
    """

    prefix: Literal["visual.", "model.visual."] = "visual."
    files: Literal["single", "sharded"] | None = None
    config: Literal["published", "transformers5"] = "published"


class _Weight(NamedTuple):
    name: str
    shape: tuple[int, ...]
    hole: bool = False  # zeros that are not written


class SyntheticError(ValueError):
    """A random checkpoint that there is not."""


def synthetic_kind(model: str) -> Kind | None:
    """The kind of checkpoint where `model` is "random:toy", "random:3b" or "random:7b", None where it is anything else.

    Raises:
        ValueError: if it is "random:" something else.
    """
    scheme, _, kind = model.partition(":")
    if scheme != "random":
        return None
    known: tuple[Kind, ...] = get_args(Kind)
    for candidate in known:
        if kind == candidate:
            return candidate
    raise SyntheticError(
        f"there is no {model!r}: random checkpoints are {', '.join(f'random:{kind}' for kind in known)}"
    )


def make_checkpoint(
    kind: Kind, out_dir: str | Path, *, dtype: DType | None = None, seed: int = 0, layout: Layout | None = None
) -> Path:
    """Write a checkpoint with random weights, holding one tensor in memory at a time.

    Args:
        kind: "toy" (3 MB), "3b" or "7b" (1.3 GB of disk in bfloat16, whatever size is shown).
        out_dir: a directory that is empty or does not exist yet.
        dtype: of all weights. None is bfloat16, but float32 for the toy: its answers can then be compared by token.
        seed: equal seeds give equal weights.
        layout: how it is saved.

    Returns:
        The directory.

    Raises:
        FileExistsError: if there is something in `out_dir`.
    """
    directory, layout = Path(out_dir), layout or Layout()
    dtype = dtype or ("float32" if kind == "toy" else "bfloat16")
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty, and a checkpoint's files would mix with what it holds")

    config = model_config(kind, dtype)
    weights = [_Weight(layout.prefix + name, shape) for name, shape in _vision_shapes(TowerSpec.from_config(config))]
    text_prefix = "model." if layout.prefix == "visual." else "model.language_model."
    weights += [_Weight(name, shape, hole=kind != "toy") for name, shape in _text_shapes(config, text_prefix)]
    if (layout.files or ("single" if kind == "toy" else "sharded")) == "single":
        _write_shard(directory / SINGLE_FILE, weights, dtype, seed)
    else:
        _write_shards(directory, weights, dtype, seed, _TOY_SHARD_BYTES if kind == "toy" else _PUBLISHED_SHARD_BYTES)
    if kind == "toy":
        write_tokenizer(directory)
    # Last, because it is what makes the directory a checkpoint.
    write_configs(directory, config, nested=layout.config == "transformers5")
    return directory


def _vision_shapes(spec: TowerSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        tower = Tower(spec, PixelSpec())
    return ((name, tuple(tensor.shape)) for name, tensor in tower.state_dict().items())


def _text_shapes(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the language model (Qwen2), the embedding first, as transformers saves them."""
    hidden, mlp, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv_width = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield f"{prefix}embed_tokens.weight", (vocabulary, hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"{prefix}layers.{index}."
        for name, width in (("q_proj", hidden), ("k_proj", kv_width), ("v_proj", kv_width)):
            yield f"{layer}self_attn.{name}.weight", (width, hidden)
            yield f"{layer}self_attn.{name}.bias", (width,)
        yield f"{layer}self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}mlp.gate_proj.weight", (mlp, hidden)
        yield f"{layer}mlp.up_proj.weight", (mlp, hidden)
        yield f"{layer}mlp.down_proj.weight", (hidden, mlp)
        yield f"{layer}input_layernorm.weight", (hidden,)
        yield f"{layer}post_attention_layernorm.weight", (hidden,)
    yield f"{prefix}norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocabulary, hidden)


def _values(weight: _Weight, seed: int) -> Tensor:
    """The weight in float32. Each has a generator of its own, so that neither order nor prefix matters."""
    canonical = weight.name.removeprefix("model.").removeprefix("language_model.")
    digest = hashlib.sha256(f"{seed} {canonical}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.randn(weight.shape, generator=generator)
    if canonical.endswith(".bias"):
        return values * 0.02
    if len(weight.shape) == 1:  # a norm's
        return 1 + values * 0.1
    values *= math.prod(weight.shape[1:]) ** -0.5
    if ".qkv." in canonical:
        values[: weight.shape[0] * 2 // 3] *= _QUERY_KEY_GAIN
    elif ".q_proj." in canonical or ".k_proj." in canonical:
        values *= _QUERY_KEY_GAIN
    return values


def _write_shard(path: Path, weights: Sequence[_Weight], dtype: DType, seed: int) -> None:
    """One safetensors file, its tensors sorted by name as the safetensors library writes them."""
    code, number_bytes = _STORED[dtype]
    ordered = sorted(weights)
    with path.open("wb") as file:
        file.write(pack_header((w.name, code, w.shape, math.prod(w.shape) * number_bytes) for w in ordered))
        for weight in ordered:
            if weight.hole:
                file.seek(math.prod(weight.shape) * number_bytes, 1)
            else:
                values = _values(weight, seed).to(getattr(torch, dtype))
                file.write(values.view(torch.uint8).numpy().data)
        file.truncate()  # a hole at the end counts too


def _write_shards(directory: Path, weights: Sequence[_Weight], dtype: DType, seed: int, shard_bytes: int) -> None:
    """Shards of at most `shard_bytes`, filled in the model's order (the vision tower first) as transformers does it."""
    shards: list[list[_Weight]] = [[]]
    filled = total = 0
    for weight in weights:
        size = math.prod(weight.shape) * _STORED[dtype][1]
        if filled + size > shard_bytes and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(weight)
        filled += size
        total += size
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        name = f"model-{index:05}-of-{len(shards):05}.safetensors"
        _write_shard(directory / name, shard, dtype, seed)
        weight_map |= dict.fromkeys((weight.name for weight in shard), name)
    write_json(
        directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )
