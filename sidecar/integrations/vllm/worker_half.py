"""The connector's half in each of vLLM's workers: from a file to the device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from sidecar.integrations.vllm.files import LocalFile
from sidecar.store_file import read


class WorkerHalf:
    """
    Args:
        dtype: of vLLM's model, which embeddings are brought to.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def load(
        self, loads: Mapping[str, LocalFile], encoder_cache: dict[str, torch.Tensor], device: torch.device
    ) -> None:
        """Put every embedding, (tokens, width), where vLLM's model looks for it.

        Raises:
            OSError, StoreFileError: if a file is not what the scheduler's half had checked. vLLM ends then, since it cannot go on
                without an embedding that it was promised; only who removes or replaces this user's files brings that about.
        """
        for identifier, file in loads.items():
            if identifier not in encoder_cache:
                encoder_cache[identifier] = self._tensor(file).to(device=device, dtype=self._dtype)

    def _tensor(self, file: LocalFile) -> torch.Tensor:
        rows = read(Path(file.directory), file.name, file.description)
        # Own memory: torch warns of what it may not write, and the file goes before the tensor does.
        return torch.from_numpy(rows.copy()).view(getattr(torch, file.description.dtype))
