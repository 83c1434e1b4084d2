"""Run by vLLM's Python: in-process vLLMs, one after another, each with its own settings and requests; their answers as JSON.

    python offline_replicas.py MODEL OUT.json SPEC.json

The specification is a list of replicas: `name`, `engine` (arguments of `LLM`) and `requests`, each with a `picture` (a number, of
which its pixels are made), perhaps a `uuid`, or `hash_of`: the number of a picture whose hash, as vLLM has made it before, is
sent as the uuid, as any client of vLLM may.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# In one process and steady on few cores.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")}

import numpy as np
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionTransformer
from vllm.v1.core.sched.scheduler import Scheduler

TOKENS = 8
PROMPT = "<|vision_start|><|image_pad|><|vision_end|> what is it?"
# Width and height in pixels; no side is a multiple of 28, so that resampling changes every picture.
SIZES = ((150, 101), (90, 133), (121, 121), (202, 90))
HASHES: dict[int, str] = {}
IDENTIFIERS: dict[str, str] = {}  # what vLLM calls the picture of each request, by the request's number
TOWER_CALLS: list[None] = []


def main() -> None:
    model, out, specification = sys.argv[1:]
    watch()
    answers = [replica(model, **each) for each in json.loads(Path(specification).read_text())]
    Path(out).write_text(json.dumps(answers))


def replica(model: str, name: str, engine: dict[str, Any], requests: list[dict[str, Any]]) -> dict[str, Any]:
    begun = time.monotonic()
    usual: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8}
    usual["limit_mm_per_prompt"] = {"image": 1, "video": 0}
    llm = LLM(model, seed=0, **usual | engine)
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=1)
    prompts = [prompt(**request) for request in requests]
    at_start = len(TOWER_CALLS)
    IDENTIFIERS.clear()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    for request, output in zip(requests, outputs, strict=True):
        if len(request) == 1:
            HASHES[request["picture"]] = IDENTIFIERS[output.request_id.partition("-")[0]]
    answers = [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [max(each.logprob for each in step.values()) for step in output.outputs[0].logprobs or ()],
            "finished": output.outputs[0].finish_reason,
        }
        for output in outputs
    ]
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    tower_calls = len(TOWER_CALLS) - at_start
    return {"name": name, "answers": answers, "tower_calls": tower_calls, "seconds": time.monotonic() - begun}


def watch() -> None:
    add, forward = Scheduler.add_request, Qwen2_5_VisionTransformer.forward

    def added(self: Any, request: Any) -> Any:
        IDENTIFIERS[request.request_id.partition("-")[0]] = request.mm_features[0].identifier
        return add(self, request)

    def counted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        TOWER_CALLS.append(None)
        return forward(self, *arguments, **keywords)

    Scheduler.add_request = added
    Qwen2_5_VisionTransformer.forward = counted


def prompt(picture: int, uuid: str | None = None, hash_of: int | None = None) -> dict[str, Any]:
    width, height = SIZES[picture % len(SIZES)]
    pixels = np.random.default_rng(picture).integers(0, 256, (height, width, 3), dtype=np.uint8)
    made: dict[str, Any] = {"prompt": PROMPT, "multi_modal_data": {"image": Image.fromarray(pixels)}}
    if hash_of is not None:
        uuid = HASHES[hash_of]
    return made if uuid is None else made | {"multi_modal_uuids": {"image": [uuid]}}


if __name__ == "__main__":
    main()
