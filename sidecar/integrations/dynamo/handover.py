"""How an embedding gets to the prefill worker: a file on the same host, or NIXL."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from sidecar.integrations.dynamo.local_files import LocalFiles
from sidecar.integrations.dynamo.protocol import Transfer
from sidecar.replies import Embedding
from sidecar.vision.dtypes import DType

MODES = ("local", "nixl-write", "nixl-read")
# torch's names, which are also safetensors'.
TORCH_NAMES = {DType.BFLOAT16: "bfloat16", DType.FLOAT16: "float16", DType.FLOAT32: "float32"}


class HandOver(Protocol):
    """One way."""

    async def offer(self, embedding: Embedding) -> Transfer:
        """Make it ready for prefill to take.

        Raises:
            OSError: if there is no room for it.
        """

    async def withdraw(self, transfer: Transfer) -> None:
        """Its request failed: nobody will take it."""

    async def close(self, drain_s: float) -> None:
        """End, once what was offered has been taken or so much time is over."""


class LocalHandOver:
    """Mode `local`: files that are removed once they have been read."""

    def __init__(self, files: LocalFiles) -> None:
        self._files = files

    async def offer(self, embedding: Embedding) -> Transfer:
        shape = (1, *embedding.data.shape)
        path = await self._files.add(embedding.data, shape, embedding.dtype)
        return Transfer(shape, TORCH_NAMES[embedding.dtype], str(path))

    async def withdraw(self, transfer: Transfer) -> None:
        self._files.remove(transfer.request)

    async def close(self, drain_s: float) -> None:
        await self._files.close(drain_s)


class NixlHandOver:
    """Modes `nixl-write` and `nixl-read`: Dynamo's own senders, which bring torch and NIXL with them."""

    def __init__(self, mode: str) -> None:
        """Raises:
        ImportError: if Dynamo's multimodal parts are not installed.
        """
        from dynamo.common.multimodal import NixlReadEmbeddingSender, NixlWriteEmbeddingSender

        self._sender: Any = NixlWriteEmbeddingSender() if mode == "nixl-write" else NixlReadEmbeddingSender()
        self._under_way: set[asyncio.Task[None]] = set()

    async def offer(self, embedding: Embedding) -> Transfer:
        tensor = _tensor(embedding)
        request, taken = await self._sender.send_embeddings(tensor, stage_embeddings=True)
        task = asyncio.create_task(_keep(tensor, taken))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return Transfer(tuple(tensor.shape), TORCH_NAMES[embedding.dtype], request.serialized_request)

    async def withdraw(self, transfer: Transfer) -> None:
        """NIXL's senders have no way to take an offer back; theirs end by themselves."""

    async def close(self, drain_s: float) -> None:
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=drain_s)


async def _keep(tensor: Any, taken: Any) -> None:
    """Hold the memory until the other side has it."""
    await taken


def _tensor(embedding: Embedding) -> Any:
    import torch

    if embedding.dtype is DType.BFLOAT16:
        return torch.from_numpy(embedding.data.view("int16").copy()).view(torch.bfloat16).unsqueeze(0)
    return torch.from_numpy(embedding.data.copy()).unsqueeze(0)


def hand_over(mode: str, files: LocalFiles | None) -> HandOver:
    """Raises:
    ImportError: if the mode needs what is not installed.
    """
    if mode == "local":
        assert files is not None
        return LocalHandOver(files)
    return NixlHandOver(mode)
