"""The half of `--via optimum` that runs in optimum-intel's environment, as a script: `python -I optimum_child.py --help`.

It writes what `optimum-cli export openvino` writes of a Qwen2.5-VL, but only the two vision graphs. optimum needs the whole
model object for them, so a hub id is downloaded whole; of a directory, the language model is mapped but hardly read.

Nothing of this project is imported: that environment does not have it. It is run with -I, because a script's own directory
comes first on the module path and this one holds a torch.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

# Without the pickled copies of the weights that some repositories keep beside the safetensors.
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
_BEHAVIORS = ["vision_embeddings", "vision_embeddings_merger"]
_MODEL_TYPES = ("qwen2_5_vl", "qwen2_5_vl_vision")


def main() -> None:
    parser = argparse.ArgumentParser(description="Export the vision graphs of a Qwen2.5-VL with optimum-intel.")
    parser.add_argument("--model", required=True, help="checkpoint directory or hub id")
    parser.add_argument("--revision", help="commit of a hub id")
    parser.add_argument("--dtype", required=True, help="what the weights are stored in: float32, float16 or bfloat16")
    parser.add_argument("--plain", required=True, type=Path, help="directory for the graphs with those weights")
    parser.add_argument("--int8", type=Path, help="directory for the same graphs with int8 weights")
    options = parser.parse_args()
    model = options.model if Path(options.model).is_dir() else download(options.model, options.revision)
    write_plain(model, options.dtype, options.plain)
    if options.int8 is not None:
        write_int8(options.plain, options.int8)


def download(repo_id: str, revision: str | None) -> str:
    """The checkpoint's snapshot. optimum would take the processor's files from the main branch, whatever the revision."""
    from huggingface_hub import snapshot_download

    return snapshot_download(repo_id, revision=revision, allow_patterns=_HUB_FILES)


def write_plain(model: str, dtype: str, out: Path) -> None:
    import torch
    from optimum.exporters.openvino import main_export, utils
    from optimum.exporters.openvino.model_configs import Qwen2_5_VLOpenVINOConfig
    from optimum.intel import OVConfig

    Qwen2_5_VLOpenVINOConfig.SUPPORTED_BEHAVIORS = _BEHAVIORS
    # torch.jit's check runs the traced tower again and again and holds every activation: 17 GB at real size, 5 GB without it.
    # Our own measurement of the finished graphs checks more.
    utils.SKIP_CHECK_TRACE_MODELS = (*utils.SKIP_CHECK_TRACE_MODELS, *_MODEL_TYPES)
    main_export(
        model,
        out,
        task="image-text-to-text",
        library_name="transformers",
        model_loading_kwargs={"torch_dtype": getattr(torch, dtype)},
        # Keeps main_export from turning weights into int8 by itself where it finds a model large.
        ov_config=OVConfig(dtype="fp32"),
    )


def write_int8(plain: Path, out: Path) -> None:
    """Symmetric int8 weights with a scale per output, which is what `optimum-cli --weight-format int8` gives these parts."""
    import nncf
    import openvino

    out.mkdir(parents=True)
    for xml in sorted(plain.glob("openvino_vision_*.xml")):
        model = openvino.Core().read_model(xml)
        compressed = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        openvino.save_model(compressed, out / xml.name, compress_to_fp16=False)


if __name__ == "__main__":
    main()
