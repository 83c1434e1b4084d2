"""A directory that optimum-intel wrote, taken for an artifact although nobody sealed it.

`optimum-cli export openvino` leaves the two vision graphs beside those of the language model, with config.json and the
processor's files, and nothing that says which weights they hold or how accurate they are. So an adopted artifact has no
measured accuracy, its hashes only notice files that change after they were adopted, and its fingerprint is its own: a hash
of the graphs' files. That differs from the fingerprint of the checkpoint they came from, and from that of a second export of
it; a prefill worker that compares identities must be told this one. `python -m export --via optimum` writes a sealed artifact
with the checkpoint's fingerprint instead.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from sidecar.artifact import Artifact, ArtifactError, Checkpoint, Manifest, Variant, fingerprint, sha256_of
from sidecar.runtimes.optimum_pair import MERGER, pair_files
from sidecar.vision.dtypes import DType
from sidecar.vision.processors import IMAGE_PROCESSOR, PROCESSOR_FILES, pixel_spec, processor_configs
from sidecar.vision.spec import PixelSpec, SpecError, TowerSpec

CONFIG = "config.json"

# What the graph computes in, by the type that most of its weights are stored in (names as in the .xml).
_PRECISION = {"f32": "f32", "f16": "bf16", "bf16": "bf16", "i8": "int8", "u8": "int8"}
# Shapes, axes and indices: constants that are not weights.
_INDEX_TYPES = {"i32", "i64", "u32", "u64", "boolean", "string"}


def is_optimum_directory(directory: Path) -> bool:
    """Whether optimum exported a Qwen-VL into this directory. Whether it can be served, `adopt_optimum` finds out."""
    return (directory / MERGER).is_file()


def adopt_optimum(directory: Path) -> Artifact:
    """An artifact with one variant, runtime `optimum`, of the graphs in `directory`; nothing is written.

    Raises:
        ArtifactError: if a file is missing or unreadable, or the model is not a Qwen2.5-VL.
    """
    merger = directory / MERGER
    files = [path.name for path in pair_files(merger)]
    missing = [name for name in (*files, CONFIG) if not (directory / name).is_file()]
    if missing:
        raise ArtifactError(f"{directory} lacks {', '.join(missing)}; give a whole directory of optimum-cli's")
    config = _json(directory / CONFIG)
    try:
        tower = TowerSpec.from_config(config)
        pixels = _pixel_spec(directory, tower)
    except ArtifactError:
        raise
    except (SpecError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{directory}: {error}") from None
    facts = read_ir(merger)
    hashes = {name: sha256_of(directory / name) for name in files}
    manifest = Manifest(
        fingerprint=fingerprint(tower, pixels, hashes),
        checkpoint=Checkpoint(
            source=directory.resolve().name,
            dtype=_model_dtype(config, facts.precision),
            random_weights=config.get("random_weights") is True,
        ),
        tower=tower,
        pixels=pixels,
        variants=(Variant(runtime="optimum", precision=facts.precision, graph=MERGER, files=tuple(files)),),
        versions=facts.versions,
    )
    beside = {name: sha256_of(directory / name) for name in (CONFIG, *PROCESSOR_FILES) if (directory / name).is_file()}
    return Artifact(directory, manifest, {**hashes, **beside})


@dataclass(frozen=True, slots=True)
class IrFacts:
    """What a graph's .xml says of itself: the precision of its weights, and the packages that optimum wrote it with."""

    precision: str
    versions: dict[str, str]


def read_ir(xml: Path) -> IrFacts:
    """Read an .xml that optimum wrote, without its weights.

    The precision is that of most of the weights: optimum keeps norms and biases wide, and adds float scales to int8.

    Raises:
        ArtifactError: if it is no OpenVINO graph, or one of weights that no precision of ours stands for (4 bits).
    """
    weight_bytes: Counter[str] = Counter()
    versions: dict[str, str] = {}
    try:
        for _, element in ElementTree.iterparse(xml):
            if element.tag == "layer":
                data = element.find("data")
                if element.get("type") == "Const" and data is not None:
                    weight_bytes[data.get("element_type", "")] += int(data.get("size", "0"))
                element.clear()
            elif element.tag == "optimum":
                for package in element:
                    name = package.tag.removesuffix("_version").replace("_", "-")
                    versions[name] = package.get("value", "")
    except (ElementTree.ParseError, ValueError, OSError) as error:
        raise ArtifactError(f"{xml.name} is no OpenVINO graph: {error}") from None
    weights = [(size, kind) for kind, size in weight_bytes.items() if kind not in _INDEX_TYPES]
    if not weights:
        raise ArtifactError(f"{xml.name} holds no weights")
    _, kind = max(weights)
    if kind not in _PRECISION:
        raise ArtifactError(f"{xml.name} holds weights of type {kind}; the sidecar serves {', '.join(_PRECISION)}")
    return IrFacts(_PRECISION[kind], versions)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path.name} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path.name} must be a JSON object, got {type(value).__name__}")
    return value


def _pixel_spec(directory: Path, tower: TowerSpec) -> PixelSpec:
    def read(name: str) -> dict[str, Any] | None:
        return _json(directory / name) if (directory / name).is_file() else None

    image, video = processor_configs(read)
    if image is None:
        raise ArtifactError(
            f"{directory} has no image processor's configuration; copy {IMAGE_PROCESSOR} from the checkpoint"
        )
    return pixel_spec(image, video, tower)


def _model_dtype(config: dict[str, Any], precision: str) -> DType:
    """What the language model computes in, as the checkpoint says (`torch_dtype` before transformers 5)."""
    stated = config.get("dtype") or config.get("torch_dtype")
    if stated in (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16):
        return DType(stated)
    return DType.FLOAT32 if precision == "f32" else DType.BFLOAT16
