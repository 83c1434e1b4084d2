"""Whether the sidecars hold the model that prefill has, and whether an embedding is one of that model."""

from __future__ import annotations

import logging

from sidecar.integrations.checkpoint import checkpoint_directory, checkpoint_fingerprint, pixel_spec, tower_spec
from sidecar.pb import encoder_pb2
from sidecar.replies import ClientError, Embedding
from sidecar.vision.dtypes import all_finite
from sidecar.vision.spec import SpecError

logger = logging.getLogger(__name__)


class MismatchError(Exception):
    """A sidecar holds another model."""


class WrongEmbeddingError(ClientError):
    """What a sidecar sent is not what was asked for."""


class Model:
    """The model whose embeddings are handed over, as soon as it is known.

    Attributes:
        fingerprint: of prefill's checkpoint where that lies on this host, as given, or of the first sidecar that was met.
    """

    def __init__(
        self,
        fingerprint: str = "",
        *,
        proven: bool = False,
        shape: tuple[int, int] | None = None,
        unsupported: str = "",
    ) -> None:
        """
        Args:
            fingerprint: see above; empty if it is not known yet.
            proven: whether the fingerprint is the checkpoint's own, or the operator's word.
            shape: an embedding's width, and how many patches a side become one row.
            unsupported: why no sidecar can follow the checkpoint's preprocessing; empty if one can.
        """
        self.fingerprint = fingerprint
        self._unsupported = unsupported
        self._proven = proven
        self._shape = shape

    @classmethod
    def of(cls, checkpoint: str, given: str) -> Model:
        """That of a checkpoint, which is read: seconds for 1.3 GB of weights.

        Args:
            checkpoint: a directory or a hub id; where its files are not here, sidecars are compared with one another only.
            given: the operator's word for the fingerprint; empty, if there is none.
        """
        if given:
            return cls(given, proven=True)
        directory = checkpoint_directory(checkpoint, None)
        if directory is None:
            logger.warning(
                "the checkpoint %s is not on this host: that the sidecars hold its weights cannot be proven", checkpoint
            )
            return cls()
        try:
            tower = tower_spec(directory)
            shape = tower.out_hidden_size, tower.spatial_merge_size
            pixels = pixel_spec(directory, tower)
            return cls(checkpoint_fingerprint(directory, pixels), proven=True, shape=shape)
        except SpecError as error:
            return cls(unsupported=f"no sidecar can stand in for the checkpoint {checkpoint}: {error}")
        except (OSError, ValueError, KeyError) as error:
            logger.warning(
                "no fingerprint of %s: %s; the sidecars are compared with one another only", checkpoint, error
            )
            return cls()

    def meet(self, info: encoder_pb2.InfoResponse) -> None:
        """Learn from a sidecar what embeddings look like.

        Raises:
            MismatchError: if it serves another model, or says of this one what another sidecar, or the checkpoint, does not; or
                if no sidecar can follow the checkpoint's preprocessing.
        """
        if self._unsupported:
            raise MismatchError(self._unsupported)
        if self.fingerprint and info.fingerprint != self.fingerprint:
            whose = "this checkpoint's is" if self._proven else "the others serve"
            raise MismatchError(
                f"the sidecar serves the fingerprint {info.fingerprint[:16]}…, {whose} {self.fingerprint[:16]}…; export the "
                "checkpoint that prefill has loaded"
            )
        shape = info.tower.out_hidden_size, info.tower.spatial_merge_size
        if min(shape) < 1 or (self._shape and shape != self._shape):
            raise MismatchError(
                f"the sidecar's embeddings are {shape[0]} wide and merge {shape[1]}×{shape[1]} patches, "
                + (f"this model's {self._shape[0]} and {self._shape[1]}" if self._shape else "which cannot be")
            )
        self.fingerprint, self._shape = info.fingerprint, shape

    def check(self, embedding: Embedding) -> None:
        """Raises:
        WrongEmbeddingError: if it is not of this model, or not what its grid says, or not finite.
        """
        if embedding.fingerprint != self.fingerprint:
            raise WrongEmbeddingError(
                f"it is of the model {embedding.fingerprint[:16]}…, prefill's is {self.fingerprint[:16]}…"
            )
        assert self._shape is not None  # no image is asked for before a sidecar has been met
        width, merge = self._shape
        expected = (embedding.grid.patches // merge**2, width)
        if embedding.data.shape != expected:
            raise WrongEmbeddingError(
                f"its shape is {embedding.data.shape}, its grid {tuple(embedding.grid)} means {expected}"
            )
        if embedding.grid.t != 1:
            raise WrongEmbeddingError(f"its grid {tuple(embedding.grid)} is a video's")
        if not all_finite(embedding.data, embedding.dtype):
            raise WrongEmbeddingError("it holds values that are not finite")
