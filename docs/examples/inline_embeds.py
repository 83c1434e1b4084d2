"""Ask a vLLM about a photo that a sidecar has encoded: the embedding travels in the request.

    vllm serve MODEL --enable-mm-embeds
    python -m sidecar serve --artifact ARTIFACT
    python docs/examples/inline_embeds.py photo.jpg --vllm http://127.0.0.1:8000

Any vLLM that holds the same checkpoint takes it; its own vision tower does not run.
"""

from __future__ import annotations

import argparse
import base64
import json
import urllib.request
from mimetypes import guess_type
from pathlib import Path

from sidecar.client import EncoderClient
from sidecar.integrations.chat import inline_embeds

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("photo", type=Path, nargs="+")
parser.add_argument("--question", default="What do you see?")
parser.add_argument("--server", default="127.0.0.1:50051", help="the sidecar")
parser.add_argument("--vllm", default="http://127.0.0.1:8000")
options = parser.parse_args()

photos = [
    f"data:{guess_type(photo)[0]};base64,{base64.b64encode(photo.read_bytes()).decode()}" for photo in options.photo
]
images = [{"type": "image_url", "image_url": {"url": url}} for url in photos]
question = {"type": "text", "text": options.question}
request = {"messages": [{"role": "user", "content": [*images, question]}], "max_tokens": 64, "temperature": 0}

with EncoderClient(options.server) as client:
    request = inline_embeds(client, request, timeout_s=60)

body = json.dumps(request).encode()
post = urllib.request.Request(f"{options.vllm}/v1/chat/completions", body, {"Content-Type": "application/json"})
with urllib.request.urlopen(post) as response:
    print(json.load(response)["choices"][0]["message"]["content"])
