"""Run by vLLM's Python: some fifty requests through an in-process vLLM, their tokens and logprobs as JSON.

    python offline_requests.py MODEL OUT.json [--way plain|pull|keys|inline] [--server ADDRESS] [--engine JSON]

`plain` is vLLM by itself, `pull` raw images that a connector takes to the sidecar, `keys` metadata-only images whose embeddings
lie in the sidecar's store, `inline` embeddings in the request. In the last two the sidecar is asked before, with the patches of
the model's own processor, so that the pixels are the same everywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

# In one process and steady on few cores.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")}

import numpy as np
import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionTransformer

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
TOKENS = 8
# Width and height in pixels: odd ones, ragged windows, long strips, whole windows.
SIZES = (
    (57, 83),
    (112, 112),
    (200, 61),
    (224, 224),
    (301, 177),
    (90, 333),
    (448, 130),
    (150, 150),
    (99, 240),
    (28, 28),
)

Request = tuple[str, list[Image.Image], "np.ndarray[Any, Any] | None"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--way", choices=("plain", "pull", "keys", "inline"), default="plain")
    parser.add_argument("--server")
    parser.add_argument("--engine", type=json.loads, default={})
    options = parser.parse_args()

    calls = count_tower_calls()
    limits = {"image": 4, "video": 1}
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "limit_mm_per_prompt": limits}
    llm = LLM(options.model, max_num_seqs=8, seed=0, **engine | options.engine)
    at_start = len(calls)
    requests = [each for each in all_requests() if options.way in ("plain", "pull") or each[2] is None]
    prompts = [prompt(options, *request) for request in requests]
    begun = time.monotonic()
    outputs = llm.generate(prompts, SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=1), use_tqdm=False)
    # In a second round everything is known already, to vLLM or to the sidecar.
    outputs += llm.generate(prompts[::5], SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=1), use_tqdm=False)
    names = [text for text, _, _ in requests]
    answers = [
        {
            "name": name,
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [max(each.logprob for each in step.values()) for step in output.outputs[0].logprobs],
        }
        for name, output in zip([*names, *(f"{name} again" for name in names[::5])], outputs, strict=True)
    ]
    result = {"answers": answers, "tower_calls": len(calls) - at_start, "seconds": time.monotonic() - begun}
    options.out.write_text(json.dumps(result))


def count_tower_calls() -> list[object]:
    calls: list[object] = []
    forward = Qwen2_5_VisionTransformer.forward

    def counted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        calls.append(None)
        return forward(self, *arguments, **keywords)

    Qwen2_5_VisionTransformer.forward = counted
    return calls


def all_requests() -> list[Request]:
    chance = np.random.default_rng(0)

    def image(number: int) -> Image.Image:
        width, height = SIZES[number % len(SIZES)]
        return Image.fromarray(chance.integers(0, 256, (height, width, 3), dtype=np.uint8))

    requests: list[Request] = [(f"text {number} only", [], None) for number in range(4)]
    number = 0
    for count in (1, 2, 3, 4) * 7:
        images = [image(number + offset) for offset in range(count)]
        number += count
        requests.append((f"{number}: {IMAGE * count} what is it?", images, None))
    again = requests[4][1] + requests[5][1]
    requests += [
        (f"the same twice {IMAGE}and{IMAGE}", [again[0], again[0]], None),
        (f"once more {IMAGE}", [again[0]], None),
        (f"{IMAGE}text between{IMAGE}", again[1:3], None),
        (f"the other way round {IMAGE}{IMAGE}", again[2:0:-1], None),
        (f"{IMAGE * 4} mixed with a repetition", [*again, again[0]], None),
    ]
    video = chance.integers(0, 256, (6, 112, 168, 3), dtype=np.uint8)
    requests += [(f"{VIDEO} a film", [], video), (f"{IMAGE}{VIDEO} both", [again[1]], video)]
    return [
        *requests,
        (f"{VIDEO} another {IMAGE}", [image(3)], chance.integers(0, 256, (5, 84, 84, 3), dtype=np.uint8)),
    ]


def prompt(options: argparse.Namespace, text: str, images: list[Image.Image], video: Any) -> dict[str, Any]:
    if options.way in ("plain", "pull") or not images:
        data: dict[str, Any] = {"image": images} if images else {}
        if video is not None:
            data["video"] = (video, metadata_of(video))
        return {"prompt": text, "multi_modal_data": data}
    embeddings = encoded(options, images)
    grids = torch.tensor([list(each.grid) for each in embeddings])
    if options.way == "keys":
        keys = [each.key for each in embeddings]
        return {
            "prompt": text,
            "multi_modal_data": {"image": {"image_grid_thw": grids}},
            "multi_modal_uuids": {"image": keys},
        }
    rows = torch.from_numpy(np.concatenate([each.float32() for each in embeddings]))
    return {"prompt": text, "multi_modal_data": {"image": {"image_embeds": rows, "image_grid_thw": grids}}}


def metadata_of(video: Any) -> dict[str, Any]:
    """As vLLM's own loader gives it, of two frames a second that have all been taken."""
    count = len(video)
    taken = {"frames_indices": list(range(count)), "do_sample_frames": False}
    return {"fps": 2.0, "duration": count / 2, "total_num_frames": count, "video_backend": "opencv", **taken}


def encoded(options: argparse.Namespace, images: list[Image.Image]) -> list[Any]:
    """Through the client, as a proxy in front of vLLM does."""
    from transformers import AutoImageProcessor

    from sidecar.client import Embedding, EncoderClient, patches_item
    from sidecar.vision.dtypes import DType
    from sidecar.vision.grid import Grid

    processor = AutoImageProcessor.from_pretrained(options.model)
    items = []
    for image in images:
        made = processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")
        grid = Grid(*made["image_grid_thw"][0].tolist())
        items.append(patches_item(made["pixel_values"].astype(np.uint8), grid, DType.UINT8))
    with EncoderClient(options.server) as client:
        keyed = [named(item) for item in items]
        results = client.encode(keyed, timeout_s=60)
        assert all(isinstance(result, Embedding) for result in results), results
        return results


def named(item: Any) -> Any:
    from hashlib import sha256

    item.key = sha256(item.patches.data).hexdigest()
    return item


if __name__ == "__main__":
    main()
