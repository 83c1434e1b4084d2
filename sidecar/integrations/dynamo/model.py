"""Whether the sidecars hold the model that prefill has, and whether an embedding is one of that model."""

from __future__ import annotations

import logging

from sidecar.integrations.checkpoint import checkpoint_directory, checkpoint_fingerprint, pixel_spec
from sidecar.pb import encoder_pb2
from sidecar.replies import Embedding
from sidecar.vision.dtypes import all_finite

logger = logging.getLogger(__name__)


class MismatchError(Exception):
    """A sidecar holds another model."""


class WrongEmbeddingError(Exception):
    """What a sidecar sent is not what was asked for."""


class Model:
    """The model whose embeddings are handed over, as soon as it is known.

    Attributes:
        fingerprint: of prefill's checkpoint where that lies on this host, as given, or of the first sidecar that was met.
    """

    def __init__(self, fingerprint: str = "", *, proven: bool = False) -> None:
        self.fingerprint = fingerprint
        self._proven = proven
        self._width = self._merge_unit = 0

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
            return cls(checkpoint_fingerprint(directory, pixel_spec(directory)), proven=True)
        except (OSError, ValueError, KeyError) as error:
            logger.warning(
                "no fingerprint of %s: %s; the sidecars are compared with one another only", checkpoint, error
            )
            return cls()

    def meet(self, info: encoder_pb2.InfoResponse) -> None:
        """Learn from a sidecar what embeddings look like.

        Raises:
            MismatchError: if it serves another model.
        """
        if self.fingerprint and info.fingerprint != self.fingerprint:
            whose = "this checkpoint's is" if self._proven else "the others serve"
            raise MismatchError(
                f"the sidecar serves the fingerprint {info.fingerprint[:16]}…, {whose} {self.fingerprint[:16]}…; export the "
                "checkpoint that prefill has loaded"
            )
        self.fingerprint = info.fingerprint
        self._width = info.tower.out_hidden_size
        self._merge_unit = info.tower.spatial_merge_size**2

    def check(self, embedding: Embedding) -> None:
        """Raises:
        WrongEmbeddingError: if it is not of this model, or not what its grid says, or not finite.
        """
        if embedding.fingerprint != self.fingerprint:
            raise WrongEmbeddingError(
                f"it is of the model {embedding.fingerprint[:16]}…, prefill's is {self.fingerprint[:16]}…"
            )
        expected = (embedding.grid.patches // self._merge_unit, self._width)
        if embedding.data.shape != expected:
            raise WrongEmbeddingError(
                f"its shape is {embedding.data.shape}, its grid {tuple(embedding.grid)} means {expected}"
            )
        if not all_finite(embedding.data, embedding.dtype):
            raise WrongEmbeddingError("it holds values that are not finite")
