"""The sealed artifact: a directory of graphs and one manifest that says what they are.

    artifact/
      manifest.json            the tower, the preprocessing, the variants, every file's sha256, measured accuracy
      manifest.json.sha256     the seal, in the form `sha256sum --check` reads
      reference.safetensors    small items with their float32 embeddings, which every lane must reproduce before it serves
      openvino/… onnx/… torch/…

`seal` writes the last two; `open_artifact` believes nothing that does not match them. What a graph contains is not known here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from sidecar.vision.digits import apart
from sidecar.vision.dtypes import DType
from sidecar.vision.grid import Grid, GridError
from sidecar.vision.pixels import Patches
from sidecar.vision.reference import Deviation, Reference
from sidecar.vision.spec import PixelSpec, SpecError, TowerSpec

SCHEMA = 2
MANIFEST = "manifest.json"
SEAL = "manifest.json.sha256"
REFERENCE = "reference.safetensors"

_BLOCK_BYTES = 1 << 22
_SEAL_LINE = re.compile(rb"([0-9a-f]{64}) [ *]" + re.escape(MANIFEST.encode()) + rb"\s*")


class ArtifactError(ValueError):
    """An artifact that is damaged, incomplete, of another schema, or not good enough to serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How a variant's embeddings compare with float32 torch, over all rows of all samples.

    `cosine_*` are row-wise; `relative_error` is the Frobenius norm of the difference over that of the reference, the worst
    sample's; `bar` is the least `cosine_min` that this precision must reach.
    """

    cosine_min: float
    cosine_mean: float
    relative_error: float
    finite: bool
    bar: float
    samples: tuple[Mapping[str, Any], ...] = ()

    @property
    def passed(self) -> bool:
        return self.finite and self.cosine_min >= self.bar

    def shortfall(self) -> str:
        """What is wrong with it, for a person."""
        if not self.finite:
            return "some embeddings were not finite"
        cosine, bar = apart(self.cosine_min, self.bar, 5)
        return f"row-wise cosine against float32 torch fell to {cosine}, the bar is {bar}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "cosine_min": self.cosine_min,
            "cosine_mean": self.cosine_mean,
            "relative_error": self.relative_error,
            "finite": self.finite,
            "bar": self.bar,
            "samples": [dict(sample) for sample in self.samples],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(**{**values, "samples": tuple(values["samples"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One graph of the artifact: a runtime, a precision, and the files it needs, `graph` first among them.

    `references`: how far its embedding of each reference was from the sealed one at export.
    """

    runtime: str
    precision: str
    graph: str
    files: tuple[str, ...]
    accuracy: Accuracy | None = None
    references: tuple[Deviation, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.runtime}/{self.precision}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "runtime": self.runtime,
            "precision": self.precision,
            "graph": self.graph,
            "files": list(self.files),
            "accuracy": None if self.accuracy is None else self.accuracy.to_dict(),
            "references": [asdict(deviation) for deviation in self.references],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        accuracy = values["accuracy"]
        return cls(
            runtime=values["runtime"],
            precision=values["precision"],
            graph=values["graph"],
            files=tuple(values["files"]),
            accuracy=None if accuracy is None else Accuracy.from_dict(accuracy),
            references=tuple(Deviation(**deviation) for deviation in values["references"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Where the weights came from. `source` is a hub id with its commit or a directory's name, never a path."""

    source: str
    dtype: DType
    random_weights: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that an artifact says of itself, but for the files' hashes."""

    fingerprint: str
    checkpoint: Checkpoint
    tower: TowerSpec
    pixels: PixelSpec
    variants: tuple[Variant, ...]
    versions: Mapping[str, str]

    def variant(self, runtime: str, precision: str | None = None) -> Variant:
        """The variant of a runtime; without a precision, the first, which export puts first for a reason.

        Raises:
            ArtifactError: if there is none.
        """
        for variant in self.variants:
            if variant.runtime == runtime and precision in (None, variant.precision):
                return variant
        wanted = runtime if precision is None else f"{runtime}/{precision}"
        flags = [] if precision is None else [f"--precision {precision}"]
        if all(variant.runtime != runtime for variant in self.variants):
            flags.insert(0, "--via optimum" if runtime == "optimum" else f"--format {runtime}")
        raise ArtifactError(
            f"the artifact has no {wanted}; it has {', '.join(v.name for v in self.variants) or 'nothing'}; "
            f"export again with {' '.join(flags)}"
        )


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact whose seal held when it was opened."""

    directory: Path
    manifest: Manifest
    hashes: Mapping[str, str]

    def path(self, name: str) -> Path:
        return self.directory / name

    def references(self) -> list[Reference]:
        """The sealed references; none where nothing was sealed.

        Raises:
            ArtifactError: if their file is missing or changed, or its content does not fit the tower.
        """
        if REFERENCE not in self.hashes:
            return []
        self.verify([REFERENCE])
        tower = self.manifest.tower
        try:
            tensors = safetensors.numpy.load_file(self.path(REFERENCE))
            references = []
            for number in range(len(tensors) // 3):
                t, h, w = (int(size) for size in tensors[f"{number}.grid"])
                grid = Grid(t, h, w).check(tower)
                patches, rows = tensors[f"{number}.patches"], tensors[f"{number}.rows"]
                fits = patches.shape == (grid.patches, tower.patch_width) and patches.dtype == np.uint8
                if not (
                    fits and rows.shape == (grid.tokens(tower), tower.out_hidden_size) and rows.dtype == np.float32
                ):
                    raise ValueError(
                        f"reference {number} has arrays of other shapes or types than its grid {tuple(grid)} needs"
                    )
                references.append(Reference(Patches(patches, grid), rows))
        except (SafetensorError, KeyError, ValueError, GridError) as error:
            raise ArtifactError(f"{REFERENCE} cannot be read: {error}; export the artifact again") from None
        return references

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Check files against their hashes: the named ones, or all.

        Raises:
            ArtifactError: if one is missing or changed.
        """
        for name in self.hashes if names is None else names:
            if name not in self.hashes:
                raise ArtifactError(f"the manifest names {name} as part of a variant but holds no hash of it")
            path = self.path(name)
            if not path.is_file():
                raise ArtifactError(f"{name} is missing; export the artifact again or copy it whole")
            if sha256_of(path) != self.hashes[name]:
                raise ArtifactError(
                    f"{name} does not match its sha256 in the manifest; export the artifact again or copy it whole"
                )


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def tensor_hash(dtype: str, shape: Sequence[int], values: bytes | memoryview) -> str:
    """Hex sha256 of one weight: its dtype as torch names it, its shape, and its bytes as the checkpoint stores them."""
    digest = hashlib.sha256(f"{dtype} {list(shape)}\n".encode())
    digest.update(values)
    return digest.hexdigest()


def fingerprint(tower: TowerSpec, pixels: PixelSpec, tensor_hashes: Mapping[str, str]) -> str:
    """One hash of tower, preprocessing and weights.

    `tensor_hashes` maps each weight's name to its `tensor_hash`. Runtime and precision have no part in it, because embeddings of
    the same weights are interchangeable whoever computed them.
    """
    identity = {"tower": tower.to_dict(), "pixels": pixels.to_dict(), "weights": dict(tensor_hashes)}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_references(directory: Path, references: Sequence[Reference]) -> None:
    """Write what `Artifact.references` reads; to be called before `seal`."""
    tensors: dict[str, np.ndarray] = {}
    for number, reference in enumerate(references):
        tensors[f"{number}.grid"] = np.array(reference.patches.grid, np.int64)
        tensors[f"{number}.patches"] = reference.patches.values
        tensors[f"{number}.rows"] = np.ascontiguousarray(reference.rows)
    # Not save_file, which gives the file a mode that nobody but its owner can read.
    (directory / REFERENCE).write_bytes(safetensors.numpy.save(tensors))


def seal(directory: Path, manifest: Manifest) -> Artifact:
    """Hash every file under `directory`, write the manifest and its seal, and return the artifact.

    Raises:
        ArtifactError: if a variant names a file that is not there.
    """
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    hashes = {name: sha256_of(directory / name) for name in names if name not in (MANIFEST, SEAL)}
    sizes = {name: (directory / name).stat().st_size for name in hashes}
    for variant in manifest.variants:
        missing = [name for name in variant.files if name not in hashes]
        if missing:
            raise ArtifactError(f"{variant.name} needs {', '.join(missing)}, which was not written")
    content = {
        "schema": SCHEMA,
        "fingerprint": manifest.fingerprint,
        "checkpoint": {
            "source": manifest.checkpoint.source,
            "dtype": str(manifest.checkpoint.dtype),
            "random_weights": manifest.checkpoint.random_weights,
        },
        "tower": manifest.tower.to_dict(),
        "pixels": manifest.pixels.to_dict(),
        "variants": [variant.to_dict() for variant in manifest.variants],
        "versions": dict(manifest.versions),
        "files": {name: {"sha256": hashes[name], "bytes": sizes[name]} for name in hashes},
    }
    data = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    (directory / MANIFEST).write_bytes(data)
    (directory / SEAL).write_text(f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n")
    return Artifact(directory, manifest, hashes)


def open_artifact(directory: Path) -> Artifact:
    """Read a manifest whose seal holds. The graphs are checked by `Artifact.verify`.

    Raises:
        ArtifactError: if it is absent, changed, unreadable or of another schema.
    """
    manifest_path, seal_path = directory / MANIFEST, directory / SEAL
    if not manifest_path.is_file():
        raise ArtifactError(
            f"there is no {MANIFEST} in the artifact directory; `python -m export --out DIR` writes one"
        )
    if not seal_path.is_file():
        raise ArtifactError(f"{SEAL} is missing; export the artifact again or copy it whole")
    data = manifest_path.read_bytes()
    sealed = _SEAL_LINE.fullmatch(seal_path.read_bytes())
    if sealed is None:
        raise ArtifactError(f"{SEAL} does not hold a sha256; export the artifact again or copy it whole")
    if hashlib.sha256(data).hexdigest() != sealed[1].decode():
        raise ArtifactError(f"{MANIFEST} was changed after export: it does not match {SEAL}")
    try:
        content = json.loads(data)
        schema = content["schema"]
        if schema != SCHEMA:
            raise ArtifactError(
                f"the artifact is of schema {schema}, this sidecar reads schema {SCHEMA}; "
                + ("update the sidecar" if schema > SCHEMA else "export the artifact again")
            )
        checkpoint = content["checkpoint"]
        manifest = Manifest(
            fingerprint=content["fingerprint"],
            checkpoint=Checkpoint(**{**checkpoint, "dtype": DType(checkpoint["dtype"])}),
            tower=TowerSpec.from_dict(content["tower"]),
            pixels=PixelSpec.from_dict(content["pixels"]),
            variants=tuple(Variant.from_dict(variant) for variant in content["variants"]),
            versions=content["versions"],
        )
        hashes = {name: entry["sha256"] for name, entry in content["files"].items()}
    except ArtifactError:
        raise
    except KeyError as error:
        raise ArtifactError(f"{MANIFEST} cannot be read: it lacks {error}") from None
    except (ValueError, TypeError, AttributeError, SpecError) as error:
        raise ArtifactError(f"{MANIFEST} cannot be read: {error}") from None
    for name in [*hashes, *(file for variant in manifest.variants for file in (variant.graph, *variant.files))]:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ArtifactError(f"{MANIFEST} names a file outside the artifact: {name}")
    for variant in manifest.variants:
        if variant.graph not in variant.files:
            raise ArtifactError(
                f"{MANIFEST} does not list {variant.graph}, the graph of {variant.name}, among its files"
            )
        if not variant.references or REFERENCE not in hashes:
            raise ArtifactError(f"{MANIFEST} holds no reference for {variant.name}; export the artifact again")
    return Artifact(directory, manifest, hashes)
