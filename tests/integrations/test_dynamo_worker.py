"""One request of Dynamo's: every image side by side, nothing handed over that is not right, nothing left of what failed."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from sidecar.integrations.dynamo.model import MismatchError, Model
from sidecar.integrations.dynamo.options import OptionsError, parse
from sidecar.integrations.dynamo.protocol import Bounds, Transfer
from sidecar.integrations.dynamo.worker import FailedError, Worker
from sidecar.items import Item
from sidecar.pb import encoder_pb2
from sidecar.replies import Embedding, EncodeError, Lane, ProtocolError, StageTimes
from sidecar.vision.dtypes import DType
from sidecar.vision.grid import Grid

MODEL = "f" * 64


def info(fingerprint: str = MODEL) -> encoder_pb2.InfoResponse:
    tower = encoder_pb2.TowerSpec(out_hidden_size=8, spatial_merge_size=2)
    return encoder_pb2.InfoResponse(fingerprint=fingerprint, tower=tower)


def embedding(rows: int = 4, width: int = 8, fingerprint: str = MODEL, value: float = 1.0) -> Embedding:
    return Embedding(
        key="k",
        grid=Grid(1, 4, 4),
        dtype=DType.FLOAT32,
        data=np.full((rows, width), value, np.float32),
        fingerprint=fingerprint,
        lane=Lane("openvino", "CPU", "bf16"),
        times=StageTimes(0, 0, 0),
        cached=False,
        coalesced=False,
        path=None,
        lease="",
    )


class FakeFleet:
    """Answers each image by its content."""

    def __init__(self, answers: dict[bytes, Embedding | Exception]) -> None:
        self._answers = answers
        self.gate = asyncio.Event()
        self.asked = 0
        self.left = 0

    async def encode(self, item: Item, timeout_s: float) -> Embedding:
        self.asked += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.left += 1
            raise
        answer = self._answers.get(item.image, embedding())
        if isinstance(answer, Exception):
            raise answer
        return answer


class FakeHandOver:
    def __init__(self) -> None:
        self.offered = 0
        self.withdrawn: list[Transfer] = []

    async def offer(self, embedding: Embedding) -> Transfer:
        self.offered += 1
        return Transfer((1, 4, 8), "float32", f"file-{self.offered}")

    async def withdraw(self, transfer: Transfer) -> None:
        self.withdrawn.append(transfer)

    async def close(self, drain_s: float) -> None:
        pass


def request(*contents: bytes) -> str:
    urls = ["data:image/png;base64," + base64.b64encode(content).decode() for content in contents]
    return json.dumps(
        {"request_id": "r", "multimodal_inputs": [{"multimodal_input": {"image_url": url}} for url in urls]}
    )


def run(
    answers: dict[bytes, Embedding | Exception], test: Callable[[Worker, FakeFleet, FakeHandOver], Awaitable[None]]
) -> None:
    async def limited() -> None:
        model = Model()
        model.meet(info())
        fleet, hand_over = FakeFleet(answers), FakeHandOver()
        worker: Any = Worker(fleet, model, hand_over, Bounds(), 60.0)  # type: ignore[arg-type]
        await asyncio.wait_for(test(worker, fleet, hand_over), 10)

    asyncio.run(limited())


def test_all_images_are_asked_for_before_any_has_come() -> None:
    async def test(worker: Worker, fleet: FakeFleet, hand_over: FakeHandOver) -> None:
        asking = asyncio.create_task(worker.answer(request(b"a", b"b", b"c")))
        while fleet.asked < 3:
            await asyncio.sleep(0)
        fleet.gate.set()
        answer = json.loads(await asking or "")
        assert [group["embeddings_shape"] for group in answer["multimodal_inputs"]] == [[1, 4, 8]] * 3
        assert worker.tally == {"requests": 1, "images": 3} and await worker.drain(0.1)

    run({}, test)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (EncodeError("INVALID_ARGUMENT", "not a picture"), "image 2: not a picture"),
        (EncodeError("UNAVAILABLE", "nobody there"), "image 2 could not be encoded now, try again: nobody there"),
        (ProtocolError("chunks overlap"), "image 2: the encoder's answer was refused: chunks overlap"),
        (embedding(rows=3), r"its shape is \(3, 8\), its grid \(1, 4, 4\) means \(4, 8\)"),
        (embedding(width=16), "its shape is"),
        (embedding(fingerprint="0" * 64), "it is of the model 0000000000000000…, prefill's is ffffffffffffffff…"),
        (embedding(value=float("nan")), "not finite"),
    ],
    ids=["bad image", "no sidecar", "contract", "a row short", "width", "other model", "NaN"],
)
def test_one_that_is_wrong_fails_the_request_with_its_number_and_takes_its_neighbours_back(
    wrong: Embedding | Exception, said: str
) -> None:
    async def test(worker: Worker, fleet: FakeFleet, hand_over: FakeHandOver) -> None:
        fleet.gate.set()
        with pytest.raises(FailedError, match=said):
            await worker.answer(request(b"right", b"wrong", b"right too"))
        assert len(hand_over.withdrawn) == hand_over.offered
        assert worker.tally["failed"] == 1 and await worker.drain(0.1)
        assert await worker.answer(request(b"right"))

    run({b"wrong": wrong}, test)


def test_the_calls_of_a_caller_who_has_gone_are_ended() -> None:
    async def test(worker: Worker, fleet: FakeFleet, hand_over: FakeHandOver) -> None:
        leaves = asyncio.Event()
        asking = asyncio.create_task(worker.answer(request(b"a", b"b"), leaves.wait))
        while fleet.asked < 2:
            await asyncio.sleep(0)
        assert not await worker.drain(0.01)
        leaves.set()
        assert await asking is None
        assert fleet.left == 2 and not hand_over.offered and await worker.drain(0.1)

    run({}, test)


def test_a_sidecar_of_another_model_is_not_the_one() -> None:
    proven = Model(MODEL, proven=True)
    with pytest.raises(MismatchError, match="this checkpoint's is ffffffffffffffff…"):
        proven.meet(info("0" * 64))
    assert not proven.known
    first = Model()
    first.meet(info())
    assert first.known and first.fingerprint == MODEL
    with pytest.raises(MismatchError, match="the others serve"):
        first.meet(info("0" * 64))


def test_options_come_from_flags_and_from_dynamos_variables() -> None:
    options = parse(["--model", "m", "--server", "a:1,b:2", "--server", "c:3"], {"DYN_NAMESPACE": "ns"})
    assert options.servers == ("a:1", "b:2", "c:3") and options.namespace == "ns" and options.model_name == "m"
    assert parse(["--model", "m"], {"EPD_SERVER": "x:1", "DYN_ENCODER_DEVICE": "cuda:0"}).device == "cuda:0"
    assert parse(["--model", "m"], {}).servers == ("127.0.0.1:50051",)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--request-seconds", "0"], "--request-seconds must be more than 0"),
        (["--request-seconds", "nan"], "--request-seconds must be more than 0"),
        (["--local-bytes", "0"], "--local-bytes must be at least 1"),
        (["--local-directory", "/nowhere"], "/nowhere is no directory"),
        (["--namespace", "a.b"], "no dots"),
        (["--server", ","], "--server needs the address"),
        (["--min-pixels", "0"], "must be at least 1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(flags: list[str], said: str) -> None:
    with pytest.raises(OptionsError, match=said):
        parse(["--model", "m", *flags], {})
