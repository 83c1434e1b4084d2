"""How often answers in bfloat16 are equal: through a sidecar, and vLLM's own under other settings of its own.

    python -m bench.bfloat16 MODEL --artifact DIR --vllm-python EPD_VLLM/bin/python

In float32 a sidecar's answers are vLLM's own, token for token (tests/integration). In bfloat16 a value is rounded to eight bits
after each step, so that two correct orders of the same sums differ, and where two tokens are nearly as likely the other one may
win; from there on the texts differ. Each line is a vLLM of its own with the same requests, of one picture each, compared with
vLLM by itself, which takes eight at a time and whose model is not compiled.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from bench.server import serving

_SCRIPT = Path(__file__).parents[1] / "tests" / "integration" / "offline_replicas.py"
_BASE = "vLLM by itself"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--requests", type=int, default=101)
    parser.add_argument(
        "--dtype", default="bfloat16", help="of vLLM's model; float32 shows that the comparison itself is right"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        precision = "bf16" if options.dtype == "bfloat16" else "f32"
        flags = ("--precision", precision, "--embedding-dtype", options.dtype, "--store", str(directory / "store"))
        exact = ("--precision", "f32", "--embedding-dtype", options.dtype, "--store", str(directory / "exact"))
        with (
            serving(options.artifact, directory / "log", *flags) as server,
            serving(options.artifact, directory / "exact-log", *exact) as in_float32,
        ):
            engines: dict[str, dict[str, Any]] = {
                _BASE: {},
                "one request at a time": {"max_num_seqs": 1},
                "prefilled in chunks of 32 tokens": {"max_num_batched_tokens": 32, "enable_chunked_prefill": True},
                "normalised by the processor": {"mm_device_do_normalize": False},
                "compiled": {"enforce_eager": False},
                "in float32": {"dtype": "float32"},
                f"a sidecar in {precision}": through(server.address),
                "the same, one request at a time": through(server.address) | {"max_num_seqs": 1},
                "a sidecar in f32": through(in_float32.address),
            }
            compare(answers(options, engines, directory))


def through(address: str) -> dict[str, Any]:
    options = {"address": address, "on_failure": "fail"}
    connector = {
        "ec_connector": "EncoderSidecarConnector",
        "ec_role": "ec_consumer",
        "ec_connector_extra_config": options,
    }
    connector["ec_connector_module_path"] = "sidecar.integrations.vllm"
    return {"ec_transfer_config": connector}


def answers(
    options: argparse.Namespace, engines: dict[str, dict[str, Any]], directory: Path
) -> dict[str, list[list[int]]]:
    """The tokens of each request, by the name of what answered it."""
    requests = [{"picture": number} for number in range(options.requests)]
    specification = [
        {"name": name, "engine": {"dtype": options.dtype} | engine, "requests": requests}
        for name, engine in engines.items()
    ]
    (directory / "specification.json").write_text(json.dumps(specification))
    command = [
        options.vllm_python,
        _SCRIPT,
        options.model,
        directory / "answers.json",
        directory / "specification.json",
    ]
    subprocess.run(command, check=True)
    results = json.loads((directory / "answers.json").read_text())
    return {each["name"]: [answer["tokens"] for answer in each["answers"]] for each in results}


def compare(given: dict[str, list[list[int]]]) -> None:
    base = given[_BASE]
    print(f"{'compared with ' + _BASE:40} first token equal   all {len(base[0])} equal   of {len(base)}")
    for name, tokens in given.items():
        if name == _BASE:
            continue
        first = sum(ours[0] == theirs[0] for ours, theirs in zip(tokens, base, strict=True))
        whole = sum(ours == theirs for ours, theirs in zip(tokens, base, strict=True))
        print(f"{name:40} {first:17} {whole:13}")


if __name__ == "__main__":
    main()
