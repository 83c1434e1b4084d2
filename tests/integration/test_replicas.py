"""vLLMs that share a sidecar are each answered as they would be alone, whatever the others call their pictures."""

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

REQUESTS = 40
LOGPROBS_APART = 1e-3
# Settings of a vLLM server that change the pixels, and that vLLM's hash of a picture does not cover.
RESAMPLE = {"mm_processor_kwargs": {"resample": 0}}
MAX_PIXELS = {"mm_processor_kwargs": {"max_pixels": 6272}}

Requests = list[dict[str, Any]]


def pictures(first: int) -> Requests:
    return [{"picture": first + number} for number in range(REQUESTS)]


def with_uuids(first: int) -> Requests:
    return [{"picture": first + number, "uuid": f"uuid-{number}"} for number in range(REQUESTS)]


def with_hashes_of(victims: int, first: int) -> Requests:
    """As a client may send them: each picture under the hash of another one."""
    return [{"picture": first + number, "hash_of": victims + number} for number in range(REQUESTS)]


SHARED, VICTIMS = pictures(0), pictures(600)
# In this order: each would be answered with the embeddings of those before it, if names were believed.
REPLICAS: list[tuple[str, dict[str, Any], dict[str, Requests]]] = [
    (
        "resample",
        RESAMPLE,
        {"its own pixels": SHARED, "uuids": with_uuids(200), "hashes of others": with_hashes_of(600, 700)},
    ),
    ("max_pixels", MAX_PIXELS, {"its own grids": SHARED}),
    (
        "default",
        {},
        {"ordinary pictures": SHARED, "named by an attacker": VICTIMS, "uuids of a replica": with_uuids(400)},
    ),
    ("default", {}, {"uuids of before its restart": with_uuids(500)}),
]


@pytest.fixture(scope="module")
def answers(
    toy_checkpoint: Path, start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Of each case: (what the sidecar gave, what the same vLLM answers by itself), request by request."""
    sidecar = start_server("--precision", "f32", "--embedding-dtype", "float32")
    connector = {
        "ec_connector": "EncoderSidecarConnector",
        "ec_role": "ec_consumer",
        "ec_connector_extra_config": {"address": sidecar.address, "on_failure": "fail"},
    }
    plain: dict[str, tuple[dict[str, Any], set[int]]] = {}
    for name, engine, cases in REPLICAS:
        numbers = plain.setdefault(name, (engine, set()))[1]
        numbers |= {request["picture"] for requests in cases.values() for request in requests}
    plain["default"][1].update(request["picture"] for request in VICTIMS)
    specification = [
        {"name": name, "engine": engine, "requests": [{"picture": number} for number in sorted(numbers)]}
        for name, (engine, numbers) in plain.items()
    ]
    for name, engine, cases in REPLICAS:
        requests = [request for case in cases.values() for request in case]
        specification.append({"name": name, "engine": engine | {"ec_transfer_config": connector}, "requests": requests})
    directory = tmp_path_factory.mktemp("replicas")
    (directory / "specification.json").write_text(json.dumps(specification))
    script = Path(__file__).with_name("offline_replicas.py")
    command = [VLLM_ENVIRONMENT / "bin" / "python", script, toy_checkpoint]
    command += [directory / "answers.json", directory / "specification.json"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-6000:]
    results = json.loads((directory / "answers.json").read_text())
    alone = {
        each["name"]: dict(zip(sorted(plain[each["name"]][1]), each["answers"], strict=True))
        for each in results[: len(plain)]
    }
    found = {}
    for (name, _, cases), each in zip(REPLICAS, results[len(plain) :], strict=True):
        assert each["tower_calls"] == 0
        rest = iter(each["answers"])
        for case, requests in cases.items():
            found[case] = [(next(rest), alone[name][request["picture"]]) for request in requests]
    print("\nseconds of each vLLM:", [round(each["seconds"], 1) for each in results], end="")
    return found


@pytest.mark.parametrize("case", [case for _, _, cases in REPLICAS for case in cases])
def test_each_replica_is_answered_as_if_alone(
    case: str, answers: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]
) -> None:
    compared = answers[case]
    equal = sum(ours["tokens"] == theirs["tokens"] for ours, theirs in compared)
    failed = sum(ours["finished"] != "length" for ours, _ in compared)
    apart = max(
        (abs(a - b) for ours, theirs in compared for a, b in zip(ours["logprobs"], theirs["logprobs"], strict=False)),
        default=0.0,
    )
    print(f"\n{case}: {equal} of {len(compared)} equal, {failed} failed, logprobs at most {apart:.1e} apart", end="")
    assert (equal, failed) == (REQUESTS, 0)
    assert apart <= LOGPROBS_APART
