"""The sidecars behind Dynamo's encode component: waited for, held to the model, and published as what they are."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sidecar.integrations.dynamo import sidecars
from sidecar.integrations.dynamo.model import Model
from sidecar.integrations.dynamo.sidecars import meet, publish_device
from sidecar.pb import encoder_pb2
from sidecar.replies import EncodeError

OURS, OTHER = "f" * 64, "0" * 64
NOBODY = EncodeError("UNAVAILABLE", "connection refused")


def info(fingerprint: str, *devices: str) -> encoder_pb2.InfoResponse:
    lanes = [encoder_pb2.Lane(runtime="openvino", device=device) for device in devices]
    tower = encoder_pb2.TowerSpec(out_hidden_size=8, spatial_merge_size=2)
    return encoder_pb2.InfoResponse(fingerprint=fingerprint, lanes=lanes, tower=tower)


class FakeFleet:
    """Gives these answers, one after another and the last for ever."""

    def __init__(self, *answers: dict[str, Any] | EncodeError) -> None:
        self._answers = list(answers)

    async def infos(self, timeout_s: float) -> dict[str, Any]:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, EncodeError):
            raise answer
        return answer


def met(fleet: Any, model: Model) -> list[str]:
    return asyncio.run(asyncio.wait_for(meet(fleet, model), 10))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecars, "_LOOK_AGAIN_S", 0.01)


def test_the_worker_waits_for_the_first_sidecar_of_its_model_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    fleet = FakeFleet(NOBODY, {"a:1": NOBODY}, {"a:1": NOBODY}, {"a:1": info(OTHER, "CPU")}, {"a:1": info(OURS, "CPU")})
    assert met(fleet, Model(OURS, proven=True)) == ["CPU"]
    assert caplog.text.count("sidecar a:1: UNAVAILABLE: connection refused") == 1
    assert "sidecar a:1: the sidecar serves the fingerprint 0000000000000000…" in caplog.text


def test_where_nothing_is_proven_all_must_serve_what_the_first_does(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    both = {"a:1": info(OURS, "CPU", "cuda:0"), "b:1": info(OTHER, "xpu:0")}
    assert met(FakeFleet(both), model) == ["CPU", "cuda:0"]
    assert model.fingerprint == OURS and "the others serve" in caplog.text


@pytest.mark.parametrize(
    ("devices", "before", "after"),
    [
        (["CPU (AMD EPYC, 2 threads, bf16)", "cpu"], {}, {"CUDA_VISIBLE_DEVICES": ""}),
        (["cpu"], {"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": ""}),
        (["cpu", "cuda:0 (NVIDIA H200)"], {"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "0"}),
        (["cuda:0"], {"CUDA_VISIBLE_DEVICES": ""}, {}),
        (["GPU.0 (Intel)"], {}, {}),
    ],
)
def test_dynamo_is_told_what_the_sidecars_encode_on(
    devices: list[str], before: dict[str, str], after: dict[str, str]
) -> None:
    publish_device(devices, "", before)
    assert before == after


@pytest.mark.parametrize(
    ("devices", "asked", "warned"),
    [
        (["CPU (AMD)"], "cpu", False),
        (["CPU"], "cuda:0", True),
        (["cpu", "cuda:1"], "cuda:0,cpu", False),
        (["cpu"], "", False),
    ],
)
def test_what_a_launcher_asked_for_and_does_not_get_is_told(
    devices: list[str], asked: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    publish_device(devices, asked, {})
    assert ("DYN_ENCODER_DEVICE asks for" in caplog.text) == warned
