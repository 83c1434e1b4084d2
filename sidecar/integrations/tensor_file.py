"""An embedding as the bytes that vLLM decodes from the base64 of an `image_embeds` part.

vLLM's ImageEmbeddingMediaIO (vllm/multimodal/media/image.py, the same in 0.31 and 0.32) takes two formats: numpy's .npy, and what
`torch.load(weights_only=True)` reads. numpy has no bfloat16, and widening to float32 would double what is sent, so bfloat16 goes
as torch's format, which needs no torch: an uncompressed zip of the raw values and a pickle of their shape
(https://docs.pytorch.org/docs/stable/notes/serialization.html).
"""

from __future__ import annotations

import io
import zipfile

import numpy as np

from sidecar.vision.dtypes import Array, DType


def tensor_file(values: Array, dtype: DType) -> bytes:
    """The file of a tensor of shape (tokens, width), with `values` held as `dtype.storage`; bit for bit, and always the same."""
    return _torch_file(values) if dtype is DType.BFLOAT16 else _npy_file(values)


def _npy_file(values: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


def _torch_file(bits: Array) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        # A ZipInfo made by name has a fixed date, so that equal tensors are equal files.
        for name, content in (
            ("data.pkl", _pickled(*bits.shape)),
            ("byteorder", b"little"),
            ("data/0", bits.tobytes()),
            ("version", b"3\n"),
        ):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
    return file.getvalue()


def _pickled(rows: int, columns: int) -> bytes:
    """What pickle (protocol 2) makes of a contiguous tensor: the opcodes that are spelled out in `pickletools`.

    torch._utils._rebuild_tensor_v2(storage, offset 0, (rows, columns), strides (columns, 1), no gradient, no hooks)
    """

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    def whole(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    def pair(first: int, second: int) -> bytes:
        return whole(first) + whole(second) + b"\x86"

    storage = (text("storage"), b"ctorch\nBFloat16Storage\n", text("0"), text("cpu"), whole(rows * columns))
    arguments = (
        *(b"(", *storage, b"tQ"),
        whole(0),
        pair(rows, columns),
        pair(columns, 1),
        b"\x89",
        b"ccollections\nOrderedDict\n)R",
    )
    return b"".join((b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(", *arguments, b"tR."))
