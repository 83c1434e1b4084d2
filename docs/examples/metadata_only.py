"""Ask a vLLM about a photo whose embedding lies in the sidecar's store: the request has only its name and size.

    python -m sidecar serve --artifact ARTIFACT --store /dev/shm/epd-encoder
    vllm serve MODEL --limit-mm-per-prompt '{"image": 0, "video": 0}' --ec-transfer-config '{"ec_connector":
      "ECExampleConnector", "ec_role": "ec_consumer",
      "ec_connector_extra_config": {"shared_storage_path": "/dev/shm/epd-encoder"}}'
    python docs/examples/metadata_only.py photo.jpg --vllm http://127.0.0.1:8000

All three on one host and as one user. This vLLM has no vision weights and never sees a pixel.
"""

from __future__ import annotations

import argparse
import base64
import json
import urllib.request
from mimetypes import guess_type
from pathlib import Path

from sidecar.client import EncoderClient
from sidecar.integrations.chat import metadata_only

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("photo", type=Path, nargs="+")
parser.add_argument("--question", default="What do you see?")
parser.add_argument("--server", default="127.0.0.1:50051", help="the sidecar")
parser.add_argument("--store", default="/dev/shm/epd-encoder", help="the sidecar's --store")
parser.add_argument("--vllm", default="http://127.0.0.1:8000")
options = parser.parse_args()

photos = [
    f"data:{guess_type(photo)[0]};base64,{base64.b64encode(photo.read_bytes()).decode()}" for photo in options.photo
]
images = [{"type": "image_url", "image_url": {"url": url}} for url in photos]
question = {"type": "text", "text": options.question}
request = {"messages": [{"role": "user", "content": [*images, question]}], "max_tokens": 64, "temperature": 0}

with EncoderClient(options.server, store=options.store) as client:
    held = metadata_only(client, request, timeout_s=60)
    try:
        body = json.dumps(held.request).encode()
        post = urllib.request.Request(f"{options.vllm}/v1/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(post) as response:
            print(json.load(response)["choices"][0]["message"]["content"])
    finally:
        client.release(held.leases)  # until now the sidecar could not evict them
