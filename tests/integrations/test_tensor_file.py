"""Embeddings as vLLM reads them from a request."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from sidecar.integrations.tensor_file import tensor_file
from sidecar.vision.dtypes import DType


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16])
def test_vllm_reads_every_type_bit_for_bit(dtype: DType) -> None:
    """With the two calls of vLLM's ImageEmbeddingMediaIO."""
    bits = np.random.default_rng(0).integers(0, 256, (300, 5 * dtype.storage.itemsize), np.uint8).view(dtype.storage)
    file = tensor_file(bits, dtype)
    if file[:6] == b"\x93NUMPY":
        read = torch.from_numpy(np.load(io.BytesIO(file)))
    else:
        read = torch.load(io.BytesIO(file), weights_only=True)
    assert str(read.dtype) == f"torch.{dtype}" and read.shape == (300, 5) and read.is_contiguous()
    assert read.view(torch.uint8).numpy().tobytes() == bits.tobytes()
    assert len(file) < bits.nbytes + 1200
