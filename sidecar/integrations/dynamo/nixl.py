"""Modes `nixl-write` and `nixl-read`: Dynamo's own senders, which bring torch, vLLM and NIXL into the process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from dynamo.common.multimodal import NixlReadEmbeddingSender, NixlWriteEmbeddingSender

from sidecar.integrations.dynamo.protocol import Transfer
from sidecar.replies import Embedding
from sidecar.vision.dtypes import DType

_SENDERS = {"nixl-write": NixlWriteEmbeddingSender, "nixl-read": NixlReadEmbeddingSender}


class NixlHandOver:
    """What `HandOver` says, from and to memory."""

    def __init__(self, mode: str) -> None:
        """Raises:
        OSError: if NIXL is not there, or does not start.
        """
        try:
            self._sender: Any = _SENDERS[mode]()
        except Exception as error:
            raise OSError(f"--embedding-transfer-mode {mode}: {error}") from error
        self._offered: set[asyncio.Task[None]] = set()

    async def offer(self, embeddings: Sequence[Embedding]) -> list[Transfer]:
        """Raises:
        OSError: whatever NIXL says. The senders cannot take back what was offered before that: its memory stays.
        """
        return [await self._offer(embedding) for embedding in embeddings]

    async def _offer(self, embedding: Embedding) -> Transfer:
        tensor = _tensor(embedding)
        try:
            request, taken = await self._sender.send_embeddings(tensor, stage_embeddings=True)
        except Exception as error:  # of NIXL's own kinds, which differ by version
            raise OSError(f"NIXL: {error}") from error
        task = asyncio.create_task(_keep(tensor, taken))
        self._offered.add(task)
        task.add_done_callback(self._offered.discard)
        return Transfer.of(embedding, request.serialized_request)

    async def close(self, wait_s: float) -> None:
        if self._offered:
            await asyncio.wait(self._offered, timeout=wait_s)


async def _keep(tensor: torch.Tensor, taken: Any) -> None:
    """Hold the memory until the other side has it."""
    await taken


def _tensor(embedding: Embedding) -> torch.Tensor:
    """(1, tokens, width), in memory of its own."""
    if embedding.dtype is DType.BFLOAT16:
        return torch.from_numpy(embedding.data.view("int16").copy()).view(torch.bfloat16).unsqueeze(0)
    return torch.from_numpy(embedding.data.copy()).unsqueeze(0)
