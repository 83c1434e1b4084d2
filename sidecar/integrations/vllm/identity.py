"""Whether a sidecar's embeddings are those of the model that this vLLM has loaded.

An artifact's fingerprint is a hash of tower, preprocessing and weights (`sidecar.artifact`). It is computed here from the very
checkpoint that vLLM loads, so that equal fingerprints prove equal weights. Where that cannot be done (the weights are quantised,
made up, or not in safetensors on this host), the structure is compared, and the first fingerprint seen is the only one accepted.
"""

from __future__ import annotations

import logging
from pathlib import Path

from sidecar.integrations.checkpoint import checkpoint_directory, checkpoint_fingerprint, pixel_spec
from sidecar.pb import encoder_pb2
from sidecar.replies import ClientError
from sidecar.vision.spec import PixelSpec, SpecError, TowerSpec

# vLLM shows what is logged below its own name.
logger = logging.getLogger("vllm." + __name__)


class MismatchError(ClientError):
    """A sidecar holds another model."""


class Identity:
    """What this vLLM's model is, as far as it can be told."""

    def __init__(self, tower: TowerSpec, model: str, revision: str | None, given: str | None, *, loads: bool) -> None:
        """
        Args:
            tower: of the configuration that vLLM has loaded.
            model, revision: as vLLM was given them.
            given: the operator's word for the fingerprint.
            loads: whether vLLM loads the checkpoint's weights at all.
        """
        self.tower = tower
        self.pixels: PixelSpec | None = None
        self.expected = given
        self.proven = given is not None
        self._model, self._revision = model, revision
        self._loads = loads
        self._unsupported = ""

    def establish(self) -> None:
        """Read the checkpoint: seconds for 1.3 GB of weights. To be called once, on a thread."""
        directory = checkpoint_directory(self._model, self._revision)
        if directory is None:
            logger.warning(
                "the checkpoint %s is not on this host: which weights vLLM has cannot be proven", self._model
            )
            return
        try:
            self.pixels = pixel_spec(directory, self.tower)
        except SpecError as error:
            self._unsupported = f"no sidecar can stand in for this checkpoint's preprocessing: {error}"
            logger.error("%s", self._unsupported)
            return
        except (OSError, ValueError) as error:
            logger.warning("the processor's configuration of %s cannot be read: %s", self._model, error)
            return
        if self.proven or not self._loads:
            return
        try:
            self.expected = checkpoint_fingerprint(directory, self.pixels)
            self.proven = True
        except (OSError, ValueError, KeyError) as error:
            logger.warning("no fingerprint of %s: %s; only its structure can be compared", self._model, error)

    def meet(self, info: encoder_pb2.InfoResponse) -> None:
        """Compare with what a sidecar says of itself.

        Raises:
            MismatchError: if it cannot stand in for this vLLM's own tower, or none can for its preprocessing.
        """
        if self.proven or self._unsupported:
            return self.check(info.fingerprint)
        for name in (
            "depth",
            "hidden_size",
            "out_hidden_size",
            "patch_size",
            "temporal_patch_size",
            "spatial_merge_size",
        ):
            ours, theirs = getattr(self.tower, name), getattr(info.tower, name)
            if ours != theirs:
                raise MismatchError(f"the sidecar's tower has {name} {theirs}, this model's has {ours}")
        if self.pixels is not None:
            for name in ("image_mean", "image_std"):
                if (ours := getattr(self.pixels, name)) != (theirs := tuple(getattr(info.pixels, name))):
                    raise MismatchError(f"the sidecar normalises with {name} {theirs}, this model with {ours}")
        if self.expected is None:
            self.expected = info.fingerprint
        return self.check(info.fingerprint)

    def check(self, theirs: str) -> None:
        """Raises:
        MismatchError: if an embedding is not of this model.
        """
        if self._unsupported:
            raise MismatchError(self._unsupported)
        if theirs != self.expected:
            ours = "unknown" if self.expected is None else f"{self.expected[:16]}…"
            raise MismatchError(
                f"the sidecar serves the fingerprint {theirs[:16]}…, this model's is {ours}; export the checkpoint that vLLM "
                f"has loaded ({Path(self._model).name})"
            )
