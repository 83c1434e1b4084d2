"""Real vLLM servers for tests: started in vLLM's own environment, asked over HTTP, ended for sure."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
# `make test-integration` says where it is.
VLLM_ENVIRONMENT = Path(os.environ.get("EPD_VLLM_ENV", ROOT / ".venv-vllm-0.32.0")).absolute()
START_S, ANSWER_S = 240.0, 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    """`tokens` and their logprobs, or the status and text of an error."""

    status: int
    text: str
    tokens: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()

    @property
    def ok(self) -> bool:
        return self.status == 200


@dataclass(frozen=True, slots=True)
class VllmServer:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def ask(self, text: str, *images: bytes, tokens: int = 4) -> Answer:
        """One chat request with PNG images."""
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        for image in images:
            url = "data:image/png;base64," + base64.b64encode(image).decode()
            parts.append({"type": "image_url", "image_url": {"url": url}})
        body = {
            "model": "toy",
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": tokens,
            "temperature": 0,
            "logprobs": True,
        }
        return ask(self.url, body)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels."""
        text = urlopen(f"{self.url}/metrics", timeout=ANSWER_S).read().decode()
        total = 0.0
        for line in text.splitlines():
            found = re.match(rf"{re.escape(name)}(?:\{{(.*)\}})? (\S+)$", line)
            if found and all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
                total += float(found[2])
        return total


def ask(url: str, body: dict[str, Any]) -> Answer:
    """POST a chat completion."""
    request = Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=ANSWER_S) as reply:
            choice = json.load(reply)["choices"][0]
    except HTTPError as error:
        return Answer(error.code, error.read().decode(errors="replace"))
    steps = (choice.get("logprobs") or {}).get("content") or []
    tokens, logprobs = tuple(step["token"] for step in steps), tuple(step["logprob"] for step in steps)
    return Answer(200, choice["message"]["content"] or "", tokens, logprobs)


@contextmanager
def vllm_server(
    model: Path, log: Path, *flags: str, connector: dict[str, Any] | None = None, installed: Path = VLLM_ENVIRONMENT
) -> Iterator[VllmServer]:
    """A `vllm serve` of its own, with our connector where its options are given; killed at the end with all it started."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(installed / "bin" / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "toy", "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    command += ["--max-num-seqs", "8", "--limit-mm-per-prompt", '{"image":4,"video":0}', *flags]
    if connector is not None:
        transfer = {
            "ec_connector": "EncoderSidecarConnector",
            "ec_role": "ec_consumer",
            "ec_connector_extra_config": connector,
        }
        command += ["--ec-transfer-config", json.dumps(transfer)]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    server = VllmServer(process, f"http://127.0.0.1:{port}", log)
    try:
        _wait_ready(server)
        yield server
    finally:
        _end(process)


def _wait_ready(server: VllmServer) -> None:
    ends = time.monotonic() + START_S
    while True:
        try:
            urlopen(f"{server.url}/health", timeout=5).close()
            return
        except OSError:
            if server.process.poll() is not None or time.monotonic() > ends:
                raise AssertionError(f"vLLM did not become ready:\n{server.log.read_text()[-8000:]}") from None
        time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, so that its connector tidies up; then whatever is left of its group."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def noise_png(number: int, width: int = 84, height: int = 112) -> bytes:
    """A picture of its own for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
