"""Whichever way the embeddings come, vLLM answers as it does by itself."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import Server
from vllm_servers import VLLM_ENVIRONMENT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

Run = Callable[..., dict[str, Any]]
LOGPROBS_APART = 1e-3
OURS, STOCK = "EncoderSidecarConnector", "ECExampleConnector"


@pytest.fixture(scope="module")
def sidecar(start_server: Callable[..., Server]) -> Server:
    return start_server("--precision", "f32", "--embedding-dtype", "float32")


@pytest.fixture(scope="module")
def run(toy_checkpoint: Path, sidecar: Server, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(way, **engine arguments): some fifty requests through a vLLM of its own."""

    def requests(way: str, **engine: Any) -> dict[str, Any]:
        out = tmp_path_factory.mktemp(way) / "answers.json"
        script = Path(__file__).with_name("offline_requests.py")
        command = [str(VLLM_ENVIRONMENT / "bin" / "python"), str(script), str(toy_checkpoint), str(out)]
        command += ["--way", way, "--server", sidecar.address, "--engine", json.dumps(engine)]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-6000:]
        answers: dict[str, Any] = json.loads(out.read_text())
        return answers

    return requests


@pytest.fixture(scope="module")
def plain(run: Run) -> dict[str, Any]:
    answers = run("plain")
    assert answers["tower_calls"] > 0
    return answers


def connector(name: str, role: str = "ec_consumer", **options: Any) -> dict[str, Any]:
    return {"ec_transfer_config": {"ec_connector": name, "ec_role": role, "ec_connector_extra_config": options}}


def check(name: str, plain: dict[str, Any], answers: dict[str, Any]) -> None:
    assert answers["tower_calls"] == 0
    ours = {each["name"]: each for each in answers["answers"]}
    theirs = {each["name"]: each for each in plain["answers"]}
    assert len(ours) >= 40 and ours.keys() <= theirs.keys()
    apart = 0.0
    for request, answer in ours.items():
        assert answer["tokens"] == theirs[request]["tokens"], request
        apart = max(apart, *(abs(a - b) for a, b in zip(answer["logprobs"], theirs[request]["logprobs"], strict=True)))
    print(
        f"\n{name}: {len(ours)} answers, tokens equal, logprobs at most {apart:.1e} apart, tower called 0 times", end=""
    )
    assert apart <= LOGPROBS_APART


def test_raw_images_and_videos_by_the_connector(run: Run, plain: dict[str, Any], sidecar: Server) -> None:
    check("pull", plain, run("pull", **connector(OURS, address=sidecar.address, on_failure="fail")))


def test_raw_images_without_the_towers_weights(run: Run, plain: dict[str, Any], sidecar: Server) -> None:
    engine = connector(OURS, address=sidecar.address, load_tower=False)
    check("pull, no tower", plain, run("pull", **engine, skip_mm_profiling=True))


def test_normalised_pixels_are_turned_back(run: Run, plain: dict[str, Any], sidecar: Server) -> None:
    engine = connector(OURS, address=sidecar.address, on_failure="fail", store="off")
    check("pull, normalised by vLLM, sent", plain, run("pull", **engine, mm_device_do_normalize=False))


def test_keys_by_the_connector(run: Run, plain: dict[str, Any], sidecar: Server) -> None:
    check("keys", plain, run("keys", **connector(OURS, address=sidecar.address), language_model_only=True))


def test_keys_by_vllms_own_connector(run: Run, plain: dict[str, Any], sidecar: Server) -> None:
    with sidecar.client() as client:
        store = client.info().store.directory
    engine = connector(STOCK, shared_storage_path=store)
    check("keys, ECExampleConnector", plain, run("keys", **engine, language_model_only=True))


def test_embeddings_in_the_request(run: Run, plain: dict[str, Any]) -> None:
    check("inline", plain, run("inline", enable_mm_embeds=True))
