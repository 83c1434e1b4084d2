"""What the vLLM connector adds to a request, over the inference itself.

    EPD_VLLM/bin/python -m bench.connector MODEL --server ADDRESS

Run by the Python of vLLM's environment. The sidecar has encoded each picture, from the pixels that vLLM will send, before vLLM
sees it. Then the same request is made twice in turn: once vLLM has to get the embedding through the connector, once it has it in
its own cache. Text before the picture differs, so that no prefix is known, and vLLM's cache of processed pictures is off: the two
differ by the connector alone.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
# Otherwise vLLM would keep the connector's thread on the core that it runs the model on.
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor
from vllm import LLM, SamplingParams

from sidecar.client import EncoderClient
from sidecar.integrations.vllm.features import Wanted
from sidecar.vision.grid import Grid
from sidecar.vision.spec import TowerSpec

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--server", required=True)
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--side", type=int, default=448, help="of a picture, in pixels")
    parser.add_argument("--store", default="auto", help="off: embeddings are sent")
    options = parser.parse_args()

    config = {"address": options.server, "on_failure": "fail", "store": options.store}
    transfer = {"ec_connector": "EncoderSidecarConnector", "ec_connector_module_path": "sidecar.integrations.vllm"}
    transfer |= {"ec_role": "ec_consumer", "ec_connector_extra_config": config}
    engine: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048}
    llm = LLM(options.model, mm_processor_cache_gb=0, ec_transfer_config=transfer, **engine)
    one_token = SamplingParams(max_tokens=1, temperature=0)
    chance = np.random.default_rng(time.time_ns())
    processor = AutoImageProcessor.from_pretrained(options.model)
    tower = TowerSpec.from_config(AutoConfig.from_pretrained(options.model).to_dict())

    def ask(number: int, text: str, picture: Image.Image, key: str) -> float:
        prompt = {"prompt": f"{number} {text} {IMAGE}", "multi_modal_data": {"image": picture}}
        begun = time.perf_counter()
        llm.generate({**prompt, "multi_modal_uuids": {"image": [key]}}, one_token, use_tqdm=False)
        return (time.perf_counter() - begun) * 1e3

    fetched, known = [], []
    with EncoderClient(options.server) as client:
        for number in range(options.pictures + 5):
            pixels = chance.integers(0, 256, (options.side, options.side, 3), dtype=np.uint8)
            picture, key = Image.fromarray(pixels), f"bench-{chance.integers(1 << 62)}"
            made = processor(images=[picture], do_rescale=False, do_normalize=False, return_tensors="np")
            grid = Grid(*made["image_grid_thw"][0].tolist())
            values = torch.from_numpy(made["pixel_values"].astype(np.uint8))
            client.encode([Wanted(key, grid, grid.tokens(tower), values).item(tower, None)], timeout_s=60)
            first, again = ask(number, "once", picture, key), ask(number, "then", picture, key)
            if number >= 5:  # the first ones are everything's first time
                fetched.append(first)
                known.append(again)
    added = [first - again for first, again in zip(fetched, known, strict=True)]
    print(
        f"{options.pictures} pictures of {options.side}×{options.side}, store {options.store}: through the connector "
        f"{median(fetched):.1f} ms, from vLLM's own cache {median(known):.1f} ms; added {median(added):.1f} ms (median of the "
        f"differences; quartiles {np.percentile(added, 25):.1f} and {np.percentile(added, 75):.1f})"
    )


if __name__ == "__main__":
    main()
