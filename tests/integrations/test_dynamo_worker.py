"""One request of Dynamo's: every image side by side, nothing handed over that is not right, nothing left of what failed."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sidecar.integrations.dynamo.images import Bounds
from sidecar.integrations.dynamo.metrics import Gauge
from sidecar.integrations.dynamo.model import MismatchError, Model, WrongEmbeddingError
from sidecar.integrations.dynamo.protocol import Transfer
from sidecar.integrations.dynamo.worker import FailedError, Worker
from sidecar.items import Item
from sidecar.pb import encoder_pb2
from sidecar.replies import ClientError, Embedding, EncodeError, Lane, ProtocolError, StageTimes
from sidecar.vision.dtypes import DType
from sidecar.vision.grid import Grid

MODEL = "f" * 64
GRID = Grid(1, 4, 4)


def info(fingerprint: str = MODEL, width: int = 8, merge: int = 2) -> encoder_pb2.InfoResponse:
    tower = encoder_pb2.TowerSpec(out_hidden_size=width, spatial_merge_size=merge)
    return encoder_pb2.InfoResponse(fingerprint=fingerprint, tower=tower)


def embedding(
    rows: int = 4, width: int = 8, fingerprint: str = MODEL, value: float = 1.0, grid: Grid = GRID
) -> Embedding:
    return Embedding(
        key="k",
        grid=grid,
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
    """Answers each image by its content; from a list, one after another, as long as what it gives will not do."""

    def __init__(self, answers: dict[bytes, Any]) -> None:
        self._answers = answers
        self.gate = asyncio.Event()
        self.asked = 0
        self.left = 0

    async def encode(self, item: Item, timeout_s: float, *, check: Callable[[Embedding], None]) -> Embedding:
        answer = self._answers.get(item.image, embedding())
        for one in answer if isinstance(answer, list) else [answer]:
            failure: ClientError | None = None
            try:
                check(found := await self._one(one))
                return found
            except WrongEmbeddingError as error:
                failure = error
        assert failure is not None
        raise failure

    async def _one(self, answer: Any) -> Embedding:
        self.asked += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.left += 1
            raise
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Embedding)
        return answer


class FakeHandOver:
    def __init__(self) -> None:
        self.offered = 0
        self.room = asyncio.Event()
        self.room.set()
        self.broken: OSError | None = None

    async def offer(self, embeddings: Sequence[Embedding]) -> list[Transfer]:
        await self.room.wait()
        if self.broken is not None:
            raise self.broken
        self.offered += len(embeddings)
        return [Transfer.of(embedding, f"file-{number}") for number, embedding in enumerate(embeddings, 1)]

    async def close(self, wait_s: float) -> None:
        pass


def request(*contents: bytes) -> str:
    urls = ["data:image/png;base64," + base64.b64encode(content).decode() for content in contents]
    return json.dumps(
        {"request_id": "r", "multimodal_inputs": [{"multimodal_input": {"image_url": url}} for url in urls]}
    )


def run(
    answers: dict[bytes, Any],
    test: Callable[[Worker, FakeFleet, FakeHandOver], Awaitable[None]],
    request_s: float = 60.0,
) -> None:
    async def limited() -> None:
        model = Model()
        model.meet(info())
        fleet, hand_over = FakeFleet(answers), FakeHandOver()
        worker: Any = Worker(fleet, model, hand_over, Bounds(), request_s)  # type: ignore[arg-type]
        await asyncio.wait_for(test(worker, fleet, hand_over), 10)

    asyncio.run(limited())


def test_all_images_are_asked_for_before_any_has_come() -> None:
    async def test(worker: Worker, fleet: FakeFleet, hand_over: FakeHandOver) -> None:
        asking = asyncio.create_task(worker.answer(request(b"a", b"b", b"c"), "r"))
        while fleet.asked < 3:
            await asyncio.sleep(0)
        fleet.gate.set()
        answer = json.loads(await asking or "")
        groups = answer["multimodal_inputs"]
        assert [group["embeddings_shape"] for group in groups] == [[1, 4, 8]] * 3
        paths = [group["serialized_request"]["serialized_request"] for group in groups]
        assert paths == ["file-1", "file-2", "file-3"]
        assert worker.tally.requests["answered"] == 1 and worker.tally.images == 3 and await worker.drain(0.1)

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
        (embedding(rows=8, grid=Grid(2, 4, 4)), "is a video's"),
    ],
    ids=["bad image", "no sidecar", "contract", "a row short", "width", "other model", "NaN", "video"],
)
def test_one_that_is_wrong_fails_the_request_with_its_number_and_nothing_is_handed_over(
    wrong: Embedding | Exception, said: str
) -> None:
    async def test(worker: Worker, fleet: FakeFleet, hand_over: FakeHandOver) -> None:
        fleet.gate.set()
        with pytest.raises(FailedError, match=said):
            await worker.answer(request(b"right", b"wrong", b"right too"), "r")
        assert not hand_over.offered
        assert worker.tally.requests["failed"] == 1 and worker.tally.failures.total() == 1 and await worker.drain(0.1)
        assert await worker.answer(request(b"right"), "r")

    run({b"wrong": wrong}, test)


def test_a_request_of_very_many_images_does_not_ask_for_all_at_once() -> None:
    async def test(worker: Worker, fleet: FakeFleet, hand_over: FakeHandOver) -> None:
        asking = asyncio.create_task(worker.answer(request(*(b"%d" % number for number in range(200))), "r"))
        await asyncio.sleep(0.1)
        assert fleet.asked == 32
        fleet.gate.set()
        assert len(json.loads(await asking or "")["multimodal_inputs"]) == hand_over.offered == 200

    run({}, test)


def test_a_wrong_embedding_is_asked_for_again(caplog: pytest.LogCaptureFixture) -> None:
    async def test(worker: Worker, fleet: FakeFleet, hand_over: FakeHandOver) -> None:
        fleet.gate.set()
        assert await worker.answer(request(b"x"), "r")
        assert fleet.asked == 3 and hand_over.offered == 1

    run({b"x": [embedding(rows=3), embedding(fingerprint="0" * 64), embedding()]}, test)
    assert "an embedding of CPU was refused: its shape is (3, 8)" in caplog.text


def test_embeddings_that_nobody_makes_room_for_fail_their_request_in_time() -> None:
    async def test(worker: Worker, fleet: FakeFleet, hand_over: FakeHandOver) -> None:
        fleet.gate.set()
        hand_over.room.clear()
        with pytest.raises(FailedError, match="could not be handed over in time"):
            await worker.answer(request(b"x"), "r")
        assert worker.tally.failures["room"] == 1

    run({}, test, request_s=0.2)


def test_a_full_file_system_fails_the_request_with_its_words() -> None:
    async def test(worker: Worker, fleet: FakeFleet, hand_over: FakeHandOver) -> None:
        fleet.gate.set()
        hand_over.broken = OSError(28, "No space left on device")
        with pytest.raises(FailedError, match="could not be handed over: No space left on device"):
            await worker.answer(request(b"x"), "r")

    run({}, test)


def test_the_calls_of_a_caller_who_has_gone_are_ended() -> None:
    async def test(worker: Worker, fleet: FakeFleet, hand_over: FakeHandOver) -> None:
        leaves = asyncio.Event()
        asking = asyncio.create_task(worker.answer(request(b"a", b"b"), "r", leaves.wait))
        while fleet.asked < 2:
            await asyncio.sleep(0)
        assert not await worker.drain(0.01)
        leaves.set()
        assert await asking is None
        assert fleet.left == 2 and not hand_over.offered and await worker.drain(0.1)
        assert worker.tally.requests == {"answered": 0, "failed": 0, "left": 1}

    run({}, test)


def test_a_sidecar_of_another_model_is_not_the_one() -> None:
    proven = Model(MODEL, proven=True)
    with pytest.raises(MismatchError, match="this checkpoint's is ffffffffffffffff…"):
        proven.meet(info("0" * 64))
    first = Model()
    first.meet(info())
    assert first.fingerprint == MODEL
    with pytest.raises(MismatchError, match="the others serve"):
        first.meet(info("0" * 64))


def test_a_checkpoint_whose_preprocessing_no_sidecar_follows_is_refused(toy_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(toy_checkpoint, tmp_path / "copy")
    path = checkpoint / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_resize": False}))
    with pytest.raises(MismatchError, match="do_resize is false; only true is supported"):
        Model.of(str(checkpoint), "").meet(info())


@pytest.mark.parametrize(("width", "merge"), [(16, 2), (8, 4), (8, 0)])
def test_what_embeddings_look_like_is_not_learnt_anew(width: int, merge: int) -> None:
    model = Model(MODEL, proven=True, shape=(8, 2))
    with pytest.raises(
        MismatchError, match=f"are {width} wide and merge {merge}×{merge} patches, this model's 8 and 2"
    ):
        model.meet(info(width=width, merge=merge))
    model.meet(info())
    model.check(embedding())
    if not merge:
        with pytest.raises(MismatchError, match="which cannot be"):
            Model().meet(info(width=width, merge=merge))


def test_metrics_are_in_prometheus_text_format() -> None:
    async def test(worker: Worker, fleet: FakeFleet, hand_over: FakeHandOver) -> None:
        fleet.gate.set()
        await worker.answer(request(b"a", b"b"), "r")
        with pytest.raises(FailedError):
            await worker.answer("{", "r")
        text = worker.tally.text([Gauge("epd_dynamo_files", "Lying there", lambda: 7)])
        values = {
            sample.name + "".join(sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert values["epd_dynamo_requests_totalanswered"] == values["epd_dynamo_requests_totalfailed"] == 1
        assert values["epd_dynamo_image_seconds_count"] == values["epd_dynamo_image_seconds_bucket+Inf"] == 2
        assert values["epd_dynamo_files"] == 7

    run({}, test)
